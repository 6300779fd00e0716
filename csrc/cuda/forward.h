// Forward of one family of lines, or of the cross flows: y += sum_s g_s O_s for sixteen queries a warp, in one pass
// over their keys. Every stream has its own running maximum, normaliser and product with V: most tiles are seen by
// one stream alone, and a stream is skipped where it sees nothing. The last family to run mixes in the EMA state
// and rounds.
#pragma once

#include "outputs.h"

namespace torus::cuda {

// One stream of sixteen queries: its softmax and its product with V.
template <class E, int D>
struct StreamState : SoftmaxSums {
  Sum out[D / kColumns];

  TORUS_DEVICE StreamState() {
    zero_sums(out);
  }

  template <int kTiles>
  TORUS_DEVICE void add(const Sum (&scores)[kTiles], const Diagonals<kTiles>& bias, float scale2,
                        const Tile<E, D>& values, bool with_spread) {
    Sum e[kTiles];
    Lane<float> kept[2];
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      Lane<float> highest = kNegativeInfinity;
      TORUS_UNROLL
      for (int t = 0; t < kTiles; ++t)
        TORUS_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          e[t].value[i] = scores[t].value[i] * scale2 + bias.at(t, half, i % 2);
          highest = max_of_floats(highest, e[t].value[i]);
        }
      const Lane<float> before = maximum[half];
      maximum[half] = max_of_floats(before, quad_maximum(highest));
      const Lane<float> from = anchor(maximum[half]);
      kept[half] = exp2_of(before - from);
      if (with_spread) spread[half] = (spread[half] + total[half] * (anchor(before) - from)) * kept[half];
      total[half] = total[half] * kept[half];
      TORUS_UNROLL
      for (int t = 0; t < kTiles; ++t)
        TORUS_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const Lane<float> x = e[t].value[i] - from;
          e[t].value[i] = exp2_of(x);
          total[half] = total[half] + e[t].value[i];
          if (with_spread)
            spread[half] = spread[half] + select(e[t].value[i] == 0.0f, Lane<float>(0.0f), e[t].value[i] * x);
        }
    }
    if (any(kept[0] != 1.0f || kept[1] != 1.0f)) {
      TORUS_UNROLL
      for (int t = 0; t < D / kColumns; ++t)
        TORUS_UNROLL
        for (int i = 0; i < 4; ++i) out[t].value[i] = out[t].value[i] * kept[i / 2];
    }
    TORUS_UNROLL
    for (int t = 0; t < kTiles; t += 2) multiply_depth<E, D>(out, left_of<E>(e[t], e[t + 1]), values, t * kColumns);
  }
};

template <class E, int D>
struct ForwardKernel {
  using Arguments = ForwardArguments;
  static constexpr const char* kName = "attention_forward";
  static constexpr int kMaxWarps = cuda::kMaxWarps;
  static constexpr int kTileBytes = Tile<E, D>::bytes(kOtherRows);
  static constexpr int kBufferBytes = 2 * kTileBytes + kOtherRows * static_cast<int>(sizeof(int));
  static constexpr int kOwnBytes = Tile<E, D>::bytes(kOwnRows);
  using WarpSlices = Slices<false>;
  static constexpr int kSliceBytes = WarpSlices::kFloats * static_cast<int>(sizeof(float));
  static constexpr bool kHeld = D <= 64;

  static TORUS_INLINE constexpr int shared_bytes(int warps) {
    return 2 * kBufferBytes + warps * (kOwnBytes + kSliceBytes);
  }

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const Operands& in = arguments.in;
    const Schedule& schedule = in.schedule;
    const Head head = query_head(in, warp.block_y());
    const OwnRows own(schedule, warp);

    const E* const key_values[2] = {rows_of<const E>(in.k, head.batch, head.key_value),
                                    rows_of<const E>(in.v, head.batch, head.key_value)};
    const int64_t strides[2] = {in.k.token, in.v.token};
    const int own_at = 2 * kBufferBytes, slices_at = own_at + warp.count() * kOwnBytes;
    OwnFragments<E, D, kHeld> query{{warp.template shared<E>(own_at + warp.index() * kOwnBytes, kOwnRows * D)}, {}};
    WarpSlices slices{warp.template shared<float>(slices_at + warp.index() * kSliceBytes, WarpSlices::kFloats), {}};
    const auto tile = [&](int buffer, int which) {
      return Tile<E, D>{warp.template shared<E>(buffer * kBufferBytes + which * kTileBytes, kOtherRows * D)};
    };
    const auto tokens = [&](int buffer) {
      return warp.template shared<int>(buffer * kBufferBytes + 2 * kTileBytes, kOtherRows);
    };

    copy_own_rows(in, warp, own.token, rows_of<const E>(in.q, head.batch, head.query), in.q.token, query.tile);
    query.load();
    Lane<int> oldest[2];
    for (int half = 0; half < 2; ++half) oldest[half] = oldest_key(in, head.batch, own.token[half]);
    float slope[kMaxStreams];
    for (int k = 0; k < kMaxStreams; ++k) slope[k] = bias_slope(in, head, schedule.stream[k]);

    StreamState<E, D> streams[kMaxStreams];
    for_each_tile(
        warp, schedule, own.place,
        [&](const OtherPlace& other, int buffer) {
          const Lane<int> token = other_tokens(schedule, own.place, other);
          copy_others<2, E, D>(in, warp, token, key_values, strides, {tile(buffer, 0), tile(buffer, 1)});
          if (warp.index() == 0) tokens(buffer).store(lane_index(), token, true);
        },
        [&](const OtherPlace& other, int buffer) {
          if (!slices.fill(in, warp, own, other, slope)) return;
          Sum scores[kTilesOfOthers];
          multiply_rows(scores, query, tile(buffer, 0), 0);
          if (in.first_key != nullptr || other.count < kOtherRows)
            hide<false>(scores, oldest, tokens(buffer), 0, in.scale2);
          TORUS_UNROLL
          for (int k = 0; k < kMaxStreams; ++k)
            if (slices.seen[k])
              streams[k].add(scores, Diagonals<kTilesOfOthers>(slices.bias(k), 0), in.scale2, tile(buffer, 1),
                             arguments.entropy != nullptr);
        });

    Sum y[D / kColumns];
    zero_sums(y);
    TORUS_UNROLL
    for (int k = 0; k < kMaxStreams; ++k) {
      if (k >= schedule.num_streams) continue;
      streams[k].finish();
      mix_stream<D>(in, head, own.token, k, streams[k], streams[k].out, y);
      write_statistics(arguments, head, own.token, k, streams[k]);
    }
    write_outputs<E, D>(arguments, head, own.token, y);
  }
};

}  // namespace torus::cuda
