// Products of tiles, and the operands that this machine's instructions want for them.
//
// A kernel is written once against these few verbs: `turn` and `stack` make right operands of rows of tokens, whose
// depth is the head dimension or the tokens; `by_query` and `by_key` make left operands of a tile of probabilities,
// which is stored by key; `multiply` multiplies.
#pragma once

#include "gemm.h"
#include "pack.h"

namespace torus::TORUS_ISA {

// Operands in the compute type and the vector units: everything is used where it lies, but for `turn`.
template <class T>
struct VectorProducts {
  using Compute = T;
  using Element = T;  // of tokens and probabilities
  using Unit = T;     // of right operands
  using Left = Operand<T>;

  static constexpr int64_t kGrain = 1;                 // rows and depths are padded to multiples of it
  static constexpr int64_t kLanesOfDim = kLanes<T>;    // head dimensions likewise
  static constexpr int64_t kDense = kVectorRegisters == 32 ? 2 * kLanes<T> : 3 * kLanes<T>;  // queries of a tile
  static constexpr int64_t kBanded = kLanes<T> < 16 ? 16 : kLanes<T>;  // where keys are a band around the queries
  struct Session {};

  // Score gradients are multiplied in so many parts, each what the operands' type left of the one before.
  static constexpr int kGradientParts = 1;
  static TORUS_INLINE void keep_residual(T*, int64_t) {}
  static constexpr int64_t kPerUnit = 1;  // numbers of the depth in a unit of a right operand

  static TORUS_INLINE int64_t units_of_depth(int64_t depth) { return depth; }

  // rows [n, dp], n a multiple of a vector -> [dp, ld].
  template <class Rows>
  static TORUS_INLINE void turn(const Rows& rows, int64_t n, int64_t dp, T* turned, int64_t ld) {
    for (int64_t i = 0; i < n; i += kLanes<T>)
      for (int64_t d = 0; d < dp; d += kLanes<T>)
        transpose_block<T>([&](int64_t r) { return rows.at(i + r) + d; }, turned + d * ld + i, ld);
  }

  // rows [n, dp] as they are; the buffer is not needed.
  static TORUS_INLINE TokenRows<T> stack(const TokenRows<T>& rows, int64_t, int64_t, T*) { return rows; }

  static TORUS_INLINE Left left(const TokenRows<T>& rows) { return {rows.data, every(rows.stride), every(1)}; }
  static TORUS_INLINE Left by_query(const T* tile, int64_t, int64_t ld, T*) { return {tile, every(1), every(ld)}; }
  static TORUS_INLINE Left by_key(const T* tile, int64_t, int64_t ld, T*) { return {tile, every(ld), every(1)}; }

  static TORUS_INLINE void multiply(int64_t rows, int64_t cols, int64_t depth, const Left& a, const T* b, int64_t ldb,
                                    T* c, int64_t ldc, bool accumulate) {
    gemm<T>(rows, cols, depth, a, b, ldb, {c, every(ldc), accumulate});
  }
};

}  // namespace torus::TORUS_ISA
