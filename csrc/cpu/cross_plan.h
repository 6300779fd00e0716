// The cross flows' plan: the window cut into bands of equally wide rows, where a query's scores lie, and their biases.
#pragma once

#include "head.h"

namespace torus::TORUS_ISA {

constexpr int64_t kStrip = 2;         // columns of queries in a strip
constexpr int64_t kStripRows = 16;    // rows of queries in a tile
constexpr int64_t kMinUnitRows = 32;  // rows of queries in a unit of work

// Consecutive rows a_first ... a_last of the window that are equally wide.
struct WindowBand {
  int64_t a_first, a_last;
  int64_t b_lo, b_hi;
  int64_t width;  // columns of a tile: what either query of a strip sees, rounded up to half vectors
  int64_t slot;   // of the first row; every row takes `width` slots of a query's scores

  TORUS_INLINE int64_t keys() const { return b_hi - b_lo + kStrip; }
};

constexpr int kMaxBands = 3;  // broad rows between narrow ones

// The grid of queries, and its cut into units of work: whole rows.
struct CrossGrid {
  CrossWindow window;
  ActiveStreams active;
  int64_t seq_len;
  int64_t num_rows, num_cols;
  int64_t num_units;
  int64_t max_unit_rows;

  TORUS_INLINE int64_t first_row(int64_t unit) const { return unit * num_rows / num_units; }
  TORUS_INLINE int64_t wrap_row(int64_t row) const {
    return window.lattice.topology == kPeriodic ? wrap_once(row, num_rows) : row;
  }
  // Units write gradients into their neighbours' keys, so they take turns; around a loop an odd one is left over.
  TORUS_INLINE int64_t turns() const {
    const bool closes = window.lattice.topology == kPeriodic;
    return num_units == 1 ? 1 : closes && num_units % 2 == 1 ? 3 : 2;
  }
  TORUS_INLINE int64_t turn(int64_t unit) const { return turns() == 3 && unit == num_units - 1 ? 2 : unit % 2; }
};

TORUS_INLINE CrossGrid plan_cross_grid(const Lattice& lattice, int64_t seq_len) {
  CrossGrid grid{};
  grid.window = cross_window(lattice, seq_len);
  grid.seq_len = seq_len;
  grid.active.add(lattice, kCrossUToV);
  grid.active.add(lattice, kCrossVToU);
  grid.num_rows = lattice.causal() ? ceil_div(seq_len, lattice.n_minor) : lattice.n_major;
  grid.num_cols = lattice.causal() ? min_of(lattice.n_minor, seq_len) : lattice.n_minor;
  // Halos reach one row further where time winds.
  const int64_t reach = grid.window.a_hi - grid.window.a_lo;
  grid.num_units = max_of(1, grid.num_rows / max_of(kMinUnitRows, reach + 2));
  grid.max_unit_rows = ceil_div(grid.num_rows, grid.num_units);
  return grid;
}

template <class T>
struct CrossPlan : CrossGrid {
  int64_t max_key_rows;
  int64_t key_ld;  // columns of a padded row of keys; column x holds lattice column x - window.b_hi
  int num_bands;
  WindowBand bands[kMaxBands];
  int64_t slots;         // scores of one query, rounded up to vectors
  int64_t unused_slots;  // of these, at the end
  int64_t table_size;    // of a stream's biases: [kStrip, slots]
  const T* rho_squared[kMaxStreamsPerTile];  // likewise, of each active stream

  TORUS_INLINE int64_t token(int64_t row, int64_t col) const {
    const int64_t m = window.lattice.n_minor;
    return row * m + (window.lattice.causal() ? col : wrap_once(col, m));
  }
  // Whether any key lies in this row. Time winds: the right halo of row -1 holds the first tokens.
  TORUS_INLINE bool row_exists(int64_t row) const {
    switch (window.lattice.topology) {
      case kPeriodic: return true;
      case kCylinder: return row >= 0 && row < num_rows;
      default: return row >= -1;
    }
  }
};

template <class T>
CrossPlan<T> plan_cross(const Lattice& lattice, int64_t seq_len) {
  CrossPlan<T> plan{};
  static_cast<CrossGrid&>(plan) = plan_cross_grid(lattice, seq_len);
  if (plan.active.count == 0) return plan;
  const CrossWindow& window = plan.window;
  plan.max_key_rows = plan.max_unit_rows + window.a_hi - window.a_lo;
  const int64_t half = kHalfLanes<T>;
  plan.key_ld =
      round_up(round_up(plan.num_cols, kStrip) + window.b_hi - window.b_lo + half, kLanes<T>);
  int64_t slot = 0;
  for (int64_t a = window.a_lo; a <= window.a_hi; ++a) {
    const int64_t half_width = window.half_width(a);
    const int64_t b_lo = max_of(window.b_lo, -half_width), b_hi = min_of(window.b_hi, half_width);
    WindowBand* band = plan.num_bands > 0 ? &plan.bands[plan.num_bands - 1] : nullptr;
    if (band == nullptr || band->b_lo != b_lo || band->b_hi != b_hi) {
      band = &plan.bands[plan.num_bands++];
      *band = {a, a, b_lo, b_hi, round_up(b_hi - b_lo + kStrip, half), slot};
    }
    band->a_last = a;
    slot += band->width;
  }
  plan.slots = round_up(slot, kLanes<T>);
  plan.unused_slots = plan.slots - slot;
  plan.table_size = kStrip * plan.slots;
  return plan;
}

// Calls visit(column, slot, a, b) for every slot of both queries of a strip.
template <class T, class Visit>
TORUS_INLINE void for_each_slot(const CrossPlan<T>& plan, Visit visit) {
  for (int64_t column = 0; column < kStrip; ++column)
    for (int i = 0; i < plan.num_bands; ++i) {
      const WindowBand& band = plan.bands[i];
      for (int64_t a = band.a_first; a <= band.a_last; ++a)
        for (int64_t x = 0; x < band.width; ++x)
          visit(column, band.slot + (a - band.a_first) * band.width + x, a, column + band.b_hi - x);
    }
}

// Of the plan's stream number `s`.
template <class T>
void fill_rho_squared(const CrossPlan<T>& plan, int s, T* table) {
  zero(table, plan.table_size);
  for_each_slot(plan, [&](int64_t column, int64_t slot, int64_t a, int64_t b) {
    const int stream = plan.active.index[s];
    if (plan.window.visible(stream, a, b))
      table[column * plan.slots + slot] = static_cast<T>(plan.window.rho_squared(stream, a, b));
  });
}

template <class T>
void fill_bias(const CrossPlan<T>& plan, int s, T decay, T* table) {
  const T factor = static_cast<T>(-0.5 * kLog2e) * decay;
  for (int64_t i = 0; i < plan.table_size; ++i) table[i] = kNegativeInfinity<T>;
  for_each_slot(plan, [&](int64_t column, int64_t slot, int64_t a, int64_t b) {
    const int64_t i = column * plan.slots + slot;
    if (plan.window.visible(plan.active.index[s], a, b)) table[i] = factor * plan.rho_squared[s][i];
  });
}

}  // namespace torus::TORUS_ISA
