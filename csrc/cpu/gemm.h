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

// One product, as the register tiles see it.
template <class T>
struct Product {
  Operand<T> a;
  const T* b;
  int64_t ldb;
  Result<T> c;
  int64_t depth;
};

template <class T, int LANES, int ROWS, int VECS>
TORUS_INLINE void tile(const Product<T>& p, const T* a, T* c) {
  using V = Vec<T, LANES>;
  // A small tile takes turns among several sets of accumulators, so that its sums do not wait for one another.
  constexpr int chains = ROWS * VECS >= 8 ? 1 : ROWS * VECS >= 4 ? 2 : 4;
  V acc[chains][ROWS][VECS];
#pragma GCC unroll 4
  for (int i = 0; i < chains; ++i)
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) acc[i][r][v] = V{};
  // Two moving pointers and a few fixed offsets address every row: there are too few registers for a pointer each.
  const T* even = a;
  const T* odd = a + p.a.row.inner;
  const T* b = p.b;
  const int64_t ldb = p.ldb, depth = p.depth;
  int64_t offset[ROWS / 2 + 1];
#pragma GCC unroll 8
  for (int pair = 0; pair <= ROWS / 2; ++pair) offset[pair] = pair * p.a.row.outer;
  const auto step = [&](int chain, int64_t advance) __attribute__((always_inline)) {
    V line[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) line[v] = load<LANES>(b + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      // Named, because GCC 12 under UBSan evaluates the subscript of (r % 2 ? odd : even)[..] for one of the two only.
      const T* const row = r % 2 ? odd : even;
      const V x = splat<V>(row[offset[r / 2]]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) acc[chain][r][v] += x * line[v];
    }
    b += ldb;
    even += advance;
    odd += advance;
  };
  const int64_t within = p.a.col.inner, across = p.a.col.outer - p.a.col.inner;
  int64_t k = 0;
  if constexpr (chains == 4) {
    for (; k + 3 < depth; k += 4) {
      step(0, within);
      step(1, across);
      step(2, within);
      step(3, across);
    }
  }
  for (; k + 1 < depth; k += 2) {
    step(0, within);
    step(chains > 1, across);
  }
  if (depth & 1) step(0, within);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    T* out = c + (r / 2) * p.c.row.outer + (r % 2) * p.c.row.inner;
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      V x = acc[0][r][v];
#pragma GCC unroll 4
      for (int i = 1; i < chains; ++i) x += acc[i][r][v];
      if (p.c.accumulate) x += load<LANES>(out + v * LANES);
      store(out + v * LANES, x);
    }
  }
}

template <class T, int LANES, int ROWS, int VECS>
__attribute__((noinline)) void tiles(const Product<T>& p, int64_t rows, const T* a, T* c) {
  for (; rows >= ROWS; rows -= ROWS) {
    tile<T, LANES, ROWS, VECS>(p, a, c);
    a += ROWS / 2 * p.a.row.outer;
    c += ROWS / 2 * p.c.row.outer;
  }
  if constexpr (ROWS > 1) {
    // Narrow tiles are the cross flows', whose rows are pairs in any number.
    constexpr int fewer = VECS == 1 && ROWS > 2 ? ROWS - 2 : ROWS > 8 ? 8 : ROWS > 4 ? 4 : ROWS > 2 ? 2 : 1;
    if (rows > 0) tiles<T, LANES, fewer, VECS>(p, rows, a, c);
  }
}

// A panel of the result, `vecs` vectors wide.
template <class T, int VECS>
TORUS_INLINE void panel(int vecs, const Product<T>& p, int64_t rows) {
  if (vecs == VECS) {
    tiles<T, kLanes<T>, tile_rows(VECS), VECS>(p, rows, p.a.data, p.c.data);
  } else if constexpr (VECS > 1) {
    panel<T, VECS - 1>(vecs, p, rows);
  }
}

// `cols` is a multiple of half a vector.
template <class T>
TORUS_INLINE void gemm(int64_t rows, int64_t cols, int64_t depth, const Operand<T>& a, const T* b, int64_t ldb,
                       const Result<T>& c) {
  constexpr int lanes = kLanes<T>;
  Product<T> p{a, b, ldb, c, depth};
  while (cols >= lanes) {
    const int64_t left = cols / lanes;
    // A last panel of one vector reuses little: split the last five vectors 3 + 2, not 4 + 1.
    const int vecs = left == kMaxTileVecs + 1 ? kMaxTileVecs - 1 : static_cast<int>(min_of(left, kMaxTileVecs));
    panel<T, kMaxTileVecs>(vecs, p, rows);
    p.b += vecs * lanes;
    p.c.data += vecs * lanes;
    cols -= vecs * lanes;
  }
  if (cols > 0) tiles<T, kHalfLanes<T>, tile_rows(1), 1>(p, rows, p.a.data, p.c.data);
}

}  // namespace torus::TORUS_ISA
