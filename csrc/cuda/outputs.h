// What the kernels of the forward write.
#pragma once

#include "scores.h"

namespace torus::cuda {

struct ForwardArguments {
  Operands in;
  Tokens out;
  float* lse;      // [B, H, T, 8] or null
  float* entropy;  // likewise
  float* y;        // [heads of the launch, T, head_dim], between families
};

// Softmax of a stream in base 2, of a lane's two rows. Totals and spreads are of this lane's columns, until `finish`.
struct SoftmaxSums {
  Lane<float> maximum[2], total[2];  // the maximum of chunks is known when they are finished
  Lane<float> spread[2];  // sum e (x - maximum), what keys add to the entropy

  TORUS_DEVICE SoftmaxSums() {
    for (int half = 0; half < 2; ++half) maximum[half] = kNegativeInfinity, total[half] = spread[half] = 0.0f;
  }

  // Sums of all columns, the same in the four lanes of a row.
  TORUS_DEVICE void finish() {
    for (int half = 0; half < 2; ++half) {
      maximum[half] = anchor(maximum[half]);
      total[half] = quad_sum(total[half]);
      spread[half] = quad_sum(spread[half]);
    }
  }
};

// y += g_s O_s of the schedule's stream k, from a product with V that is not yet normalised.
template <int D>
TORUS_DEVICE void mix_stream(const Operands& in, const Head& head, const Lane<int> (&token)[2], int k,
                             const SoftmaxSums& sums, const Sum (&out)[D / kColumns], Sum (&y)[D / kColumns]) {
  Lane<float> factor[2];
  TORUS_UNROLL
  for (int half = 0; half < 2; ++half)
    factor[half] =
        load_parameter(in.weights, head, token[half], in.schedule.stream[k]) * reciprocal_of(sums.total[half]);
  TORUS_UNROLL
  for (int t = 0; t < D / kColumns; ++t)
    TORUS_UNROLL
    for (int i = 0; i < 4; ++i) y[t].value[i] = y[t].value[i] + out[t].value[i] * factor[i / 2];
}

// lse and entropy of the schedule's stream k.
TORUS_DEVICE void write_statistics(const ForwardArguments& arguments, const Head& head, const Lane<int> (&token)[2],
                                   int k, const SoftmaxSums& sums) {
  const Operands& in = arguments.in;
  if (arguments.lse == nullptr && arguments.entropy == nullptr) return;
  const int64_t first = place_in_batch(in, head) * in.seq_len;
  TORUS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Lane<bool> where = token[half] >= 0 && fragment_member() == 0;
    const Lane<int64_t> row = (index_of(token[half]) + first) * int64_t{kNumStreams};
    const Lane<int64_t> at = row + static_cast<int64_t>(in.schedule.stream[k]);
    const Lane<float> log_total = log2_of(sums.total[half]);
    if (arguments.lse != nullptr) store(arguments.lse, at, (sums.maximum[half] + log_total) * kLn2, where);
    if (arguments.entropy == nullptr) continue;
    const Lane<float> nats = (log_total - sums.spread[half] * reciprocal_of(sums.total[half])) * kLn2;
    store(arguments.entropy, at, select(nats < 0.0f, Lane<float>(0.0f), nats), where);
  }
}

// Adds y to what earlier families left; the last one mixes in the EMA state and rounds.
template <class E, int D>
TORUS_DEVICE void write_outputs(const ForwardArguments& arguments, const Head& head, const Lane<int> (&token)[2],
                                const Sum (&y)[D / kColumns]) {
  const Operands& in = arguments.in;
  add_rows<D>(in, arguments.y + head.local * in.tokens(), token, y, [&](Sum (&total)[D / kColumns]) {
    if (in.state.data != nullptr) {
      const E* const state = rows_of<const E>(in.state, head.batch, head.query);
      const Lane<float> alpha[2] = {load_parameter(in.alpha, head, token[0], 0),
                                    load_parameter(in.alpha, head, token[1], 0)};
      for_each_pair<D>(in, token, in.state.token,
                       [&](int half, int t, const Lane<int64_t>& at, const Lane<bool>& where) {
                         const auto mix = [&](Lane<float>& x, const Lane<float>& before) {
                           x = before + alpha[half] * (x - before);
                         };
                         const auto before = load_pair(state, at, where);
                         mix(total[t].value[2 * half], map([](uint32_t x) { return low_of<E>(x); }, before));
                         mix(total[t].value[2 * half + 1], map([](uint32_t x) { return high_of<E>(x); }, before));
                       });
    }
    E* const out = rows_of<E>(arguments.out, head.batch, head.query);
    for_each_pair<D>(in, token, arguments.out.token,
                     [&](int half, int t, const Lane<int64_t>& at, const Lane<bool>& where) {
                       store_pair(out, at, total[t].value[2 * half], total[t].value[2 * half + 1], where);
                     });
  });
}

}  // namespace torus::cuda
