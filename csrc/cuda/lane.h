// Warp-level code that runs on a GPU and on a CPU: a Lane<T> is a T on the device and the 32 of a warp on the host, so
// that shuffles and matrix instructions are plain loops there. Kernels are written for one warp: branches are taken by
// whole warps, what differs between lanes goes through `select`, `map` and masked loads and stores.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../lattice.h"

#if !defined(__CUDACC__)
#include "host/lane.h"
#endif

#if defined(__CUDACC__)
#define TORUS_DEVICE __device__ __forceinline__
#define TORUS_PRAGMA(text) _Pragma(#text)
#define TORUS_UNROLL TORUS_PRAGMA(unroll)
#define TORUS_UNROLL_BY(turns) TORUS_PRAGMA(unroll turns)
#else
#define TORUS_DEVICE inline
#define TORUS_UNROLL
#define TORUS_UNROLL_BY(turns)
#endif

namespace torus::cuda {

constexpr int kWarpLanes = 32;

#if defined(__CUDACC__)

template <class T>
using Lane = T;

TORUS_DEVICE int lane_index() { return threadIdx.x % kWarpLanes; }

template <class T>
TORUS_DEVICE T select(bool condition, T chosen, std::type_identity_t<T> otherwise) {
  return condition ? chosen : otherwise;
}

// function(x...) in every lane.
template <class Function, class... T>
TORUS_DEVICE auto map(Function function, T... x) {
  return function(x...);
}

template <class To, class T>
TORUS_DEVICE To cast(T x) {
  return static_cast<To>(x);
}

template <class T>
TORUS_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// x of lane `source`, which may be another one in every lane.
template <class T>
TORUS_DEVICE T shuffle(T x, int source) {
  return __shfl_sync(0xffffffffu, x, source);
}

TORUS_DEVICE bool any(bool condition) { return __any_sync(0xffffffffu, condition); }

// Global memory: base[index] where `where`, else `otherwise`.
template <class T>
TORUS_DEVICE T load(const T* base, int64_t index) {
  return base[index];
}
template <class T>
TORUS_DEVICE T load(const T* base, int64_t index, bool where, std::type_identity_t<T> otherwise) {
  return where ? base[index] : otherwise;
}
template <class T>
TORUS_DEVICE void store(T* base, int64_t index, std::type_identity_t<T> value, bool where) {
  if (where) base[index] = value;
}

// 2^x and log2(x), to about two units in the last place; subnormal results are zero.
TORUS_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TORUS_DEVICE float log2_of(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x, to about one unit in the last place; subnormal numbers are zero.
TORUS_DEVICE float reciprocal_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TORUS_DEVICE float max_of_floats(float a, float b) { return fmaxf(a, b); }
// x * y + z rounded once, for what must be the same to the bit in every kernel: elsewhere the compiler may choose.
TORUS_DEVICE float multiply_add(float x, float y, float z) { return __fmaf_rn(x, y, z); }

#endif

// Sum over all lanes, the same in every lane, in a fixed order.
template <class T>
TORUS_DEVICE T sum_of_lanes(T x) {
  for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) x = x + shuffle_xor(x, mask);
  return x;
}

}  // namespace torus::cuda
