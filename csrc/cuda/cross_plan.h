// How the kernels of the cross flows walk: patches of 4 x 4 own rows against patches of 4 x 4 others, so that chunks of
// sixteen fit the flows' windows in both directions. Own rows are queries and the others keys, or the other way round
// where the schedule is mirrored.
//
// Patches have rows (of the major loop) and columns; a block's own are up to kMaxWarps patches of one column, and the
// others come strip by strip: the patches of one column that any of its own sees. Row and column are counted from the
// block's first patch and go on beyond the lattice's ends.
#pragma once

#include "line_plan.h"

namespace torus::cuda {

constexpr int kPatch = 4;          // sites of a side
static_assert(kPatch * kPatch == kOwnRows, "a patch is what a warp owns");
constexpr int kMaxPatchReach = 2;  // patches that a flow may see on any side
constexpr int kMaxDisplacement = kPatch * kMaxPatchReach + kPatch - 1;
constexpr int kPatchTableRow = 2 * kMaxDisplacement + 2;  // an even number: rows of a warp half lie in different banks
constexpr int kPatchTable = (2 * kMaxDisplacement + 1) * kPatchTableRow;

struct PatchReach {
  Chunks rows, columns;  // from the own patch
};

constexpr int kStripPatches = kMaxWarps + 2 * kMaxPatchReach;

struct CrossPlan {
  static constexpr int table_size = kPatchTable;
  bool fits;        // whether the kernel takes the flows
  bool open;        // there is nothing beyond the major axis' ends
  bool in_time;     // tokens go on from one lattice row to the next, and begin with 0
  int patch_rows, patch_columns;
  int warps;
  int num_blocks;
  Divisor by_blocks;  // of a column
  int sign;         // of displacements, own row less other row, in those of queries from keys
  PatchReach reach[kMaxStreams];

  static TORUS_INLINE constexpr int rows() { return kStripPatches * kOwnRows; }
  TORUS_INLINE constexpr int column_of(int block) const { return by_blocks.quotient(block); }
  TORUS_INLINE constexpr int first_row_of(int block) const { return by_blocks.remainder(block) * warps; }

  // Rows that a strip has for stream k, of a block of `warps` patches from `first_row` on; columns away from its own.
  TORUS_INLINE constexpr Chunks strip(int k, int first_row, int column) const {
    if (!reach[k].columns.has(column)) return {1, 0};
    const Chunks rows{reach[k].rows.first, reach[k].rows.last + warps - 1};
    return open ? rows.within({-first_row, patch_rows - 1 - first_row}) : rows;
  }
  // For all streams.
  TORUS_INLINE constexpr Chunks strip(int first_row, int column) const {
    Chunks all{1, 0};
    for (int k = 0; k < kMaxStreams; ++k) {
      const Chunks rows = strip(k, first_row, column);
      if (rows.empty()) continue;
      all = all.empty() ? rows : Chunks{all.first < rows.first ? all.first : rows.first,
                                        all.last > rows.last ? all.last : rows.last};
    }
    return all;
  }
  // From this patch row on there are keys at all sites of the column; before it only at some.
  TORUS_INLINE constexpr int first_whole_row(int patch_column) const { return patch_column < 0 ? 1 : 0; }
  // Strips in order: the own column first, which every flow sees something of.
  static TORUS_INLINE constexpr int next_column(int column) {
    return column > 0 ? column + 1 : column > -kMaxPatchReach ? column - 1 : 1;
  }
};

TORUS_INLINE constexpr int floor_of_patch(int64_t site) {
  return static_cast<int>((site - floor_mod(site, kPatch)) / kPatch);
}

// Patches that show displacements lo ... hi of queries from keys.
TORUS_INLINE constexpr Chunks patches_of(int64_t lo, int64_t hi, bool mirrored) {
  if (mirrored) return patches_of(-hi, -lo, false);
  return {floor_of_patch(-hi), floor_of_patch(kPatch - 1 - lo)};
}

TORUS_INLINE constexpr CrossPlan cross_plan(const Lattice& lattice, const Schedule& s, int64_t seq_len) {
  const CrossWindow window = cross_window(lattice, seq_len);
  CrossPlan plan{};
  plan.open = lattice.topology == kCylinder;
  plan.in_time = lattice.causal();
  plan.patch_rows = static_cast<int>(ceil_div(s.num_tracks, kPatch));
  plan.patch_columns = static_cast<int>(ceil_div(s.track_length, kPatch));
  plan.warps = static_cast<int>(min_of(kMaxWarps, plan.patch_rows));
  plan.by_blocks = Divisor::of(ceil_div(plan.patch_rows, plan.warps));
  plan.num_blocks = plan.patch_columns * plan.by_blocks.value;
  plan.sign = s.sign();
  // Keys beyond an open end are not hidden where a patch has sites on either side of it; queries there weigh nothing.
  plan.fits = s.num_streams == kMaxStreams && (!plan.open || lattice.n_major % kPatch == 0 || s.mirrored);
  for (int k = 0; k < s.num_streams; ++k) {
    const int64_t u = window.radius_u(s.stream[k]), v = window.radius_v(s.stream[k]);
    PatchReach& reach = plan.reach[k];
    reach.rows = patches_of(max_of(window.a_lo, -u), min_of(window.a_hi, u), s.mirrored);
    reach.columns = patches_of(max_of(window.b_lo, -v), min_of(window.b_hi, v), s.mirrored);
    const Chunks most{-kMaxPatchReach, kMaxPatchReach};
    plan.fits = plan.fits && most.has(reach.rows.first) && most.has(reach.rows.last) &&
                most.has(reach.columns.first) && most.has(reach.columns.last);
  }
  return plan;
}

}  // namespace torus::cuda
