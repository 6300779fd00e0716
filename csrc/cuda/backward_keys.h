// Backward of one family of lines, or of the cross flows, by keys: d_k and d_v of sixteen keys a warp, in one sweep
// over the queries that see them, for every query head of the group in turn. Scores are transposed: own rows are
// keys, so that what belongs to a query belongs to a column.
#pragma once

#include "backward.h"

namespace torus::cuda {

template <class E, int D>
struct KeyGradientsKernel {
  using Arguments = BackwardArguments;
  static constexpr const char* kName = "attention_backward_keys";
  static constexpr int kMaxWarps = cuda::kMaxWarps;
  static constexpr int kTileBytes = Tile<E, D>::bytes(kOtherRows);
  static constexpr int kOwnBytes = Tile<E, D>::bytes(kOwnRows);
  enum RowNumber { kLse, kGate, kDelta, kRowNumbers };
  static constexpr int kNumbers = kMaxStreams * kRowNumbers * kOtherRows;
  static constexpr int kOldestAt = 2 * kTileBytes;
  static constexpr int kNumbersAt = kOldestAt + kOtherRows * static_cast<int>(sizeof(int));
  static constexpr int kBufferBytes = kNumbersAt + kNumbers * static_cast<int>(sizeof(float));
  using WarpSlices = Slices<false>;
  static constexpr int kSliceBytes = WarpSlices::kFloats * static_cast<int>(sizeof(float));
  static constexpr bool kHeld = D <= 32;

  static TORUS_INLINE constexpr int shared_bytes(int warps) {
    return 2 * kBufferBytes + warps * (2 * kOwnBytes + kSliceBytes);
  }

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const Operands& in = arguments.in;
    const Schedule& schedule = in.schedule;
    const OwnRows own(schedule, warp);
    const int local = warp.block_y();
    const Head first_head = member_head(in, local, 0);

    const int own_at = 2 * kBufferBytes + warp.index() * 2 * kOwnBytes;
    const int slices_at = 2 * kBufferBytes + warp.count() * 2 * kOwnBytes + warp.index() * kSliceBytes;
    OwnFragments<E, D, kHeld> key{{warp.template shared<E>(own_at, kOwnRows * D)}, {}};
    OwnFragments<E, D, kHeld> value{{warp.template shared<E>(own_at + kOwnBytes, kOwnRows * D)}, {}};
    WarpSlices slices{warp.template shared<float>(slices_at, WarpSlices::kFloats), {}};
    const auto tile = [&](int buffer, int which) {
      return Tile<E, D>{warp.template shared<E>(buffer * kBufferBytes + which * kTileBytes, kOtherRows * D)};
    };
    const auto oldest = [&](int buffer) {
      return warp.template shared<int>(buffer * kBufferBytes + kOldestAt, kOtherRows);
    };
    const auto numbers = [&](int buffer) {
      return warp.template shared<float>(buffer * kBufferBytes + kNumbersAt, kNumbers);
    };

    copy_own_rows(in, warp, own.token, rows_of<const E>(in.k, first_head.batch, first_head.key_value), in.k.token,
                  key.tile);
    copy_own_rows(in, warp, own.token, rows_of<const E>(in.v, first_head.batch, first_head.key_value), in.v.token,
                  value.tile);
    key.load();
    value.load();

