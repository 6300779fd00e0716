// Gradients of weights, decay, alpha and state from the sums that query rows have left, token by token; where
// parameters are per head, sums over tokens and over the batch in a fixed order.
#pragma once

#include "backward.h"

namespace torus::cuda {

constexpr int kTokensOfWarp = 64;
// Sums of a head's parameters, a lane each: d_weights, sum rho^2 dS, d_alpha.
constexpr int kDecayLane = kNumStreams, kAlphaLane = 2 * kNumStreams;

struct ParameterArguments {
  Operands in;
  int64_t streams;  // mask of those that take part
  RowSums rows;
  Tokens d_state;
  float *d_weights, *d_alpha;  // where they are per token, else null
  float* partials;             // [B * H, warps of a head, 32]
};

template <class E>
struct TokenGradientsKernel {
  using Arguments = ParameterArguments;
  static constexpr const char* kName = "attention_backward_tokens";
  static constexpr int kMaxWarps = 4;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const Operands& in = arguments.in;
    const Head head = query_head(in, warp.block_y());
    const int64_t global = place_in_batch(in, head);
    const int slot = warp.block_x() * warp.count() + warp.index();
    const bool compounds = in.state.data != nullptr;
    const E* const d_out = rows_of<const E>(in.d_out, head.batch, head.query);
    const E* const state = rows_of<const E>(in.state, head.batch, head.query);
    E* const d_state = rows_of<E>(arguments.d_state, head.batch, head.query);
    const Lane<int> lane = lane_index();
    const Lane<int> stream = lane % kNumStreams;
    const auto is_present = [&](int s) { return (arguments.streams >> s & 1) != 0; };
    const Lane<bool> present = map(is_present, stream), of_weights = lane < kNumStreams;

    Lane<float> sums = 0.0f;
    const int first = slot * kTokensOfWarp;
    for (int t = first; t < in.seq_len && t < first + kTokensOfWarp; ++t) {
      const int64_t row = int64_t{1} * head.local * in.seq_len + t;
      const Lane<int64_t> at = cast<int64_t>(stream) + row * kNumStreams;
      const Lane<float> delta = load(arguments.rows.delta, at, present && of_weights, 0.0f);
      const Lane<float> decay = load(arguments.rows.decay, at, present && !of_weights && lane < kAlphaLane, 0.0f);
      const float* const weights = static_cast<const float*>(in.weights.data) + head.batch * in.weights.batch +
                                   head.query * in.weights.head + t * in.weights.token;
      const Lane<float> weight = load(weights, cast<int64_t>(stream), present && of_weights, 0.0f);
      const Lane<float> alpha = compounds ? load_parameter(in.alpha, head, Lane<int>(t), 0) : Lane<float>(1.0f);
      const Lane<float> d_weight = alpha * delta;
      if (arguments.d_weights != nullptr)
        store(arguments.d_weights, cast<int64_t>(lane) + (global * in.seq_len + t) * int64_t{kNumStreams}, d_weight,
              of_weights);
      sums = sums + select(of_weights, d_weight, decay);
      if (!compounds) continue;

      Lane<float> products = select(of_weights, weight * delta, 0.0f);
      for (int column = 0; column < in.head_dim; column += 2 * kWarpLanes) {
        const Lane<int> pair = lane + column / 2;
        const Lane<bool> where = lane * 2 + column < in.head_dim;
        const Lane<uint32_t> gradient = load_pair(d_out, pair_index(t, in.d_out.token, pair), where);
        const Lane<uint32_t> before = load_pair(state, pair_index(t, in.state.token, pair), where);
        const auto product = [](uint32_t x, uint32_t y) {
          return low_of<E>(x) * low_of<E>(y) + high_of<E>(x) * high_of<E>(y);
        };
        products = products - map(product, gradient, before);
        const auto keep_low = [](float rate, uint32_t x) { return low_of<E>(x) - rate * low_of<E>(x); };
        const auto keep_high = [](float rate, uint32_t x) { return high_of<E>(x) - rate * high_of<E>(x); };
        store_pair(d_state, pair_index(t, arguments.d_state.token, pair), map(keep_low, alpha, gradient),
                   map(keep_high, alpha, gradient), where);
      }
      const Lane<float> d_alpha = sum_of_lanes(products);
      if (arguments.d_alpha != nullptr)
        store(arguments.d_alpha, Lane<int64_t>(global * in.seq_len + t), d_alpha, lane == 0);
      sums = sums + select(lane == kAlphaLane, d_alpha, 0.0f);
    }
    const int64_t warps = warps_of_head(in.seq_len);
    store(arguments.partials, cast<int64_t>(lane) + (global * warps + slot) * int64_t{kWarpLanes}, sums, slot < warps);
  }

  static TORUS_INLINE constexpr int64_t warps_of_head(int64_t seq_len) { return ceil_div(seq_len, kTokensOfWarp); }
};

struct ReduceKernel {
  struct Arguments {
    int64_t batch, heads, warps;
    const float* partials;  // [batch * heads, warps, 32]
    float *d_weights, *d_decay, *d_alpha;  // [H, 8], [H, 8], [H]; null where there is none per head
  };
  static constexpr const char* kName = "attention_backward_parameters";
  static constexpr int kMaxWarps = 1;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const int64_t h = warp.block_x();
    const Lane<int> lane = lane_index();
    Lane<double> total = 0.0;
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t w = 0; w < a.warps; ++w) {
        const int64_t first = ((b * a.heads + h) * a.warps + w) * kWarpLanes;
        total = total + cast<double>(load(a.partials, cast<int64_t>(lane) + first));
      }
    const Lane<float> sum = cast<float>(total);
    const Lane<int64_t> stream = cast<int64_t>(lane % kNumStreams) + h * int64_t{kNumStreams};
    if (a.d_weights != nullptr) store(a.d_weights, stream, sum, lane < kDecayLane);
    store(a.d_decay, stream, sum * -0.5f, lane >= kDecayLane && lane < kAlphaLane);
    if (a.d_alpha != nullptr) store(a.d_alpha, Lane<int64_t>(h), sum, lane == kAlphaLane);
  }
};

}  // namespace torus::cuda
