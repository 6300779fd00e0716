// Forward of the cross flows: y += sum_s g_s O_s for a patch of 4 x 4 queries a warp, both flows from the same strips
// of keys and values in shared memory.
//
// kInPairs: as for lines.
#pragma once

#include "chunk_softmax.h"
#include "patch_walk.h"

namespace torus::cuda {

struct CrossForwardArguments {
  ForwardArguments forward;
  CrossPlan plan;
};

template <class E, int D, bool kInPairs>
struct CrossForwardKernel {
  using Arguments = CrossForwardArguments;
  using Rows = PaddedTile<E, D>;
  static constexpr const char* kName = "attention_forward_cross";
  static constexpr int kMaxWarps = cuda::kMaxWarps;
  static constexpr int kMinBlocks = kChunkBlocks<D>;
  static constexpr int kStripRows = CrossPlan::rows();
  static constexpr int kTableAt = 2 * Rows::bytes(kStripRows);
  static constexpr int kPatchTableBytes = kPatchTable * static_cast<int>(sizeof(FloatPair));
  static constexpr int kTokensAt = kTableAt + kMaxStreams * kPatchTableBytes;
  static constexpr int kSharedBytes = kTokensAt + kMaxWarps * OwnTokens::kBytes;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const Operands& in = arguments.forward.in;
    const Schedule& schedule = in.schedule;
    const CrossPlan& plan = arguments.plan;
    const Head head = query_head(in, warp.block_y());
    const OwnPatch own(schedule, plan, warp);
    const Rows keys{warp.template shared<E>(0, kStripRows * Rows::kPitch)};
    const Rows values{warp.template shared<E>(Rows::bytes(kStripRows), kStripRows * Rows::kPitch)};
    const auto pairs_of = [&](int k) {
      return warp.template shared<FloatPair>(kTableAt + k * kPatchTableBytes, kPatchTable);
    };
    const OwnTokens tokens(warp, kTokensAt, own.token);
    const RowFragments<E, D> query(in, rows_of<const E>(in.q, head.batch, head.query), in.q.token, own.token);
    const ScoreScale scale(in);
    ChunkSoftmax<E, D> first(query, keys, values, scale), second(query, keys, values, scale);
    const auto bring = [&](const Lane<int>& token, int row0, int rows) {
      bring_keys<E, D>(in, head, token, {keys, values}, row0, rows);
    };

    for (int k = 0; k < kMaxStreams; ++k) {
      const Bias bias{bias_slope(in, head, schedule.stream[k])};
      fill_patch_table(in, warp, plan, k, PutPairs{pairs_of(k), bias});
    }
    for (int column = 0; column <= kMaxPatchReach; column = CrossPlan::next_column(column)) {
      const Chunks strip = plan.strip(own.row, column);
      if (strip.empty()) continue;
      warp.barrier();
      stage_strip(warp, schedule, plan, own, column, strip, bring);
      warp.barrier();
      if (!own.any) continue;
      const auto visit_stream = [&](int k, ChunkSoftmax<E, D>& softmax) {
        const Chunks seen = plan.reach[k].rows.shifted(warp.index()).within(strip);
        if (plan.reach[k].columns.has(column))
          visit(warp, in, head.batch, plan, own, column, seen, strip.first, {pairs_of(k), first_place(column)},
                softmax);
      };
      visit_stream(0, first);
      visit_stream(1, second);
    }

    Sum y[D / kColumns];
    zero_sums(y);
    const OwnTokens::Pair rows = tokens.load();
    const auto finish = [&](int k, ChunkSoftmax<E, D>& softmax) {
      softmax.finish();
      mix_stream<D>(in, head, rows.token, k, softmax, softmax.out, y);
      write_statistics(arguments.forward, head, rows.token, k, softmax);
    };
    finish(0, first);
    finish(1, second);
    write_outputs<E, D>(arguments.forward, head, rows.token, y);
  }

 private:
  // Adds rows `seen` of a strip, which has `top` in its first place, to one flow.
  static TORUS_DEVICE void visit(const Warp& warp, const Operands& in, int64_t batch, const CrossPlan& plan,
                                 const OwnPatch& own, int column, const Chunks& seen, int top, const PatchTable& table,
                                 ChunkSoftmax<E, D>& softmax) {
    const int own_row = warp.index();
    const int whole = plan.in_time ? first_whole_row(in, plan, own, column) : seen.first;
    const auto hide_in = [&](int row) {
      return [&, row](Sum (&scores)[kChunkTiles]) {
        if (row >= whole) return;
        Lane<int> oldest[2] = {0, 0};
        if constexpr (!kInPairs)
          for (int half = 0; half < 2; ++half) oldest[half] = oldest_key(in, batch, own.token[half]);
        hide_in_patch(scores, in, own, row, column, oldest);
      };
    };
    const bool in_own_column = column == 0;
    if (in_own_column) softmax.begin(table, own_row - top, !kInPairs, hide_in(own_row));
    int row = seen.first;
    while (true) {
      while (kInPairs && row < seen.last && row >= whole &&
             !(in_own_column && (row == own_row || row + 1 == own_row)) &&
             softmax.template add_chunks<2>(table, row - own_row, row - top))
        row += 2;
      if (row > seen.last) break;
      if (!(in_own_column && row == own_row))
        if (!kInPairs || row < whole || !softmax.template add_chunks<1>(table, row - own_row, row - top))
          softmax.add_chunk(table, row - own_row, row - top, !kInPairs, hide_in(row));
      ++row;
    }
  }
};

}  // namespace torus::cuda
