// Cross flows: windows around every query, computed as bands. A strip is two neighbouring columns of queries and many
// rows: a row of keys that one query of the strip sees is, shifted by a constant, the row that the next one sees, so
// slices of padded key rows serve them all without gathering. Both flows share one tile of scores.
#pragma once

#include "cross_plan.h"
#include "gemm.h"

namespace torus::TORUS_ISA {

// One unit of work: rows [first, last) of queries, all columns, and the padded rows of keys around them.
template <class T>
struct CrossUnit {
  const CrossPlan<T>& plan;
  const Head<VectorProducts<T>>& head;
  int64_t first, last;
  int64_t key_row0, num_key_rows;
  int64_t padded_dim, panel;  // panel: numbers in one padded row of keys

  TORUS_INLINE CrossUnit(const CrossPlan<T>& plan, const Head<VectorProducts<T>>& head, int64_t unit) : plan(plan), head(head) {
    first = plan.first_row(unit);
    last = plan.first_row(unit + 1);
    key_row0 = first - plan.window.a_hi;
    num_key_rows = last - plan.window.a_lo - key_row0;
    padded_dim = head.padded_dim;
    panel = plan.key_ld * padded_dim;
  }

  // The token behind column x of a padded row, or -1 where there is none.
  TORUS_INLINE int64_t key_token(int64_t row, int64_t x) const {
    const CrossWindow& window = plan.window;
    if (x >= plan.num_cols + window.b_hi - window.b_lo) return -1;
    const int64_t token = plan.token(plan.wrap_row(row), x - window.b_hi);
    return token >= 0 && token < plan.seq_len ? token : -1;
  }

  // A padded row of keys, turned: [Dp, key_ld]; zeros where there is no token. `rows` holds [key_ld, Dp].
  TORUS_INLINE void turn(const TokenRows<T>& tokens, int64_t row, T* turned, T* rows) const {
    for (int64_t x = 0; x < plan.key_ld; ++x) {
      const int64_t token = key_token(row, x);
      if (token < 0) {
        zero(rows + x * padded_dim, padded_dim);
      } else {
        copy_row(tokens.at(token), rows + x * padded_dim, padded_dim);
      }
    }
    transpose(rows, plan.key_ld, padded_dim, padded_dim, turned, plan.key_ld);
  }

  // Splits lattice columns [col, col + count) of a row into runs of tokens that lie one after another, and calls
  // visit(offset, token, length) for each; columns without a token are passed over.
  template <class Visit>
  TORUS_INLINE void for_each_run(int64_t row, int64_t col, int64_t count, Visit visit) const {
    const Lattice& lattice = plan.window.lattice;
    if (lattice.causal()) {
      const int64_t token = row * lattice.n_minor + col;
      const int64_t from = max_of(0, -token), to = min_of(count, plan.seq_len - token);
      if (from < to) visit(from, token + from, to - from);
      return;
    }
    const int64_t m = lattice.n_minor, base = plan.wrap_row(row) * m;
    for (int64_t done = 0; done < count;) {
      const int64_t v = wrap_once(col + done, m), length = min_of(count - done, m - v);
      visit(done, base + v, length);
      done += length;
    }
  }
};

// Two columns of queries and up to kStripRows rows: query (row0 + r, col0 + c) is row r * kStrip + c of the tile.
template <class T>
struct CrossTile {
  const CrossUnit<T>& unit;
  int64_t row0, num_rows, col0;

  TORUS_INLINE int64_t query_token(int64_t query) const {
    const int64_t col = col0 + query % kStrip;
    if (col >= unit.plan.num_cols) return -1;
    const int64_t token = unit.plan.token(row0 + query / kStrip, col);
    return token < unit.plan.seq_len ? token : -1;
  }
  TORUS_INLINE int64_t num_queries() const { return num_rows * kStrip; }

