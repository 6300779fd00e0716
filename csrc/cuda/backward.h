// What the kernels of the backward share. With P_s the normalised weights, dP = d_out . v and alpha folded into g:
// delta_s = sum_t' P_s dP and dS = sum_s g_s P_s (dP - delta_s); d_q = scale dS k, d_k = scale dS^T q,
// d_v = sum_s g_s P_s^T d_out. Queries come first and leave delta and the gates to the kernel of the keys.
//
// dS is multiplied as two numbers of 16 bits: rounded once, the gradients of a query would no longer sum to zero, which
// keys with a large common part show in d_q.
#pragma once

#include "scores.h"

namespace torus::cuda {

constexpr int kChunkTiles = 2;                         // sums side by side in the backward
constexpr int kChunkRows = kChunkTiles * kColumns;     // others that they stand for
static_assert(kChunkRows == kDepth, "a chunk of others is the depth of one product");

// Numbers of query rows between kernels: [query heads of the launch, T, 8] each.
struct RowSums {
  float* delta;
  float* gate;   // alpha g_s over the sum of P_s, which the rounding of lse leaves off 1
  float* decay;  // sum rho^2 dS_s

  static TORUS_DEVICE Lane<int64_t> at(const Operands& in, const Head& head, const Lane<int>& token, int stream) {
    const Lane<int64_t> row = index_of(token) + int64_t{1} * head.local * in.seq_len;
    return row * int64_t{kNumStreams} + static_cast<int64_t>(stream);
  }
};

struct BackwardArguments {
  Operands in;
  const float* lse;            // [B, H, T, 8]
  RowSums rows;
  float *d_q, *d_k, *d_v;      // [heads of the launch, T, head_dim], between families
  Tokens d_q_out, d_k_out, d_v_out;
};

TORUS_DEVICE Lane<float> load_lse2(const BackwardArguments& arguments, const Head& head, const Lane<int>& token,
                                   int stream) {
  const Operands& in = arguments.in;
  const Lane<int64_t> row = index_of(token) + (head.batch * in.heads.query + head.query) * in.seq_len;
  return load(arguments.lse, row * int64_t{kNumStreams} + static_cast<int64_t>(stream), token >= 0, 0.0f) * kLog2e;
}

// out += (two parts of sums) * rows row0 ... + 15 of others
template <class E, int D>
TORUS_DEVICE void multiply_gradients(Sum (&out)[D / kColumns], const Sum (&sums)[kChunkTiles], const Tile<E, D>& others,
                                     int row0) {
  const Left<E> rounded = left_of<E>(sums[0], sums[1]);
  const Left<E> residual = residual_of<E>(sums[0], sums[1], rounded);
  TORUS_UNROLL
  for (int t = 0; t < D / kColumns; t += 2) {
    Right<E> right[2];
    others.right_of_depth(row0, t * kColumns, right);
    TORUS_UNROLL
    for (int i = 0; i < 2; ++i) {
      multiply(out[t + i], rounded, right[i]);
      multiply(out[t + i], residual, right[i]);
    }
  }
}

// Sums of rows [16, D] times a factor, into a workspace or, once complete, into rows of E.
template <class E, int D>
TORUS_DEVICE void write_gradient(const Operands& in, float* workspace, E* rows, int64_t stride, const OwnRows& own,
                                 const Sum (&sums)[D / kColumns], float factor) {
  add_rows<D>(in, workspace, own.token, sums,
              [&](int, const Lane<int>& token, const Lane<int>& pair, const Lane<bool>& where, const Lane<float>& low,
                  const Lane<float>& high) {
                store_pair(rows, pair_index(token, stride, pair), low * factor, high * factor, where);
              });
}

template <int D>
TORUS_DEVICE void zero_sums(Sum (&sums)[D]) {
  TORUS_UNROLL
  for (int t = 0; t < D; ++t) sums[t] = zero_sum();
}

}  // namespace torus::cuda
