// What the kernels of the backward share. With P_s the normalised weights, dP = d_out . v and alpha folded into g:
// delta_s = sum_t' P_s dP and dS = sum_s g_s P_s (dP - delta_s); d_q = scale dS k, d_k = scale dS^T q,
// d_v = sum_s g_s P_s^T d_out. Queries come first and leave delta and the gates to the kernel of the keys.
//
// dS is multiplied with keys as two numbers of 16 bits: rounded once, the gradients of a query would no longer sum to
// zero, which keys with a large common part show in d_q.
#pragma once

#include "chunks.h"

namespace torus::cuda {

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
  const Lane<int64_t> row = index_of(token) + place_in_batch(in, head) * in.seq_len;
  return load(arguments.lse, row * int64_t{kNumStreams} + static_cast<int64_t>(stream), token >= 0, 0.0f) * kLog2e;
}

// What sixteen queries have of one stream, in a lane's two rows: first the sums of which delta is made, then what the
// score gradients take.
struct QuerySums {
  Lane<float> lse2[2];
  Lane<float> total[2], products[2];    // sum P_s, which lse's rounding leaves off 1, and sum P_s dP
  Lane<float> gate[2], gated_delta[2];  // alpha g_s over the total, and times delta
  Lane<float> decay[2];                 // sum rho^2 dS_s

  TORUS_DEVICE void begin(const BackwardArguments& arguments, const Head& head, const Lane<int> (&token)[2],
                          int stream) {
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      lse2[half] = load_lse2(arguments, head, token[half], stream);
      total[half] = products[half] = decay[half] = 0.0f;
    }
  }
  // Delta and the gate: for the score gradients, and for the kernels to come.
  TORUS_DEVICE void finish_delta(const BackwardArguments& arguments, const Head& head, const Lane<int> (&token)[2],
                                 int stream) {
    const Operands& in = arguments.in;
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Lane<float> alpha =
          in.alpha.data != nullptr ? load_parameter(in.alpha, head, token[half], 0) : Lane<float>(1.0f);
      const Lane<float> sum = quad_sum(total[half]), delta = quad_sum(products[half]) / sum;
      gate[half] = load_parameter(in.weights, head, token[half], stream) * alpha / sum;
      gated_delta[half] = gate[half] * delta;
      const Lane<int64_t> at = RowSums::at(in, head, token[half], stream);
      const Lane<bool> where = token[half] >= 0 && fragment_member() == 0;
      store(arguments.rows.delta, at, delta, where);
      store(arguments.rows.gate, at, gate[half], where);
    }
  }
  TORUS_DEVICE void finish_decay(const BackwardArguments& arguments, const Head& head, const Lane<int> (&token)[2],
                                 int stream) const {
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half)
      store(arguments.rows.decay, RowSums::at(arguments.in, head, token[half], stream), quad_sum(decay[half]),
            token[half] >= 0 && fragment_member() == 0);
  }
};

// out += (two parts of sums) * rows row0 ... + 15 of others
template <class E, int D, class Others>
TORUS_DEVICE void multiply_gradients(Sum (&out)[D / kColumns], const Sum (&sums)[kChunkTiles], const Others& others,
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
TORUS_DEVICE void write_gradient(const Operands& in, float* workspace, E* rows, int64_t stride,
                                 const Lane<int> (&token)[2], const Sum (&sums)[D / kColumns], float factor) {
  add_rows<D>(in, workspace, token, sums, [&](const Sum (&total)[D / kColumns]) {
    for_each_pair<D>(in, token, stride, [&](int half, int t, const Lane<int64_t>& at, const Lane<bool>& where) {
      store_pair(rows, at, total[t].value[2 * half] * factor, total[t].value[2 * half + 1] * factor, where);
    });
  });
}

}  // namespace torus::cuda
