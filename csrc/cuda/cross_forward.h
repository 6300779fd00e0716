// Forward of the cross flows: y += sum_s g_s O_s for a patch of 4 x 4 queries a warp, both flows from the same strips
// of keys and values in shared memory.
//
// kInPairs: as for lines; not where entropy is asked for.
#pragma once

#include "chunk_softmax.h"
#include "cross_plan.h"

namespace torus::cuda {

struct CrossForwardArguments {
  ForwardArguments forward;
  CrossPlan plan;
};

// A place for every displacement of rows, kPatchTableRow places for one step, and of columns.
using PatchBiases = BiasTable<kPatchTableRow * kPatch / kChunkTiles>;

// Of one of the schedule's streams, by the whole block.
TORUS_DEVICE void fill_patch_biases(const Shared<FloatPair>& pairs, int at, const Operands& in, const Warp& warp,
                                    int stream, float slope) {
  const Schedule& s = in.schedule;
  const float* const squared = in.squared + s.table_size() * stream;
  static_assert(kPatchTableRow <= kWarpLanes, "a lane for every column");
  const Lane<int> b = lane_index() - kMaxDisplacement;
  for (int row = warp.index(); row < kPatchTable / kPatchTableRow; row += warp.count()) {
    const int a = row - kMaxDisplacement, place = (a - s.row_lo) * s.table_columns() - s.col_lo;
    const bool exists = a >= s.row_lo && a <= s.row_hi;
    const Lane<bool> there = b >= s.col_lo && b <= s.col_hi && exists;
    const Lane<float> x = load(squared, cast<int64_t>(b + place), there, -1.0f);
    const Lane<float> bias = select(x >= 0.0f, x * slope, kNegativeInfinity);
    const Lane<float> before = shuffle(bias, (lane_index() + (kWarpLanes - 1)) % kWarpLanes);
    const Lane<FloatPair> pair = map([](float low, float high) { return FloatPair{low, high}; }, bias, before);
    pairs.store(lane_index() + (row * kPatchTableRow + at), pair, lane_index() < kPatchTableRow);
  }
}

template <class E, int D, bool kInPairs>
struct CrossForwardKernel {
  using Arguments = CrossForwardArguments;
  using Rows = PaddedTile<E, D>;
  static constexpr const char* kName = "attention_forward_cross";
  static constexpr int kMaxWarps = cuda::kMaxWarps;
  static constexpr int kMinBlocks = kChunkBlocks<D>;
  static constexpr int kStripRows = kStripPatches * kChunkKeys;
  static constexpr int kTableAt = 2 * Rows::bytes(kStripRows);
  static constexpr int kSharedBytes = kTableAt + kMaxStreams * kPatchTable * static_cast<int>(sizeof(FloatPair));

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const Operands& in = arguments.forward.in;
    const Schedule& schedule = in.schedule;
    const CrossPlan& plan = arguments.plan;
    const Head head = query_head(in, warp.block_y());
    const int own_column = plan.column_of(warp.block_x()), first_row = plan.first_row_of(warp.block_x());
    const Rows keys{warp.template shared<E>(0, kStripRows * Rows::kPitch)};
    const Rows values{warp.template shared<E>(Rows::bytes(kStripRows), kStripRows * Rows::kPitch)};
    const Shared<FloatPair> pairs = warp.template shared<FloatPair>(kTableAt, kMaxStreams * kPatchTable);

    const auto own_token = [&](int row) {
      const int u = (first_row + warp.index()) * kPatch + row / kPatch, v = own_column * kPatch + row % kPatch;
      return u < schedule.num_tracks && v < schedule.track_length ? schedule.site(u, v) : kNoToken;
    };
    const Lane<int> token[2] = {map(own_token, fragment_group()), map(own_token, fragment_group() + 8)};
    const bool any_row = any(token[0] >= 0 || token[1] >= 0);
    const QueryFragments<E, D> query(in, rows_of<const E>(in.q, head.batch, head.query), token);
    ChunkSoftmax<E, D> first(query, keys, values, in.scale2), second(query, keys, values, in.scale2);

    for (int k = 0; k < kMaxStreams; ++k)
      fill_patch_biases(pairs, k * kPatchTable, in, warp, k, bias_slope(in, head, schedule.stream[k]));
    for (int column = 0; column <= kMaxPatchReach; column = CrossPlan::next_column(column)) {
      const Chunks strip = plan.strip(first_row, column);
      if (strip.empty()) continue;
      warp.barrier();
      stage(warp, in, head, first_row, own_column + column, strip, {keys, values});
      warp.barrier();
      if (!any_row) continue;
      const auto visit_stream = [&](int k, ChunkSoftmax<E, D>& softmax) {
        if (plan.reach[k].columns.has(column))
          visit(warp, in, plan, k, first_row, own_column, column, strip, pairs, softmax);
      };
      visit_stream(0, first);
      visit_stream(1, second);
    }

