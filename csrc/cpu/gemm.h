// The one microkernel: C[rows x cols] (+)= A[rows x depth] * B[depth x cols], with A broadcast element by element and
// B and C read by rows. Every matrix product of the forward and the backward is one of its calls: a transposed A is a
// matter of strides, a transposed B is packed once.
#pragma once

#include "vec.h"

namespace torus::TORUS_ISA {

// Strides of indices that come in pairs: a cross flow's rows are pairs of neighbouring queries.
struct PairStride {
  int64_t outer, inner;
  TORUS_INLINE int64_t at(int64_t i) const { return (i >> 1) * outer + (i & 1) * inner; }
};
TORUS_INLINE PairStride every(int64_t stride) { return {2 * stride, stride}; }

template <class T>
struct Operand {
  const T* data;
  PairStride row, col;
};

template <class T>
struct Result {
  T* data;
  PairStride row;
  bool accumulate;
};

// Rows of a register tile `vecs` vectors wide: the accumulators, one row of B and a broadcast fill the registers.
// Even, so that every tile starts at the first of a pair.
constexpr int tile_rows(int vecs) {
  if (kVectorRegisters == 32) return vecs == 4 ? 6 : vecs == 3 ? 8 : vecs == 2 ? 12 : 14;
  return vecs == 3 ? 4 : vecs == 2 ? 6 : 12;
}
constexpr int kMaxTileVecs = kVectorRegisters == 32 ? 4 : 3;

template <class T, int LANES, int ROWS, int VECS>
TORUS_INLINE void tile(Operand<T> a, const T* b, int64_t ldb, Result<T> c, int64_t depth) {
  using V = Vec<T, LANES>;
  V acc[ROWS][VECS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) acc[r][v] = V{};
  // Two moving pointers and a few fixed offsets address every row: there are too few registers for a pointer each.
  const T* even = a.data;
  const T* odd = a.data + a.row.inner;
  int64_t offset[ROWS / 2 + 1];
#pragma GCC unroll 8
  for (int pair = 0; pair <= ROWS / 2; ++pair) offset[pair] = pair * a.row.outer;
  const auto step = [&](int64_t advance) __attribute__((always_inline)) {
    V line[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) line[v] = load<LANES>(b + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const V x = splat<V>((r % 2 ? odd : even)[offset[r / 2]]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) acc[r][v] += x * line[v];
    }
    b += ldb;
    even += advance;
    odd += advance;
  };
  const int64_t within = a.col.inner, across = a.col.outer - a.col.inner;
  for (int64_t k = 0; k + 1 < depth; k += 2) {
    step(within);
    step(across);
  }
  if (depth & 1) step(within);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    T* out = c.data + (r / 2) * c.row.outer + (r % 2) * c.row.inner;
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      V x = acc[r][v];
      if (c.accumulate) x += load<LANES>(out + v * LANES);
      store(out + v * LANES, x);
    }
  }
}

template <class T, int LANES, int ROWS, int VECS>
__attribute__((noinline)) void tiles(int64_t rows, Operand<T> a, const T* b, int64_t ldb, Result<T> c, int64_t depth) {
  for (; rows >= ROWS; rows -= ROWS) {
    tile<T, LANES, ROWS, VECS>(a, b, ldb, c, depth);
    a.data += ROWS / 2 * a.row.outer;
    c.data += ROWS / 2 * c.row.outer;
  }
  if constexpr (ROWS > 1) {
    constexpr int fewer = ROWS > 8 ? 8 : ROWS > 4 ? 4 : ROWS > 2 ? 2 : 1;
    if (rows > 0) tiles<T, LANES, fewer, VECS>(rows, a, b, ldb, c, depth);
  }
}

// A panel of the result, `vecs` vectors wide.
template <class T, int VECS>
TORUS_INLINE void panel(int vecs, const Operand<T>& a, int64_t rows, const T* b, int64_t ldb, const Result<T>& c,
                        int64_t depth) {
  if (vecs == VECS) {
    tiles<T, kLanes<T>, tile_rows(VECS), VECS>(rows, a, b, ldb, c, depth);
  } else if constexpr (VECS > 1) {
    panel<T, VECS - 1>(vecs, a, rows, b, ldb, c, depth);
  }
}

// `cols` is a multiple of half a vector.
template <class T>
TORUS_INLINE void gemm(int64_t rows, int64_t cols, int64_t depth, const Operand<T>& a, const T* b, int64_t ldb,
                       Result<T> c) {
  constexpr int lanes = kLanes<T>;
  while (cols >= lanes) {
    const int64_t left = cols / lanes;
    // A last panel of one vector reuses little: split the last five vectors 3 + 2, not 4 + 1.
    const int vecs = left == kMaxTileVecs + 1 ? kMaxTileVecs - 1 : static_cast<int>(min_of(left, kMaxTileVecs));
    panel<T, kMaxTileVecs>(vecs, a, rows, b, ldb, c, depth);
    b += vecs * lanes;
    c.data += vecs * lanes;
    cols -= vecs * lanes;
  }
  if (cols > 0) tiles<T, kHalfLanes<T>, tile_rows(1), 1>(rows, a, b, ldb, c, depth);
}

}  // namespace torus::TORUS_ISA
