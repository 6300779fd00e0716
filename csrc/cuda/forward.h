// Forward of one family of lines, or of the cross flows: y += sum_s g_s O_s for sixteen queries a warp, in two passes over
// their keys. The first finds every stream's own maximum and normaliser; the second forms sum_s g_s P_s, one product with V
// for all streams. The last to run mixes in the EMA state and rounds.
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

// One softmax of a lane's two rows, in base 2: of this lane's columns, until `merge`.
struct RunningSoftmax {
  Lane<float> maximum[2], total[2];

  TORUS_DEVICE RunningSoftmax() {
    for (int half = 0; half < 2; ++half) maximum[half] = kNegativeInfinity, total[half] = 0.0f;
  }

  template <int kTiles>
  TORUS_DEVICE void add(const Sum (&scores)[kTiles], const Diagonals<kTiles>& bias, float scale2) {
TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      Lane<float> x[kTiles][2], highest = maximum[half];
TORUS_UNROLL
      for (int t = 0; t < kTiles; ++t)
TORUS_UNROLL
        for (int i = 0; i < 2; ++i) {
          x[t][i] = scores[t].value[2 * half + i] * scale2 + bias.at(t, half, i);
          highest = max_of_floats(highest, x[t][i]);
        }
      const Lane<float> from = anchor(highest);
      Lane<float> sum = total[half] * exp2_of(maximum[half] - from);
TORUS_UNROLL
      for (int t = 0; t < kTiles; ++t)
TORUS_UNROLL
        for (int i = 0; i < 2; ++i) sum = sum + exp2_of(x[t][i] - from);
      maximum[half] = highest, total[half] = sum;
    }
  }

  // Of all columns, the same in the four lanes of a row; the maximum is anchored.
  TORUS_DEVICE void merge() {
    for (int half = 0; half < 2; ++half) {
      const Lane<float> from = anchor(quad_maximum(maximum[half]));
      total[half] = quad_sum(total[half] * exp2_of(maximum[half] - from));
      maximum[half] = from;
    }
  }
};

template <class E, int D, int kStreams>
struct ForwardKernel {
  using Arguments = ForwardArguments;
  static constexpr const char* kName = "attention_forward";
  static constexpr int kMaxWarps = cuda::kMaxWarps;
  static constexpr int kTileBytes = Tile<E, D>::bytes(kOtherRows);
  static constexpr int kBufferBytes = 2 * kTileBytes + kOtherRows * static_cast<int>(sizeof(int));
  using WarpSlices = Slices<kStreams, false>;
  static constexpr int kSliceBytes = WarpSlices::kFloats * static_cast<int>(sizeof(float));

  static TORUS_INLINE constexpr int shared_bytes(int warps) {
    return 2 * kBufferBytes + warps * (Tile<E, D>::bytes(kOwnRows) + kSliceBytes);
  }

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const Operands& in = arguments.in;
    const Schedule& schedule = in.schedule;
    const Head head = query_head(in, warp.block_y());
    const OwnRows own(schedule, warp);

    const E* const queries = rows_of<const E>(in.q, head.batch, head.query);
    const E* const key_values[2] = {rows_of<const E>(in.k, head.batch, head.key_value),
                                    rows_of<const E>(in.v, head.batch, head.key_value)};
    const int64_t strides[2] = {in.k.token, in.v.token};

    const int own_at = 2 * kBufferBytes, slices_at = own_at + warp.count() * Tile<E, D>::bytes(kOwnRows);
    OwnFragments<E, D, true> query{
        {warp.template shared<E>(own_at + warp.index() * Tile<E, D>::bytes(kOwnRows), kOwnRows * D)}, {}};
    WarpSlices slices{warp.template shared<float>(slices_at + warp.index() * kSliceBytes, WarpSlices::kFloats), {}};
    const auto tile = [&](int buffer, int which) {
      return Tile<E, D>{warp.template shared<E>(buffer * kBufferBytes + which * kTileBytes, kOtherRows * D)};
    };
    const auto tokens = [&](int buffer) {
      return warp.template shared<int>(buffer * kBufferBytes + 2 * kTileBytes, kOtherRows);
    };

