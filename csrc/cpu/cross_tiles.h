// Cross flows on matrix tiles, in bfloat16: sixteen neighbouring queries of a few lattice rows against rows of keys.
//
// A query sees a run of columns in every row of its window. The runs of sixteen neighbours fill less than two tiles,
// whose other scores are never looked at; their probabilities stay zero. Rows of keys are padded with the columns that
// lie across the seam, and kept as operands only as long as queries see them.
#pragma once

#include "cross.h"
#include "cross_tile_plan.h"

namespace torus::TORUS_ISA {

// What forward and backward share of one unit's scratch: rows of keys as operands, in a ring, and a tile of queries.
struct TileCrossScratch {
  BFloat16 *rows, *queries, *probs;
  float *scores, *mixed, *exps, *bias;

  TileCrossScratch(const TileCrossPlan& plan, int64_t padded_dim, Arena& arena) {
    rows = arena.take<BFloat16>(plan.key_ld * padded_dim);
    queries = arena.take<BFloat16>(plan.queries() * padded_dim);
    probs = arena.take<BFloat16>(plan.probs());
    scores = arena.take<float>(plan.scores());
    mixed = arena.take<float>(plan.window_rows() * plan.mixed_ld);
    exps = arena.take<float>(plan.table_size);
    bias = arena.take<float>(kMaxStreamsPerTile * plan.table_size);
  }
};

// One unit of work: rows [first, last) of queries. Rows of keys live in a ring as long as a tile sees them.
struct TileCrossUnit {
  const TileCrossPlan& plan;
  const Head<TileProducts>& head;
  int64_t first, last;
  int64_t key_row0, padded_dim;
  int64_t panel;  // units in one row of keys as an operand

  TORUS_INLINE TileCrossUnit(const TileCrossPlan& plan, const Head<TileProducts>& head, int64_t unit)
      : plan(plan), head(head), first(plan.first_row(unit)), last(plan.first_row(unit + 1)),
        key_row0(first - plan.window.a_hi), padded_dim(head.padded_dim), panel(plan.key_ld / 2 * padded_dim) {}

  TORUS_INLINE int64_t slot(int64_t key_row) const { return (key_row - key_row0) % plan.max_tile_rows(); }

  // A padded row of tokens [key_ld, Dp], zeros where there is none.
  TORUS_INLINE TokenRows<BFloat16> gather(const TokenRows<BFloat16>& tokens, int64_t row, BFloat16* rows) const {
    for (int64_t x = 0; x < plan.key_ld; ++x) {
      const int64_t token = plan.key_token(row, x);
      if (token < 0) {
        zero(rows + x * padded_dim, padded_dim);
      } else {
        copy_row(tokens.at(token), rows + x * padded_dim, padded_dim);
      }
    }
    return {rows, padded_dim};
  }
  TORUS_INLINE void turn(const TokenRows<BFloat16>& rows, int64_t row, float* panels) const {
    TileProducts::turn(rows, plan.key_ld, padded_dim, panels + slot(row) * panel, plan.key_ld);
  }
  TORUS_INLINE void stack(const TokenRows<BFloat16>& rows, int64_t row, float* panels) const {
    TileProducts::stack(rows, plan.key_ld, padded_dim, panels + slot(row) * panel);
  }
};

// Sixteen columns of queries and a few rows: query (row0 + j, col0 + i) is row 16 j + i of the tile.
struct CrossQueryTile {
  const TileCrossUnit& unit;
  int64_t row0, num_rows, col0;

  TORUS_INLINE int64_t first_key_row() const { return row0 - unit.plan.window.a_hi; }
  TORUS_INLINE int64_t key_rows() const { return unit.plan.window_rows() + num_rows - 1; }
  TORUS_INLINE int64_t query_token(int64_t query) const {
    const int64_t col = col0 + query % kTile;
    return query / kTile < num_rows && col < unit.plan.num_cols ? unit.plan.token(row0 + query / kTile, col) : -1;
  }

