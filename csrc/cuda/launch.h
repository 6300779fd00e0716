// Launches a kernel: a type with `Arguments`, a name, kMaxWarps, and static run(warp, arguments), which one warp runs.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "warp.h"

namespace torus::cuda {

struct Grid {
  int64_t x, y = 1, z = 1;
};

inline std::string describe(const char* name, Grid grid, int warps, int shared_bytes) {
  return std::string("kernel ") + name + " (grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
         std::to_string(grid.z) + ", " + std::to_string(warps) + " warps a block, " + std::to_string(shared_bytes) +
         " bytes of shared memory)";
}

#if defined(__CUDACC__)

// Blocks that a multiprocessor has room for: what it takes for 255 registers a thread, rather than spills for the sake
// of more blocks, unless the kernel says otherwise.
template <class Kernel>
constexpr int min_blocks() {
  if constexpr (requires { Kernel::kMinBlocks; }) return Kernel::kMinBlocks;
  return 2;
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMaxWarps* kWarpLanes, min_blocks<Kernel>())
    entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  Kernel::run(Warp{}, arguments);
}

inline void check(cudaError_t error, const char* name, Grid grid, int warps, int shared_bytes) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(describe(name, grid, warps, shared_bytes) + ": " + cudaGetErrorString(error));
}

template <class Kernel>
void launch(Grid grid, int warps, int shared_bytes, const Device& device,
            const typename Kernel::Arguments& arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int kWithoutOptIn = 48 << 10;
  if (shared_bytes > kWithoutOptIn)
    check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          Kernel::kName, grid, warps, shared_bytes);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  entry<Kernel><<<blocks, warps * kWarpLanes, shared_bytes, static_cast<cudaStream_t>(device.stream)>>>(arguments);
  check(cudaGetLastError(), Kernel::kName, grid, warps, shared_bytes);
}

#else

template <class Kernel>
void launch(Grid grid, int warps, int shared_bytes, const Device&, const typename Kernel::Arguments& arguments) {
  try {
    HostBlock block(warps, shared_bytes);
    for (int z = 0; z < grid.z; ++z)
      for (int y = 0; y < grid.y; ++y)
        for (int x = 0; x < grid.x; ++x)
          block.run({x, y, z}, [&](int warp) { Kernel::run(Warp{&block, warp}, arguments); });
  } catch (const std::exception& error) {
    throw std::runtime_error(describe(Kernel::kName, grid, warps, shared_bytes) + ": " + error.what());
  }
}

#endif

}  // namespace torus::cuda
