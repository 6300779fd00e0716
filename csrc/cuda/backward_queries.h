// Backward of one family of lines, or of the cross flows, by queries: delta, d_q and the rows' parts of d_decay, in two
// sweeps over the keys of sixteen queries a warp.
#pragma once

#include "backward.h"

namespace torus::cuda {

template <class E, int D>
struct QueryGradientsKernel {
  using Arguments = BackwardArguments;
  static constexpr const char* kName = "attention_backward_queries";
  static constexpr int kMaxWarps = cuda::kMaxWarps;
  static constexpr int kTileBytes = Tile<E, D>::bytes(kOtherRows);
  static constexpr int kOwnBytes = Tile<E, D>::bytes(kOwnRows);
  static constexpr int kBufferBytes = 2 * kTileBytes + kOtherRows * static_cast<int>(sizeof(int));
  using WarpSlices = Slices<true>;
  static constexpr int kSliceBytes = WarpSlices::kFloats * static_cast<int>(sizeof(float));
  static constexpr bool kHeld = D <= 64;

  static TORUS_INLINE constexpr int shared_bytes(int warps) {
    return 2 * kBufferBytes + warps * (2 * kOwnBytes + kSliceBytes);
  }

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const Operands& in = arguments.in;
    const Schedule& schedule = in.schedule;
    const Head head = query_head(in, warp.block_y());
    const OwnRows own(schedule, warp);

    const E* const key_values[2] = {rows_of<const E>(in.k, head.batch, head.key_value),
                                    rows_of<const E>(in.v, head.batch, head.key_value)};
    const int64_t strides[2] = {in.k.token, in.v.token};
    const int own_at = 2 * kBufferBytes + warp.index() * 2 * kOwnBytes;
    const int slices_at = 2 * kBufferBytes + warp.count() * 2 * kOwnBytes + warp.index() * kSliceBytes;
    OwnFragments<E, D, kHeld> query{{warp.template shared<E>(own_at, kOwnRows * D)}, {}};
    OwnFragments<E, D, kHeld> d_out{{warp.template shared<E>(own_at + kOwnBytes, kOwnRows * D)}, {}};
    WarpSlices slices{warp.template shared<float>(slices_at, WarpSlices::kFloats), {}};
    const auto tile = [&](int buffer, int which) {
      return Tile<E, D>{warp.template shared<E>(buffer * kBufferBytes + which * kTileBytes, kOtherRows * D)};
    };
    const auto tokens = [&](int buffer) {
      return warp.template shared<int>(buffer * kBufferBytes + 2 * kTileBytes, kOtherRows);
    };

    copy_own_rows(in, warp, own.token, rows_of<const E>(in.q, head.batch, head.query), in.q.token, query.tile);
    copy_own_rows(in, warp, own.token, rows_of<const E>(in.d_out, head.batch, head.query), in.d_out.token, d_out.tile);
    query.load();
    d_out.load();

    Lane<int> oldest[2];
    for (int half = 0; half < 2; ++half) oldest[half] = oldest_key(in, head.batch, own.token[half]);
    float slope[kMaxStreams];
    QuerySums sums[kMaxStreams];
    TORUS_UNROLL
    for (int k = 0; k < kMaxStreams; ++k) {
      slope[k] = bias_slope(in, head, schedule.stream[k]);
      sums[k].begin(arguments, head, own.token, schedule.stream[k]);
    }

    const auto stage = [&](const OtherPlace& other, int buffer) {
      const Lane<int> token = other_tokens(schedule, own.place, other);
      copy_others<2, E, D>(in, warp, token, key_values, strides, {tile(buffer, 0), tile(buffer, 1)});
      if (warp.index() == 0) tokens(buffer).store(lane_index(), token, true);
    };
    // visit(buffer, row0, scores, d_probs) for every sixteen keys that are there.
    const auto sweep = [&](auto visit) {
      for_each_tile(warp, schedule, own.place, stage, [&](const OtherPlace& other, int buffer) {
        if (!slices.fill(in, warp, own, other, slope)) return;
        for (int row0 = 0; row0 < other.count; row0 += kChunkRows) {
          Sum scores[kChunkTiles], d_probs[kChunkTiles];
          multiply_rows(scores, query, tile(buffer, 0), row0);
          multiply_rows(d_probs, d_out, tile(buffer, 1), row0);
          if (in.first_key != nullptr || other.count < kOtherRows)
            hide<false>(scores, oldest, tokens(buffer), row0, in.scale2);
          visit(buffer, row0, scores, d_probs);
        }
      });
    };
    using Chunk = Sum[kChunkTiles];

    sweep([&](int, int row0, const Chunk& scores, const Chunk& d_probs) {
      TORUS_UNROLL
      for (int k = 0; k < kMaxStreams; ++k) {
        if (!slices.seen[k]) continue;
        const Diagonals<kChunkTiles> bias(slices.bias(k), row0 / kColumns);
        TORUS_UNROLL
        for (int t = 0; t < kChunkTiles; ++t)
          TORUS_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int half = i / 2;
            const Lane<float> x = scores[t].value[i] * in.scale2 + bias.at(t, half, i % 2);
            const Lane<float> p = exp2_of(x - sums[k].lse2[half]);
            sums[k].total[half] = sums[k].total[half] + p;
            sums[k].products[half] = sums[k].products[half] + p * d_probs[t].value[i];
          }
      }
    });

    TORUS_UNROLL
    for (int k = 0; k < kMaxStreams; ++k)
      if (k < schedule.num_streams) sums[k].finish_delta(arguments, head, own.token, schedule.stream[k]);

    Sum d_q[D / kColumns];
    zero_sums(d_q);
    sweep([&](int buffer, int row0, const Chunk& scores, const Chunk& d_probs) {
      Chunk d_scores;
      zero_sums(d_scores);
      TORUS_UNROLL
      for (int k = 0; k < kMaxStreams; ++k) {
        if (!slices.seen[k]) continue;
        const Diagonals<kChunkTiles> bias(slices.bias(k), row0 / kColumns), squared(slices.squared(k), row0 / kColumns);
        TORUS_UNROLL
        for (int t = 0; t < kChunkTiles; ++t)
          TORUS_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int half = i / 2;
            const Lane<float> x = scores[t].value[i] * in.scale2 + bias.at(t, half, i % 2);
            const Lane<float> p = exp2_of(x - sums[k].lse2[half]);
            const Lane<float> d_score = p * (sums[k].gate[half] * d_probs[t].value[i] - sums[k].gated_delta[half]);
            d_scores[t].value[i] = d_scores[t].value[i] + d_score;
            sums[k].decay[half] = sums[k].decay[half] + squared.at(t, half, i % 2) * d_score;
          }
      }
      multiply_gradients<E, D>(d_q, d_scores, tile(buffer, 0), row0);
    });

    TORUS_UNROLL
    for (int k = 0; k < kMaxStreams; ++k)
      if (k < schedule.num_streams) sums[k].finish_decay(arguments, head, own.token, schedule.stream[k]);
    write_gradient<E, D>(in, arguments.d_q + head.local * in.tokens(),
                         rows_of<E>(arguments.d_q_out, head.batch, head.query), arguments.d_q_out.token, own.token,
                         d_q, in.scale);
  }
};

}  // namespace torus::cuda