  TORUS_INLINE TokenRows<BFloat16> gather(const TokenRows<BFloat16>& tokens, BFloat16* into) const {
    for (int64_t query = 0; query < unit.plan.queries(); ++query) {
      const int64_t t = query_token(query);
      if (t < 0) {
        zero(into + query * unit.padded_dim, unit.padded_dim);
      } else {
        copy_row(tokens.at(t), into + query * unit.padded_dim, unit.padded_dim);
      }
    }
    return {into, unit.padded_dim};
  }
  // Calls finish(token, its row) for every query.
  template <class Finish>
  TORUS_INLINE void scatter(float* rows, Finish finish) const {
    for (int64_t query = 0; query < unit.plan.queries(); ++query) {
      const int64_t t = query_token(query);
      if (t >= 0) finish(t, rows + query * unit.padded_dim);
    }
  }

  TORUS_INLINE int64_t score_row() const { return unit.plan.queries() * unit.plan.width; }
  TORUS_INLINE int64_t probs_row() const { return unit.plan.queries() * unit.plan.probs_ld; }
  // Where the first row of a query's window begins in a tile of scores.
  TORUS_INLINE int64_t score_offset(int64_t query) const {
    return query / kTile * score_row() + query * unit.plan.width + query % kTile;
  }

  // scores [key rows, queries, width] = queries * turned keys
  TORUS_INLINE void multiply_turned(const TokenRows<BFloat16>& queries, const float* panels, float* scores) const {
    for (int64_t r = 0; r < key_rows(); ++r)
      TileProducts::multiply(unit.plan.queries(), unit.plan.width, unit.padded_dim, TileProducts::left(queries),
                             panels + unit.slot(first_key_row() + r) * unit.panel + col0, unit.plan.key_ld,
                             scores + r * score_row(), unit.plan.width, false);
  }
  // outputs [queries, Dp] = sum over `parts` tiles of probs * stacked rows
  TORUS_INLINE void multiply_stacked(const BFloat16* probs, int parts, const float* panels, float* outputs) const {
    const int64_t dp = unit.padded_dim;
    for (int part = 0; part < parts; ++part)
      TileProducts::multiply_sum(
          unit.plan.queries(), dp, unit.plan.width, key_rows(), {probs + part * unit.plan.probs(), unit.plan.probs_ld},
          probs_row(), [&](int64_t r) { return panels + unit.slot(first_key_row() + r) * unit.panel + col0 / 2 * dp; },
          dp, outputs, dp, part > 0);
  }
  // sums [padded row of keys, Dp] += sum over `parts` tiles of probs^T * rows of queries
  TORUS_INLINE void multiply_transposed(const BFloat16* probs, int parts, const TokenRows<float>& queries,
                                        BFloat16* turned, float* sums) const {
    const int64_t dp = unit.padded_dim, turned_size = unit.plan.width * unit.plan.queries();
    for (int64_t r = 0; r < key_rows(); ++r) {
      for (int part = 0; part < parts; ++part)
        turn_probs(probs + part * unit.plan.probs() + r * probs_row(), turned + part * turned_size);
      TileProducts::multiply_sum(
          unit.plan.width, dp, unit.plan.queries(), parts, {turned, unit.plan.queries()}, turned_size,
          [&](int64_t) { return queries.data; }, queries.stride,
          sums + (unit.slot(first_key_row() + r) * unit.plan.key_ld + col0) * dp, dp, true);
    }
  }
  // [queries, width] -> [width, queries]
  TORUS_INLINE void turn_probs(const BFloat16* probs, BFloat16* turned) const {
    const TokenRows<float> pairs =
        TileProducts::stack(TokenRows<BFloat16>{probs, unit.plan.probs_ld}, unit.plan.queries(), unit.plan.width, unit_buffer);
    for (int64_t x = 0; x < unit.plan.width; x += kTile)
      for (int64_t pair = 0; pair < unit.plan.queries() / 2; pair += kTile)
        transpose_block<float>([&](int64_t r) { return pairs.at(pair + r) + x; },
                               reinterpret_cast<float*>(turned + x * unit.plan.queries()) + pair, unit.plan.queries() / 2);
  }
  float* unit_buffer = nullptr;  // [queries / 2, width], backward only