  TORUS_INLINE void gather(const TokenRows<T>& tokens, T* into) const {
    for (int64_t query = 0; query < num_queries(); ++query) {
      const int64_t t = query_token(query);
      if (t < 0) {
        zero(into + query * unit.padded_dim, unit.padded_dim);
      } else {
        // The tile to the right comes next.
        prefetch_row(tokens.at(min_of(t + kStrip, unit.plan.seq_len - 1)), unit.padded_dim);
        copy_row(tokens.at(t), into + query * unit.padded_dim, unit.padded_dim);
      }
    }
  }
  // Calls finish(token, its row) for every query.
  template <class Finish>
  TORUS_INLINE void scatter(T* rows, Finish finish) const {
    for (int64_t query = 0; query < num_queries(); ++query) {
      const int64_t t = query_token(query);
      if (t >= 0) finish(t, rows + query * unit.padded_dim);
    }
  }

  // Calls visit(key_row, band, query0, queries, slot0) for every row of keys and band of the window in which some of
  // the tile's queries see it: `queries` of them from query0, whose scores start at slot0 in the first.
  template <class Visit>
  TORUS_INLINE void for_each_slice(Visit visit) const {
    const CrossPlan<T>& plan = unit.plan;
    const int64_t last = row0 + num_rows - 1;
    for (int64_t row = row0 - plan.window.a_hi; row <= last - plan.window.a_lo; ++row)
      for (int i = 0; i < plan.num_bands; ++i) {
        const WindowBand& band = plan.bands[i];
        const int64_t from = max_of(row0, row + band.a_first), to = min_of(last, row + band.a_last);
        if (from > to) continue;
        visit(row, band, (from - row0) * kStrip, (to - from + 1) * kStrip,
              band.slot + (from - row - band.a_first) * band.width);
      }
  }

  // Where a band's keys start in a padded row.
  TORUS_INLINE int64_t column(const WindowBand& band) const { return col0 - band.b_hi + unit.plan.window.b_hi; }
  // Scores of one slice: the next query down sees the row one window row later.
  TORUS_INLINE PairStride score_stride(const WindowBand& band) const {
    return {kStrip * unit.plan.slots + band.width, unit.plan.slots};
  }

  // scores (+)= queries * turned keys
  TORUS_INLINE void multiply_keys(const T* queries, const T* turned, T* scores) const {
    const CrossPlan<T>& plan = unit.plan;
    const int64_t dp = unit.padded_dim;
    for_each_slice([&](int64_t row, const WindowBand& band, int64_t query0, int64_t count, int64_t slot) {
      T* target = scores + query0 * plan.slots + slot;
      const PairStride stride = score_stride(band);
      if (plan.row_exists(row)) {
        gemm<T>(count, band.width, dp, {queries + query0 * dp, every(dp), every(1)},
                turned + (row - unit.key_row0) * unit.panel + column(band), plan.key_ld, {target, stride, false});
      } else {
        for (int64_t i = 0; i < count; ++i) zero(target + stride.at(i), band.width);
      }
    });
    for (int64_t query = 0; query < num_queries(); ++query)
      zero(scores + (query + 1) * plan.slots - plan.unused_slots, plan.unused_slots);
  }

  // outputs += probs * values
  TORUS_INLINE void multiply_values(const T* probs, const TokenRows<T>& values, T* outputs) const {
    const int64_t dp = unit.padded_dim;
    for_each_slice([&](int64_t row, const WindowBand& band, int64_t query0, int64_t count, int64_t slot) {
      if (!unit.plan.row_exists(row)) return;
      unit.for_each_run(row, col0 - band.b_hi, band.keys(), [&](int64_t x, int64_t token, int64_t length) {
        gemm<T>(count, dp, length, {probs + query0 * unit.plan.slots + slot + x, score_stride(band), every(1)},
                values.at(token), values.stride, {outputs + query0 * dp, every(dp), true});
      });
    });
  }

  // key gradients [T, Dp] += probs^T * rows of queries
  TORUS_INLINE void multiply_transposed(const T* probs, const T* queries, T* d_keys) const {
    const int64_t dp = unit.padded_dim;
    for_each_slice([&](int64_t row, const WindowBand& band, int64_t query0, int64_t count, int64_t slot) {
      if (!unit.plan.row_exists(row)) return;
      unit.for_each_run(row, col0 - band.b_hi, band.keys(), [&](int64_t x, int64_t token, int64_t length) {
        gemm<T>(length, dp, count, {probs + query0 * unit.plan.slots + slot + x, every(1), score_stride(band)},
                queries + query0 * dp, dp, {d_keys + token * dp, every(dp), true});
      });
    });
  }