    copy_own_rows<1, E, D>(in, warp, own, {queries}, {in.q.token}, {query.tile});
    query.load();

    Lane<int> oldest[2];
    for (int half = 0; half < 2; ++half) oldest[half] = oldest_key(in, head.batch, own.token[half]);
    float slope[kStreams];
    for (int k = 0; k < kStreams; ++k) slope[k] = bias_slope(in, head, schedule.stream[k]);

    // sums = scores of a tile; false where no stream sees any.
    Sum scores[kTilesOfOthers];
    const auto score = [&](const OtherPlace& other, int buffer) {
      if (!slices.fill(in, warp, own, other, slope)) return false;
      multiply_rows(scores, query, tile(buffer, 0), 0);
      if (in.first_key != nullptr || other.count < kOtherRows) hide<false>(scores, oldest, tokens(buffer), 0);
      return true;
    };
    const auto stage = [&](const OtherPlace& other, int buffer, bool values) {
      if (values) {
        copy_others<2, E, D>(in, warp, own.place, other, key_values, strides, {tile(buffer, 0), tile(buffer, 1)});
      } else {
        copy_others<1, E, D>(in, warp, own.place, other, {key_values[0]}, {strides[0]}, {tile(buffer, 0)});
      }
      if (warp.index() == 0) tokens(buffer).store(lane_index(), other_tokens(schedule, own.place, other), true);
    };

    RunningSoftmax softmax[kStreams];
    for_each_tile(
        warp, schedule, own.place, [&](const OtherPlace& other, int buffer) { stage(other, buffer, false); },
        [&](const OtherPlace& other, int buffer) {
          if (!score(other, buffer)) return;
TORUS_UNROLL
          for (int k = 0; k < kStreams; ++k)
            if (slices.seen[k]) softmax[k].add(scores, Diagonals<kTilesOfOthers>(slices.bias(k), 0), in.scale2);
        });

    // Weights of a row relative to the largest, so that 16 bits keep what small ones multiply.
    Lane<float> factor[kStreams][2], gain[2];
TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      gain[half] = 0.0f;
TORUS_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        factor[k][half] = load_parameter(in.weights, head, own.token[half], schedule.stream[k]);
        gain[half] = max_of_floats(gain[half], map([](float g) { return fabsf(g); }, factor[k][half]));
      }
      gain[half] = select(gain[half] == 0.0f, Lane<float>(1.0f), gain[half]);
    }
TORUS_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      softmax[k].merge();
TORUS_UNROLL
      for (int half = 0; half < 2; ++half) factor[k][half] = factor[k][half] / gain[half] / softmax[k].total[half];
    }

    Sum y[D / kColumns];
TORUS_UNROLL
    for (int t = 0; t < D / kColumns; ++t) y[t] = zero_sum();
    Lane<float> spread[kStreams][2];
    for (int k = 0; k < kStreams; ++k) spread[k][0] = spread[k][1] = 0.0f;
    for_each_tile(
        warp, schedule, own.place, [&](const OtherPlace& other, int buffer) { stage(other, buffer, true); },
        [&](const OtherPlace& other, int buffer) {
          if (!score(other, buffer)) return;
          Sum mixed[kTilesOfOthers];
TORUS_UNROLL
          for (int t = 0; t < kTilesOfOthers; ++t) mixed[t] = zero_sum();
TORUS_UNROLL
          for (int k = 0; k < kStreams; ++k) {
            if (!slices.seen[k]) continue;
            const Diagonals<kTilesOfOthers> bias(slices.bias(k), 0);
TORUS_UNROLL
            for (int t = 0; t < kTilesOfOthers; ++t)
TORUS_UNROLL
              for (int i = 0; i < 4; ++i) {
                const Lane<float> x = scores[t].value[i] * in.scale2 + bias.at(t, i / 2, i % 2) - softmax[k].maximum[i / 2];
                mixed[t].value[i] = mixed[t].value[i] + exp2_of(x) * factor[k][i / 2];
              }
            if (arguments.entropy != nullptr) add_spread(scores, bias, in.scale2, softmax[k], spread[k]);
          }
TORUS_UNROLL
          for (int t = 0; t < kTilesOfOthers; t += 2)
            multiply_depth<E, D>(y, left_of<E>(mixed[t], mixed[t + 1]), tile(buffer, 1), t * kColumns);
        });

    write_statistics(arguments, head, own, softmax, spread);
