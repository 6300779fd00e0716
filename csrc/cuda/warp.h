// A warp of a block: where it is, its barriers, and shared memory.
#pragma once

#include "lane.h"

#if !defined(__CUDACC__)
#include "host/block.h"
#endif

namespace torus::cuda {

#if defined(__CUDACC__)

extern __shared__ __align__(128) unsigned char shared_memory[];

// An array of T in shared memory.
template <class T>
struct Shared {
  T* data;

  TORUS_DEVICE T load(int index) const { return data[index]; }
  TORUS_DEVICE void store(int index, std::type_identity_t<T> value, bool where) const {
    if (where) data[index] = value;
  }
  // Begins to copy 16 bytes from `from` to the elements at `index`, or zeros where not `there`.
  TORUS_DEVICE void copy_async(int index, const T* from, bool there) const {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(data + index));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "r"(there ? 16 : 0)
                 : "memory");
  }
};

struct Warp {
  int warp;

  // The same in all lanes, so that the compiler knows it is.
  TORUS_DEVICE Warp() : warp(__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpLanes, 0)) {}
  TORUS_DEVICE int index() const { return warp; }
  TORUS_DEVICE int count() const { return blockDim.x / kWarpLanes; }
  TORUS_DEVICE int block_x() const { return blockIdx.x; }
  TORUS_DEVICE int block_y() const { return blockIdx.y; }
  TORUS_DEVICE int block_z() const { return blockIdx.z; }
  TORUS_DEVICE void barrier() const { __syncthreads(); }   // of the block
  TORUS_DEVICE void sync() const { __syncwarp(); }         // of the warp
  TORUS_DEVICE void commit_copies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Waits for all groups of this warp's copies but the newest kPending.
  template <int kPending>
  TORUS_DEVICE void wait_copies() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }
  template <class T>
  TORUS_DEVICE Shared<T> shared(int byte_offset, int) const {
    return {reinterpret_cast<T*>(shared_memory + byte_offset)};
  }
};

#else

template <class T>
struct Shared {
  HostBlock* block;
  int warp, offset, count;

  int address(int index, int elements) const {
    if (index < 0 || index + elements > count)
      throw std::runtime_error("shared memory: element " + std::to_string(index) + " of an array of " +
                               std::to_string(count));
    return offset + index * static_cast<int>(sizeof(T));
  }
  Lane<T> load(const Lane<int>& index) const {
    Lane<T> result;
    for (int i = 0; i < kWarpLanes; ++i)
      block->shared.read(address(index[i], 1), sizeof(T), &result[i], block->actor(warp, i));
    return result;
  }
  void store(const Lane<int>& index, const std::type_identity_t<Lane<T>>& value, const Lane<bool>& where) const {
    for (int i = 0; i < kWarpLanes; ++i)
      if (where[i]) block->shared.write(address(index[i], 1), sizeof(T), &value[i], block->actor(warp, i));
  }
  void copy_async(int lane, int index, const T* from) const {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) throw std::runtime_error("cp.async from an unaligned address");
    block->begin_copy(warp, lane, address(index, 16 / sizeof(T)), from);
  }
};

struct Warp {
  HostBlock* block;
  int warp;

  int index() const { return warp; }
  int count() const { return block->warps(); }
  int block_x() const { return block->index.x; }
  int block_y() const { return block->index.y; }
  int block_z() const { return block->index.z; }
  void barrier() const { block->barrier(); }
  void sync() const { block->sync_warp(warp); }
  void commit_copies() const { block->commit_copies(warp); }
  template <int kPending>
  void wait_copies() const {
    block->wait_copies(warp, kPending);
  }
  template <class T>
  Shared<T> shared(int byte_offset, int count) const {
    return {block, warp, byte_offset, count};
  }
};

#endif

// Begins to copy 16 bytes in every lane: from `from`, which may be read in any case, or zeros where not `there`.
template <class T>
TORUS_DEVICE void copy_async(const Shared<T>& to, const Lane<int>& index, const Lane<const T*>& from,
                             const Lane<bool>& there) {
#if defined(__CUDACC__)
  to.copy_async(index, from, there);
#else
  for (int i = 0; i < kWarpLanes; ++i) to.copy_async(i, index[i], there[i] ? from[i] : nullptr);
#endif
}

}  // namespace torus::cuda