    Sum d_k[D / kColumns], d_v[D / kColumns];
    zero_sums(d_k);
    zero_sums(d_v);
    for (int member = 0; member < in.heads.group(); ++member) {
      const Head head = member_head(in, local, member);
      float slope[kMaxStreams];
      for (int k = 0; k < kMaxStreams; ++k) slope[k] = bias_slope(in, head, schedule.stream[k]);
      for_each_tile(
          warp, schedule, own.place,
          [&](const OtherPlace& other, int buffer) {
            const Lane<int> token = other_tokens(schedule, own.place, other);
            copy_others<2, E, D>(in, warp, token,
                                 {rows_of<const E>(in.q, head.batch, head.query),
                                  rows_of<const E>(in.d_out, head.batch, head.query)},
                                 {in.q.token, in.d_out.token}, {tile(buffer, 0), tile(buffer, 1)});
            stage_numbers(warp, arguments, head, token, oldest(buffer), numbers(buffer));
          },
          [&](const OtherPlace& other, int buffer) {
            if (!slices.fill(in, warp, own, other, slope)) return;
            for (int row0 = 0; row0 < other.count; row0 += kChunkRows) {
              Sum scores[kChunkTiles], d_probs[kChunkTiles], mixed[kChunkTiles], d_scores[kChunkTiles];
              multiply_rows(scores, key, tile(buffer, 0), row0);
              multiply_rows(d_probs, value, tile(buffer, 1), row0);
              if (in.first_key != nullptr || other.count < kOtherRows)
                hide<true>(scores, own.token, oldest(buffer), row0, in.scale2);
              zero_sums(mixed);
              zero_sums(d_scores);
              TORUS_UNROLL
              for (int k = 0; k < kMaxStreams; ++k)
                if (slices.seen[k])
                  add_stream(k, slices, numbers(buffer), row0, in.scale2, scores, d_probs, mixed, d_scores);
              multiply_depth<E, D>(d_v, left_of<E>(mixed[0], mixed[1]), tile(buffer, 1), row0);
              multiply_depth<E, D>(d_k, left_of<E>(d_scores[0], d_scores[1]), tile(buffer, 0), row0);
            }
          });
    }

    write_gradient<E, D>(in, arguments.d_k + local * in.tokens(),
                         rows_of<E>(arguments.d_k_out, first_head.batch, first_head.key_value), arguments.d_k_out.token,
                         own.token, d_k, in.scale);
    write_gradient<E, D>(in, arguments.d_v + local * in.tokens(),
                         rows_of<E>(arguments.d_v_out, first_head.batch, first_head.key_value), arguments.d_v_out.token,
                         own.token, d_v, 1.0f);
  }

 private:
  // Of the queries of a tile, one in a lane.
  static TORUS_DEVICE void stage_numbers(const Warp& warp, const Arguments& arguments, const Head& head,
                                         const Lane<int>& token, const Shared<int>& oldest,
                                         const Shared<float>& numbers) {
    const Operands& in = arguments.in;
    if (warp.index() == 0) oldest.store(lane_index(), oldest_key(in, head.batch, token), true);
    for (int item = warp.index(); item < in.schedule.num_streams * kRowNumbers; item += in.schedule.warps) {
      const int stream = in.schedule.stream[item / kRowNumbers], number = item % kRowNumbers;
      const float* const sums = number == kGate ? arguments.rows.gate : arguments.rows.delta;
      const Lane<float> x = number == kLse ? load_lse2(arguments, head, token, stream)
                                           : load(sums, RowSums::at(in, head, token, stream), token >= 0, 0.0f);
      numbers.store(lane_index() + item * kOtherRows, x, true);
    }
  }

  // What stream k adds to sum_s g_s P_s and to dS, both transposed.
  static TORUS_DEVICE void add_stream(int k, const WarpSlices& slices, const Shared<float>& numbers, int row0,
                                      float scale2, const Sum (&scores)[kChunkTiles],
                                      const Sum (&d_probs)[kChunkTiles], Sum (&mixed)[kChunkTiles],
                                      Sum (&d_scores)[kChunkTiles]) {
    const Diagonals<kChunkTiles> bias(slices.bias(k), row0 / kColumns);
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      TORUS_UNROLL
      for (int i = 0; i < 2; ++i) {
        const auto of_column = [&](RowNumber number) {
          const int first = (k * kRowNumbers + number) * kOtherRows + row0 + t * kColumns;
          return numbers.load(fragment_member() * 2 + (first + i));
        };
        const Lane<float> lse2 = of_column(kLse), gate = of_column(kGate), delta = of_column(kDelta);
        TORUS_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int at = 2 * half + i;
          const Lane<float> p = exp2_of(scores[t].value[at] * scale2 + bias.at(t, half, i) - lse2) * gate;
          mixed[t].value[at] = mixed[t].value[at] + p;
          d_scores[t].value[at] = d_scores[t].value[at] + p * (d_probs[t].value[at] - delta);
        }
      }
  }
};

}  // namespace torus::cuda
