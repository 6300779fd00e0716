// A block's strips of patches in shared memory, and what its warps go through there.
#pragma once

#include "chunks.h"
#include "cross_plan.h"

namespace torus::cuda {

// A place for every displacement of rows, kPatchTableRow places for one step, and of columns.
using PatchTable = DisplacementTable<kPatchTableRow * kPatch / kChunkTiles>;

// put(place, squared distances, where), by the whole block, of a displacement and of the one a column before; -1 where
// one of the schedule's streams sees nothing.
template <class Put>
TORUS_DEVICE void fill_patch_table(const Operands& in, const Warp& warp, const CrossPlan& plan, int stream, Put put) {
  const Schedule& s = in.schedule;
  const float* const squared = in.squared + s.table_size() * stream;
  static_assert(kPatchTableRow <= kWarpLanes, "a lane for every column");
  const Lane<int> b = (lane_index() - kMaxDisplacement) * plan.sign;
  for (int row = warp.index(); row < kPatchTable / kPatchTableRow; row += plan.warps) {
    const int a = (row - kMaxDisplacement) * plan.sign, place = (a - s.row_lo) * s.table_columns() - s.col_lo;
    const bool exists = a >= s.row_lo && a <= s.row_hi;
    const Lane<bool> there = b >= s.col_lo && b <= s.col_hi && exists;
    const Lane<float> x = load(squared, cast<int64_t>(b + place), there, -1.0f);
    const Lane<float> two[2] = {x, shuffle(x, (lane_index() + (kWarpLanes - 1)) % kWarpLanes)};
    put(lane_index() + row * kPatchTableRow, two, lane_index() < kPatchTableRow);
  }
}

// Place of the first sum of a warp's own row of patches, of others so many columns away. Row r of a sum is site
// (r / 4, r % 4) of the own patch, and column c the same of the others'.
TORUS_DEVICE Lane<int> first_place(int column) {
  const Lane<int> a = fragment_group() / kPatch - fragment_member() / 2 + kMaxDisplacement;
  const Lane<int> b = fragment_group() % kPatch - fragment_member() % 2 * 2 + (kMaxDisplacement - column * kPatch);
  return a * kPatchTableRow + b;
}

// A warp's own patch.
struct OwnPatch {
  int row, column;  // of the block's first patch
  Lane<int> token[2];
  bool any;

  TORUS_DEVICE OwnPatch(const Schedule& schedule, const CrossPlan& plan, const Warp& warp)
      : row(plan.first_row_of(warp.block_x())), column(plan.column_of(warp.block_x())) {
    const auto token_of = [&](int site) {
      const int u = (row + warp.index()) * kPatch + site / kPatch, v = column * kPatch + site % kPatch;
      return u < schedule.num_tracks && v < schedule.track_length ? schedule.site(u, v) : kNoToken;
    };
    for (int half = 0; half < 2; ++half) token[half] = map(token_of, fragment_group() + 8 * half);
    any = cuda::any(token[0] >= 0 || token[1] >= 0);
  }
};

// bring(token, row0, rows) begins to bring up to 32 rows of a strip `column` columns away, of the tokens in its lanes,
// to row0 and on; two patches a warp at a time. They are there on return for the warp's own part.
template <class Bring>
TORUS_DEVICE void stage_strip(const Warp& warp, const Schedule& schedule, const CrossPlan& plan, const OwnPatch& own,
                              int column, const Chunks& strip, Bring bring) {
  for (int row = strip.first + 2 * warp.index(); row <= strip.last; row += 2 * plan.warps) {
    const auto token = [&](int site) {
      return schedule.site((own.row + row) * kPatch + site / kPatch, (own.column + column) * kPatch + site % kPatch);
    };
    bring(map(token, lane_index()), (row - strip.first) * kChunkRows, row < strip.last ? 2 * kChunkRows : kChunkRows);
  }
  warp.commit_copies();
  warp.template wait_copies<0>();
}

// In time there are keys before token 0 in patches before this row, and first_key may hide some in any.
TORUS_DEVICE int first_whole_row(const Operands& in, const CrossPlan& plan, const OwnPatch& own, int column) {
  if (in.first_key != nullptr) return kMaxTokens;
  return plan.first_whole_row(own.column + column) - own.row;
}

// Hides keys from queries in a patch before that row.
TORUS_DEVICE void hide_in_patch(Sum (&scores)[kChunkTiles], const Operands& in, const OwnPatch& own, int row,
                                int column, const Lane<int> (&oldest)[2]) {
  const int n_minor = in.schedule.n_minor;
  const int first = (own.row + row) * kPatch * n_minor + (own.column + column) * kPatch;
  hide_older(scores, in.scale2, oldest, [&](const Lane<int>& site) {
    return (site / kPatch) * n_minor + site % kPatch + first;
  });
}

// The backward's way over the patches.
struct PatchSweep {
  using Plan = CrossPlan;
  using Table = PatchTable;
  const Warp& warp;
  const Operands& in;
  const Plan& plan;
  OwnPatch own;

  TORUS_DEVICE PatchSweep(const Warp& warp, const Operands& in, const Plan& plan)
      : warp(warp), in(in), plan(plan), own(in.schedule, plan, warp) {}

  TORUS_DEVICE bool keeps_rows() const { return false; }

  template <class Put>
  TORUS_DEVICE void fill_table(int k, Put put) const {
    fill_patch_table(in, warp, plan, k, put);
  }

  // As LineSweep's; rows of patches are what is counted from the own one.
  template <bool kInPairs, class Bring, class Visit>
  TORUS_DEVICE void run(int k, const Head& head, bool, Bring bring, Visit visit) const {
    for (int column = 0; column <= kMaxPatchReach; column = CrossPlan::next_column(column)) {
      const Chunks strip = plan.strip(k, own.row, column);
      if (strip.empty()) continue;
      warp.barrier();
      stage_strip(warp, in.schedule, plan, own, column, strip, bring);
      warp.barrier();
      if (!own.any) continue;
      const Lane<int> first = first_place(column);
      // Rows from here on are counted from the first of the strip, as they lie in shared memory.
      const int own_row = warp.index() - strip.first;
      const Chunks seen = plan.reach[k].rows.shifted(warp.index()).within(strip).shifted(-strip.first);
      const int whole = plan.in_time ? first_whole_row(in, plan, own, column) - strip.first : 0;
      int row = seen.first;
      while (true) {
        for (; kInPairs && row < seen.last && row >= whole; row += 2)
          visit(first, row - own_row, ChunkSlots<2>{row}, HidesNothing{});
        if (row > seen.last) break;
        visit(first, row - own_row, ChunkSlots<1>{row}, [&](Sum (&scores)[kChunkTiles]) {
          if (row >= whole) return;
          Lane<int> oldest[2] = {0, 0};
          if constexpr (!kInPairs)
            for (int half = 0; half < 2; ++half) oldest[half] = oldest_key(in, head.batch, own.token[half]);
          hide_in_patch(scores, in, own, row - own_row + warp.index(), column, oldest);
        });
        ++row;
      }
    }
  }
};

}  // namespace torus::cuda