  // Biases of one query, with the keys that do not exist hidden.
  TORUS_INLINE void bias_rows(int64_t query, int64_t t, StreamRow<float>* streams, float* buffer) const {
    const TileCrossPlan& plan = unit.plan;
    const CrossWindow& window = plan.window;
    const bool causal = window.lattice.causal();
    const int64_t m = window.lattice.n_minor, row = row0 + query / kTile;
    const int64_t limit = causal ? t - unit.head.oldest_key(t) : 0;  // the largest lag
    const bool hide = causal ? window.a_hi * m + window.b_hi > limit
                             : window.lattice.topology == kCylinder &&
                                   (row < window.a_hi || row - window.a_lo >= plan.num_rows);
    for (int s = 0; s < plan.active.count; ++s) {
      streams[s].bias = unit.head.bias[plan.active.index[s]];
      if (!hide) continue;
      const BandStream<float>& band = plan.bands[s];
      float* hidden = buffer + s * plan.table_size;
      std::memcpy(hidden, streams[s].bias, static_cast<size_t>(band.vectors * kLanes<float>) * sizeof(float));
      const int64_t run = band.paired() ? kHalfLanes<float> : band.vectors_per_row() * kLanes<float>;
      for (int64_t r = 0; r < band.rows; ++r) {
        const int64_t a = plan.a_first[s] - r;
        const bool exists = causal || (row - a >= 0 && row - a < plan.num_rows);
        const int64_t older = !exists ? band.length : causal ? a * m + plan.b_first[s] - limit : 0;
        for (int64_t i = 0; i < min_of(older, band.length); ++i) hidden[r * run + i] = kNegativeInfinity<float>;
      }
      streams[s].bias = hidden;
    }
  }

  // A query's mixed probabilities, rounded, to where its runs lie among the tile's; what rounding leaves stays behind.
  TORUS_INLINE void place(int64_t query, float* mixed, BFloat16* probs, bool keep_residual) const {
    const TileCrossPlan& plan = unit.plan;
    BFloat16* to = probs + query / kTile * probs_row() + query * plan.probs_ld + query % kTile + plan.left -
                   plan.window.b_hi;
    for (int64_t r = 0; r < plan.window_rows(); ++r, to += probs_row())
      for (int64_t x = 0; x < plan.mixed_ld; x += kTile) {
        float* const from = mixed + r * plan.mixed_ld + x;
        const __m512 wide = _mm512_loadu_ps(from);
        const __m256bh rounded = _mm512_cvtneps_pbh(wide);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + x), reinterpret_cast<__m256i>(rounded));
        if (keep_residual) _mm512_storeu_ps(from, residual_of(wide, rounded));
      }
  }
  TORUS_INLINE void clear(int64_t query, BFloat16* probs) const {
    for (int64_t r = 0; r < unit.plan.max_tile_rows(); ++r)
      zero(probs + r * probs_row() + query * unit.plan.probs_ld, unit.plan.probs_ld);
  }
};

struct TileCrossForwardScratch : TileCrossScratch {
  float *turned_keys, *stacked_values, *outputs;
  TileCrossForwardScratch(const TileCrossPlan& plan, int64_t padded_dim, Arena& arena)
      : TileCrossScratch(plan, padded_dim, arena) {
    const int64_t panels = plan.max_tile_rows() * (plan.key_ld / 2 * padded_dim);
    for (float** panel : {&turned_keys, &stacked_values}) *panel = arena.take<float>(panels);
    outputs = arena.take<float>(plan.queries() * padded_dim);
  }
};