TORUS_UNROLL
    for (int t = 0; t < D / kColumns; ++t)
TORUS_UNROLL
      for (int i = 0; i < 4; ++i) y[t].value[i] = y[t].value[i] * gain[i / 2];
    write_outputs(arguments, head, own, y);
  }

 private:
  // spread += sum e (x - max), which is what keys add to the entropy.
  static TORUS_DEVICE void add_spread(const Sum (&scores)[kTilesOfOthers], const Diagonals<kTilesOfOthers>& bias,
                                      float scale2, const RunningSoftmax& softmax, Lane<float> (&spread)[2]) {
    for (int t = 0; t < kTilesOfOthers; ++t)
      for (int i = 0; i < 4; ++i) {
        const Lane<float> x = scores[t].value[i] * scale2 + bias.at(t, i / 2, i % 2) - softmax.maximum[i / 2];
        const Lane<float> e = exp2_of(x);
        spread[i / 2] = spread[i / 2] + select(e == 0.0f, Lane<float>(0.0f), e * x);
      }
  }

  static TORUS_DEVICE void write_statistics(const Arguments& arguments, const Head& head, const OwnRows& own,
                                            const RunningSoftmax (&softmax)[kStreams],
                                            const Lane<float> (&spread)[kStreams][2]) {
    const Operands& in = arguments.in;
    if (arguments.lse == nullptr && arguments.entropy == nullptr) return;
    const int64_t first = (head.batch * in.heads.query + head.query) * in.seq_len;
TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Lane<bool> where = own.token[half] >= 0 && fragment_member() == 0;
      const Lane<int64_t> row = (cast<int64_t>(own.token[half]) + first) * int64_t{kNumStreams};
TORUS_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        const Lane<int64_t> at = row + static_cast<int64_t>(in.schedule.stream[k]);
        const Lane<float> log_total = log2_of(softmax[k].total[half]);
        if (arguments.lse != nullptr) store(arguments.lse, at, (softmax[k].maximum[half] + log_total) * kLn2, where);
        if (arguments.entropy == nullptr) continue;
        const Lane<float> nats = (log_total - quad_sum(spread[k][half]) / softmax[k].total[half]) * kLn2;
        store(arguments.entropy, at, select(nats < 0.0f, Lane<float>(0.0f), nats), where);
      }
    }
  }

  static TORUS_DEVICE void write_outputs(const Arguments& arguments, const Head& head, const OwnRows& own,
                                         const Sum (&y)[D / kColumns]) {
    const Operands& in = arguments.in;
    E* const out = rows_of<E>(arguments.out, head.batch, head.query);
    const bool compounds = in.state.data != nullptr;
    const E* const state = rows_of<const E>(in.state, head.batch, head.query);
    Lane<float> alpha[2];
    for (int half = 0; half < 2; ++half)
      alpha[half] = in.ends && compounds ? load_parameter(in.alpha, head, own.token[half], 0) : Lane<float>(1.0f);
    add_rows<D>(in, arguments.y + head.local * in.tokens(), own.token, y,
                [&](int half, const Lane<int>& token, const Lane<int>& column, const Lane<bool>& where, Lane<float> low,
                    Lane<float> high) {
                  const Lane<int64_t> row = cast<int64_t>(token), offset = cast<int64_t>(column);
                  if (compounds) {
                    const Lane<uint32_t> pair = load_pair(state, row * in.state.token + offset, where);
                    const Lane<float> before = map([](uint32_t x) { return low_of<E>(x); }, pair);
                    const Lane<float> before_high = map([](uint32_t x) { return high_of<E>(x); }, pair);
                    low = before + alpha[half] * (low - before);
                    high = before_high + alpha[half] * (high - before_high);
                  }
                  store_pair(out, row * arguments.out.token + offset, low, high, where);
                });
  }
};

}  // namespace torus::cuda
