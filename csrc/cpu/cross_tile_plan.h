// The plan of the cross flows on matrix tiles: where a query's runs of keys lie among the scores of its tile, and their
// biases.
#pragma once

#include "band_softmax.h"
#include "cross_plan.h"
#include "tile_products.h"

namespace torus::TORUS_ISA {

struct TileCrossPlan : CrossGrid {
  int64_t lattice_rows;  // of queries in a tile
  int64_t left;        // column x of a padded row of keys holds lattice column x - left
  int64_t width;       // columns of keys that a tile of queries sees
  int64_t key_ld;      // columns of a padded row
  int64_t mixed_ld;    // columns of a query's mixed probabilities; the first is that of b = window.b_hi
  int64_t probs_ld;    // of a tile of them
  int64_t table_size;  // of a stream's biases
  BandStream<float> bands[kMaxStreamsPerTile];        // of the active streams, as these:
  int64_t a_first[kMaxStreamsPerTile], b_first[kMaxStreamsPerTile];  // displacements of the first run's first key
  const float* rho_squared[kMaxStreamsPerTile];

  TORUS_INLINE int64_t window_rows() const { return window.a_hi - window.a_lo + 1; }
  TORUS_INLINE int64_t max_tile_rows() const { return window_rows() + lattice_rows - 1; }
  // Numbers of a tile of scores. The last run is read in whole vectors; what they find behind it must be finite.
  TORUS_INLINE int64_t scores() const { return max_tile_rows() * queries() * width + kTile; }
  TORUS_INLINE int64_t probs() const { return max_tile_rows() * queries() * probs_ld; }
  TORUS_INLINE int64_t queries() const { return lattice_rows * kTile; }
  // The token of a lattice column of a row, or -1 where there is none.
  TORUS_INLINE int64_t token(int64_t row, int64_t col) const {
    const Lattice& lattice = window.lattice;
    if (lattice.causal()) {
      const int64_t t = row * lattice.n_minor + col;
      return t >= 0 && t < seq_len ? t : -1;
    }
    row = wrap_row(row);
    return row < 0 || row >= num_rows ? -1 : row * lattice.n_minor + wrap_once(col, lattice.n_minor);
  }
  TORUS_INLINE int64_t key_columns() const { return num_cols + left - window.b_lo; }
  TORUS_INLINE int64_t key_token(int64_t row, int64_t x) const { return x < key_columns() ? token(row, x - left) : -1; }
};

// The backward takes more rows at a time: every tile adds to the sums of all the keys that it sees.
TORUS_INLINE TileCrossPlan plan_tile_cross(const Lattice& lattice, int64_t seq_len, bool backward) {
  TileCrossPlan plan{};
  static_cast<CrossGrid&>(plan) = plan_cross_grid(lattice, seq_len);
  plan.lattice_rows = backward ? 4 : 2;
  if (plan.active.count == 0) return plan;
  const CrossWindow& window = plan.window;
  // First the stream of the fewer rows: its runs are the longer ones and hold the other's columns.
  int* const stream = plan.active.index;
  if (plan.active.count == 2 && window.radius_u(stream[0]) > window.radius_u(stream[1])) {
    const int first = stream[0];
    stream[0] = stream[1], stream[1] = first;
  }
  plan.left = round_up(window.b_hi, TileProducts::kPerUnit);
  plan.width = round_up(kTile + plan.left - window.b_lo, TileProducts::kGrain);
  plan.key_ld = round_up(plan.num_cols, kTile) - kTile + plan.width;
  plan.probs_ld = plan.width + 2 * kTile;  // rows of mixed probabilities reach beyond what a query sees
  for (int s = 0; s < plan.active.count; ++s) {
    const int64_t radius_u = window.radius_u(stream[s]), radius_v = window.radius_v(stream[s]);
    const int64_t a_hi = min_of(window.a_hi, radius_u), b_hi = min_of(window.b_hi, radius_v);
    BandStream<float>& band = plan.bands[s];
    band.rows = a_hi - max_of(window.a_lo, -radius_u) + 1;
    band.length = b_hi - max_of(window.b_lo, -radius_v) + 1;
    band.score = (window.a_hi - a_hi) * plan.queries() * plan.width + plan.left - b_hi;
    plan.a_first[s] = a_hi, plan.b_first[s] = b_hi;
    plan.mixed_ld = max_of(plan.mixed_ld, window.b_hi - b_hi + round_up(band.length, kTile));
    if (s == 1) {
      band.add_from = a_hi - plan.a_first[0];
      band.add_to = band.add_from + plan.bands[0].rows;
    }
    band.count_vectors();
    plan.table_size = max_of(plan.table_size, band.vectors * kLanes<float>);
  }
  plan.mixed_ld = round_up(plan.mixed_ld, kTile);
  for (int s = 0; s < plan.active.count; ++s)
    plan.bands[s].mixed = (window.a_hi - plan.a_first[s]) * plan.mixed_ld + window.b_hi - plan.b_first[s];
  return plan;
}

// Of the plan's stream number `s`, as the next.
inline void fill_rho_squared(const TileCrossPlan& plan, int s, float* table) {
  plan.bands[s].for_each_place([&](int64_t place, int64_t row, int64_t column) {
    table[place] = row < 0 ? 0.0f
                           : static_cast<float>(plan.window.rho_squared(plan.active.index[s], plan.a_first[s] - row,
                                                                        plan.b_first[s] - column));
  });
}
inline void fill_bias(const TileCrossPlan& plan, int s, float decay, float* table) {
  const float factor = static_cast<float>(-0.5 * kLog2e) * decay;
  plan.bands[s].for_each_place([&](int64_t place, int64_t row, int64_t column) {
    const bool here = row >= 0 && plan.window.visible(plan.active.index[s], plan.a_first[s] - row,
                                                      plan.b_first[s] - column);
    table[place] = here ? factor * plan.rho_squared[s][place] : kNegativeInfinity<float>;
  });
}

}  // namespace torus::TORUS_ISA