template <class Finish>
void cross_forward(const TileCrossPlan& plan, const Head<TileProducts>& head, int64_t index, float scale, Finish finish,
                   Arena arena) {
  const TileProducts::Session session;
  const TileCrossUnit unit(plan, head, index);
  const int64_t dp = unit.padded_dim;
  const TileCrossForwardScratch w(plan, dp, arena);
  const float scale2 = scale * static_cast<float>(kLog2e);
  zero(w.probs, plan.probs());
  zero(w.scores, plan.scores());
  zero(w.mixed, plan.window_rows() * plan.mixed_ld);
  int64_t next_key_row = unit.key_row0;
  for (int64_t row0 = unit.first; row0 < unit.last; row0 += plan.lattice_rows) {
    const int64_t num_rows = min_of(plan.lattice_rows, unit.last - row0);
    for (; next_key_row < row0 + num_rows - plan.window.a_lo; ++next_key_row) {
      unit.turn(unit.gather(head.k, next_key_row, w.rows), next_key_row, w.turned_keys);
      unit.stack(unit.gather(head.v, next_key_row, w.rows), next_key_row, w.stacked_values);
    }
    for (int64_t col0 = 0; col0 < plan.num_cols; col0 += kTile) {
      const CrossQueryTile tile{unit, row0, num_rows, col0};
      tile.multiply_turned(tile.gather(head.q, w.queries), w.turned_keys, w.scores);
      for (int64_t query = 0; query < plan.queries(); ++query) {
        const int64_t t = tile.query_token(query);
        if (t < 0) {
          tile.clear(query, w.probs);
          continue;
        }
        StreamRow<float> streams[kMaxStreamsPerTile];
        tile.bias_rows(query, t, streams, w.bias);
        const BandQuery<float> at{w.scores + tile.score_offset(query), nullptr, tile.score_row(), w.mixed, nullptr,
                                  plan.mixed_ld, w.exps};
        for (int s = 0; s < plan.active.count; ++s) {
          streams[s].weight = head.weight(t, plan.active.index[s]);
          band_softmax_forward(plan.bands[s], at, scale2, streams[s], head.lse != nullptr, head.entropy != nullptr);
          head.keep_statistics(t, plan.active.index[s], streams[s]);
        }
        tile.place(query, w.mixed, w.probs, false);
      }
      tile.multiply_stacked(w.probs, 1, w.stacked_values, w.outputs);
      tile.scatter(w.outputs, finish);
    }
  }
}

constexpr int kParts = TileProducts::kGradientParts;

struct TileCrossBackwardScratch : TileCrossScratch {
  BFloat16 *d_out, *d_scores, *turned;
  float *turned_keys, *turned_values, *stacked_keys, *d_probs, *d_mixed, *d_queries;
  float *stacked_queries, *stacked_d_out, *pairs, *d_keys, *d_values;
  TileCrossBackwardScratch(const TileCrossPlan& plan, int64_t padded_dim, Arena& arena)
      : TileCrossScratch(plan, padded_dim, arena) {
    const int64_t panel = plan.key_ld / 2 * padded_dim, rows = plan.max_tile_rows();
    d_out = arena.take<BFloat16>(plan.queries() * padded_dim);
    d_scores = arena.take<BFloat16>(kParts * plan.probs());
    turned = arena.take<BFloat16>(kParts * plan.queries() * plan.width);
    for (float** panels : {&turned_keys, &turned_values, &stacked_keys}) *panels = arena.take<float>(rows * panel);
    d_probs = arena.take<float>(plan.scores());
    d_mixed = arena.take<float>(plan.window_rows() * plan.mixed_ld);
    d_queries = arena.take<float>(plan.queries() * padded_dim);
    for (float** stacked : {&stacked_queries, &stacked_d_out})
      *stacked = arena.take<float>(plan.queries() / 2 * padded_dim);
    pairs = arena.take<float>(plan.queries() / 2 * plan.width);
    for (float** sums : {&d_keys, &d_values}) *sums = arena.take<float>(rows * plan.key_ld * padded_dim);
  }
};