  TORUS_INLINE void bias_rows(int64_t query, int64_t t, StreamRow<T>* streams, T* buffer) const {
    const CrossPlan<T>& plan = unit.plan;
    const CrossWindow& window = plan.window;
    const bool causal = window.lattice.causal();
    const int64_t m = window.lattice.n_minor, row = row0 + query / kStrip, at = query % kStrip * plan.slots;
    const int64_t oldest = causal ? unit.head.oldest_key(t) : 0;
    const bool hide = causal ? t - window.a_hi * m - window.b_hi < oldest
                             : !plan.row_exists(row - window.a_hi) || !plan.row_exists(row - window.a_lo);
    for (int s = 0; s < plan.active.count; ++s) {
      streams[s].bias = unit.head.bias[plan.active.index[s]] + at;
      streams[s].rho_squared = plan.rho_squared[s] + at;
      if (!hide) continue;
      T* hidden = buffer + s * plan.slots;
      for (int64_t i = plan.slots - plan.unused_slots; i < plan.slots; ++i) hidden[i] = kNegativeInfinity<T>;
      for (int i = 0; i < plan.num_bands; ++i) {
        const WindowBand& band = plan.bands[i];
        for (int64_t a = band.a_first; a <= band.a_last; ++a) {
          const int64_t slot = band.slot + (a - band.a_first) * band.width;
          const int64_t leftmost = (row - a) * m + col0 - band.b_hi;
          const int64_t from = !plan.row_exists(row - a) ? band.width
                               : causal                  ? min_of(band.width, max_of(0, oldest - leftmost))
                                                         : 0;
          hide_outside(streams[s].bias + slot, band.width, from, band.width, hidden + slot);
        }
      }
      streams[s].bias = hidden;
    }
  }
};

// Visits all tiles of a unit.
template <class T, class Visit>
TORUS_INLINE void for_each_tile(const CrossUnit<T>& unit, Visit visit) {
  for (int64_t row0 = unit.first; row0 < unit.last; row0 += kStripRows)
    for (int64_t col0 = 0; col0 < unit.plan.num_cols; col0 += kStrip)
      visit(CrossTile<T>{unit, row0, min_of(kStripRows, unit.last - row0), col0});
}

constexpr int64_t kStripQueries = kStrip * kStripRows;

template <class T>
struct CrossForwardScratch {
  T *rows, *turned_keys, *queries, *scores, *outputs, *exps, *bias;
  CrossForwardScratch(const CrossPlan<T>& plan, int64_t padded_dim, Arena& arena) {
    const int64_t panel = plan.key_ld * padded_dim;
    rows = arena.take<T>(panel);
    turned_keys = arena.take<T>(plan.max_key_rows * panel);
    for (T** tile : {&queries, &outputs}) *tile = arena.take<T>(kStripQueries * padded_dim);
    scores = arena.take<T>(kStripQueries * plan.slots);
    for (T** pair : {&exps, &bias}) *pair = arena.take<T>(kMaxStreamsPerTile * plan.slots);
  }
};

// finish(token, row) takes the cross flows' share of every query's y.
template <class T, class Finish>
void cross_forward(const CrossPlan<T>& plan, const Head<VectorProducts<T>>& head, int64_t index, T scale, Finish finish,
                   Arena arena) {
  const CrossUnit<T> unit(plan, head, index);
  const int64_t dp = unit.padded_dim;
  const CrossForwardScratch<T> w(plan, dp, arena);
  const T scale2 = scale * static_cast<T>(kLog2e);
  for (int64_t r = 0; r < unit.num_key_rows; ++r) {
    if (!plan.row_exists(unit.key_row0 + r)) continue;
    unit.turn(head.k, unit.key_row0 + r, w.turned_keys + r * unit.panel, w.rows);
  }
  for_each_tile(unit, [&](const CrossTile<T>& tile) {
    tile.gather(head.q, w.queries);
    tile.multiply_keys(w.queries, w.turned_keys, w.scores);
    for (int64_t query = 0; query < tile.num_queries(); ++query) {
      const int64_t t = tile.query_token(query);
      if (t < 0) continue;
      StreamRow<T> streams[kMaxStreamsPerTile];
      tile.bias_rows(query, t, streams, w.bias);
      mix_streams(head, plan.active, t, w.scores + query * plan.slots, plan.slots, scale2, streams, w.exps,
                  plan.slots);
    }
    zero(w.outputs, tile.num_queries() * dp);
    tile.multiply_values(w.scores, head.v, w.outputs);
    tile.scatter(w.outputs, finish);
  });
}

template <class T>
struct CrossBackwardScratch {
  T *turned_keys, *turned_values, *rows, *queries, *d_out, *d_queries, *scores, *d_probs, *exps, *bias;
  CrossBackwardScratch(const CrossPlan<T>& plan, int64_t padded_dim, Arena& arena) {
    const int64_t panel = plan.key_ld * padded_dim;
    for (T** panels : {&turned_keys, &turned_values}) *panels = arena.take<T>(plan.max_key_rows * panel);
    rows = arena.take<T>(panel);
    for (T** tile : {&queries, &d_out, &d_queries}) *tile = arena.take<T>(kStripQueries * padded_dim);
    for (T** tile : {&scores, &d_probs}) *tile = arena.take<T>(kStripQueries * plan.slots);
    for (T** pair : {&exps, &bias}) *pair = arena.take<T>(kMaxStreamsPerTile * plan.slots);
  }
};

// finish(token, row) takes the cross flows' share of every query's gradient.
template <class T, class Finish>
void cross_backward(const CrossPlan<T>& plan, const Head<VectorProducts<T>>& head, int64_t index, T scale,
                    Finish finish, Arena arena) {
  const CrossUnit<T> unit(plan, head, index);
  const int64_t dp = unit.padded_dim;
  const CrossBackwardScratch<T> w(plan, dp, arena);
  const T scale2 = scale * static_cast<T>(kLog2e);
  for (int64_t r = 0; r < unit.num_key_rows; ++r) {
    if (!plan.row_exists(unit.key_row0 + r)) continue;
    const int64_t at = r * unit.panel;
    unit.turn(head.k, unit.key_row0 + r, w.turned_keys + at, w.rows);
    unit.turn(head.v, unit.key_row0 + r, w.turned_values + at, w.rows);
  }
  for_each_tile(unit, [&](const CrossTile<T>& tile) {
    tile.gather(head.q, w.queries);
    tile.gather(head.d_out, w.d_out);
    tile.multiply_keys(w.queries, w.turned_keys, w.scores);
    tile.multiply_keys(w.d_out, w.turned_values, w.d_probs);
    for (int64_t query = 0; query < tile.num_queries(); ++query) {
      const int64_t t = tile.query_token(query);
      T *scores = w.scores + query * plan.slots, *d_probs = w.d_probs + query * plan.slots;
      if (t < 0) {
        zero(scores, plan.slots);
        zero(d_probs, plan.slots);
        continue;
      }
      StreamRow<T> streams[kMaxStreamsPerTile];
      tile.bias_rows(query, t, streams, w.bias);
      mix_streams_backward(head, plan.active, t, scores, d_probs, plan.slots, scale, scale2, streams, w.exps,
                           plan.slots);
    }
    tile.multiply_transposed(w.scores, w.d_out, head.d_v);
    tile.multiply_transposed(w.d_probs, w.queries, head.d_k);
    zero(w.d_queries, tile.num_queries() * dp);
    tile.multiply_values(w.d_probs, head.k, w.d_queries);
    tile.scatter(w.d_queries, finish);
  });
}

// How a kind of products goes about the cross flows: a plan, with overloads of fill_rho_squared, fill_bias, cross_forward
// and cross_backward for it.
template <class P>
struct CrossFlows {
  using T = typename P::Compute;
  using Plan = CrossPlan<T>;
  using ForwardScratch = CrossForwardScratch<T>;
  using BackwardScratch = CrossBackwardScratch<T>;
  static Plan plan(const Lattice& lattice, int64_t seq_len, bool) { return plan_cross<T>(lattice, seq_len); }
};

}  // namespace torus::TORUS_ISA