    Sum y[D / kColumns];
    TORUS_UNROLL
    for (int t = 0; t < D / kColumns; ++t) y[t] = zero_sum();
    const auto finish = [&](int k, ChunkSoftmax<E, D>& softmax) {
      softmax.finish();
      mix_stream<D>(in, head, token, k, softmax, softmax.out, y);
      write_statistics(arguments.forward, head, token, k, softmax);
    };
    finish(0, first);
    finish(1, second);
    write_outputs<E, D>(arguments.forward, head, token, y);
  }

 private:
  // Keys and values of a strip, two patches a warp; there on return for the warp's own part.
  static TORUS_DEVICE void stage(const Warp& warp, const Operands& in, const Head& head, int first_row,
                                 int patch_column, const Chunks& strip, const Rows (&to)[2]) {
    const E* const from[2] = {rows_of<const E>(in.k, head.batch, head.key_value),
                              rows_of<const E>(in.v, head.batch, head.key_value)};
    const int64_t stride[2] = {in.k.token, in.v.token};
    for (int row = strip.first + 2 * warp.index(); row <= strip.last; row += 2 * warp.count()) {
      const auto token = [&](int key) {
        return in.schedule.site((first_row + row) * kPatch + key / kPatch, patch_column * kPatch + key % kPatch);
      };
      const int rows = row < strip.last ? 2 * kChunkKeys : kChunkKeys;
      copy_rows<2 * kChunkKeys, 2, Rows>(in, map(token, lane_index()), from, stride, to, lane_index(), kWarpLanes,
                                         (row - strip.first) * kChunkKeys, rows);
    }
    warp.commit_copies();
    warp.template wait_copies<0>();
  }

  // Adds what a warp sees of a strip to one flow.
  static TORUS_DEVICE void visit(const Warp& warp, const Operands& in, const CrossPlan& plan, int k, int first_row,
                                 int own_column, int column, const Chunks& strip, const Shared<FloatPair>& pairs,
                                 ChunkSoftmax<E, D>& softmax) {
    // Row r of a sum is site (r / 4, r % 4) of the queries' patch, and column c the same of the keys'.
    const Lane<int> a = fragment_group() / kPatch - fragment_member() / 2 + kMaxDisplacement;
    const Lane<int> b = fragment_group() % kPatch - fragment_member() % 2 * 2 + (kMaxDisplacement - column * kPatch);
    const PatchBiases table{pairs, a * kPatchTableRow + b + k * kPatchTable};
    const int own_row = warp.index();
    const Chunks seen = plan.reach[k].rows.shifted(own_row).within(strip);
    const int whole = plan.in_time ? plan.first_whole_row(own_column + column) - first_row : seen.first;
    const auto add = [&](int row) {
      const int token = (first_row + row) * kPatch * in.schedule.n_minor + (own_column + column) * kPatch;
      softmax.add_chunk(table, row - own_row, row - strip.first, !kInPairs, [&](Sum (&scores)[kChunkTiles]) {
        if (row < whole) hide_before_time(scores, token, in.schedule.n_minor, in.scale2);
      });
    };
    const bool in_own_column = column == 0;
    if (in_own_column) {
      if constexpr (kInPairs) {
        softmax.begin(table, own_row - strip.first);
      } else {
        add(own_row);
      }
    }
    int row = seen.first;
    while (true) {
      while (kInPairs && row < seen.last && row >= whole && !(in_own_column && (row == own_row || row + 1 == own_row)) &&
             softmax.template add_chunks<2>(table, row - own_row, {row - strip.first, row + 1 - strip.first}))
        row += 2;
      if (row > seen.last) break;
      if (!(in_own_column && row == own_row))
        if (!kInPairs || row < whole || !softmax.template add_chunks<1>(table, row - own_row, {row - strip.first}))
          add(row);
      ++row;
    }
  }

  // Scores of keys before token 0 become -inf once they are scaled; the patch's first site is token `first`.
  static TORUS_DEVICE void hide_before_time(Sum (&scores)[kChunkTiles], int first, int n_minor, float scale2) {
    const float hidden = scale2 < 0.0f ? -kNegativeInfinity : kNegativeInfinity;
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      TORUS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Lane<int> key = fragment_member() * 2 + (t * kColumns + i % 2);
        const Lane<int> token = (key / kPatch) * n_minor + key % kPatch + first;
        scores[t].value[i] = select(token >= 0, scores[t].value[i], hidden);
      }
  }
};

}  // namespace torus::cuda