template <class Finish>
void cross_backward(const TileCrossPlan& plan, const Head<TileProducts>& head, int64_t index, float scale,
                    Finish finish, Arena arena) {
  const TileProducts::Session session;
  const TileCrossUnit unit(plan, head, index);
  const int64_t dp = unit.padded_dim, sums_of_row = plan.key_ld * dp;
  const TileCrossBackwardScratch w(plan, dp, arena);
  const float scale2 = scale * static_cast<float>(kLog2e);
  zero(w.probs, plan.probs());
  zero(w.d_scores, kParts * plan.probs());
  for (float* scores : {w.scores, w.d_probs}) zero(scores, plan.scores());
  for (float* mixed : {w.mixed, w.d_mixed}) zero(mixed, plan.window_rows() * plan.mixed_ld);
  int64_t next_key_row = unit.key_row0, oldest_key_row = unit.key_row0;
  // Sums of the keys that no later query sees go to the head's.
  const auto retire = [&](int64_t before) {
    for (; oldest_key_row < before; ++oldest_key_row)
      for (int64_t x = 0; x < plan.key_columns(); ++x) {
        const int64_t token = plan.key_token(oldest_key_row, x);
        if (token < 0) continue;
        const int64_t at = unit.slot(oldest_key_row) * sums_of_row + x * dp;
        add_row(head.d_k + token * dp, w.d_keys + at, dp);
        add_row(head.d_v + token * dp, w.d_values + at, dp);
      }
  };
  for (int64_t row0 = unit.first; row0 < unit.last; row0 += plan.lattice_rows) {
    const int64_t num_rows = min_of(plan.lattice_rows, unit.last - row0);
    retire(row0 - plan.window.a_hi);
    for (; next_key_row < row0 + num_rows - plan.window.a_lo; ++next_key_row) {
      const TokenRows<BFloat16> keys = unit.gather(head.k, next_key_row, w.rows);
      unit.turn(keys, next_key_row, w.turned_keys);
      unit.stack(keys, next_key_row, w.stacked_keys);
      unit.turn(unit.gather(head.v, next_key_row, w.rows), next_key_row, w.turned_values);
      for (float* sums : {w.d_keys, w.d_values}) zero(sums + unit.slot(next_key_row) * sums_of_row, sums_of_row);
    }
    for (int64_t col0 = 0; col0 < plan.num_cols; col0 += kTile) {
      const CrossQueryTile tile{unit, row0, num_rows, col0, w.pairs};
      const TokenRows<BFloat16> queries = tile.gather(head.q, w.queries), d_out = tile.gather(head.d_out, w.d_out);
      tile.multiply_turned(queries, w.turned_keys, w.scores);
      tile.multiply_turned(d_out, w.turned_values, w.d_probs);
      for (int64_t query = 0; query < plan.queries(); ++query) {
        const int64_t t = tile.query_token(query);
        if (t < 0) {
          tile.clear(query, w.probs);
          for (int part = 0; part < kParts; ++part) tile.clear(query, w.d_scores + part * plan.probs());
          continue;
        }
        StreamRow<float> streams[kMaxStreamsPerTile];
        tile.bias_rows(query, t, streams, w.bias);
        const int64_t offset = tile.score_offset(query);
        const BandQuery<float> at{w.scores + offset, w.d_probs + offset, tile.score_row(), w.mixed, w.d_mixed,
                                  plan.mixed_ld, w.exps};
        for (int s = 0; s < plan.active.count; ++s) {
          streams[s].weight = head.alpha_at(t) * head.weight(t, plan.active.index[s]);
          band_softmax_backward(plan.bands[s], plan.rho_squared[s], at, scale, scale2, streams[s]);
          head.keep_row_gradients(t, plan.active.index[s], streams[s]);
        }
        tile.place(query, w.mixed, w.probs, false);
        for (int part = 0; part < kParts; ++part)
          tile.place(query, w.d_mixed, w.d_scores + part * plan.probs(), part + 1 < kParts);
      }
      const TokenRows<float> stacked_d_out = TileProducts::stack(d_out, plan.queries(), dp, w.stacked_d_out);
      const TokenRows<float> stacked_queries = TileProducts::stack(queries, plan.queries(), dp, w.stacked_queries);
      tile.multiply_transposed(w.probs, 1, stacked_d_out, w.turned, w.d_values);
      tile.multiply_transposed(w.d_scores, kParts, stacked_queries, w.turned, w.d_keys);
      tile.multiply_stacked(w.d_scores, kParts, w.stacked_keys, w.d_queries);
      tile.scatter(w.d_queries, finish);
    }
  }
  retire(next_key_row);
}

template <>
struct CrossFlows<TileProducts> {
  using Plan = TileCrossPlan;
  using ForwardScratch = TileCrossForwardScratch;
  using BackwardScratch = TileCrossBackwardScratch;
  static Plan plan(const Lattice& lattice, int64_t seq_len, bool backward) {
    return plan_tile_cross(lattice, seq_len, backward);
  }
};

}  // namespace torus::TORUS_ISA
