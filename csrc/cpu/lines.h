// Line streams: after a change of coordinates a short attention along every line, dense where the lattice is closed
// and banded where time is open. Both arcs of a loop share one tile of scores, one exponential and one product with V.
//
// Tiles are stored by key, so that queries are lanes. `P` is the kind of products (products.h), `T` its compute type
// and `E` the type of its operands.
#pragma once

#include "columns.h"
#include "head.h"
#include "products.h"

namespace torus::TORUS_ISA {

// What all lines of a family share in one call.
template <class T>
struct LinePlan {
  LineFamily lines;
  ActiveStreams active;
  int64_t block;       // queries per tile, whole vectors
  int64_t chunk;       // queries per unit of work; a line is cut only where it is open and long
  int64_t grain;       // what rows and depths are padded to
  int64_t max_length;  // of the family's lines
  int64_t max_keys;    // of a unit, with room for padding
  int64_t max_rows;    // of a tile, likewise
  bool adjacent;       // neighbours on a line are neighbours in memory
  // Tables over displacement: entry `origin + step`.
  int64_t origin, table_size;
  const T* rho_squared;  // shared by both arcs; zero beyond the band
  int num_shared;        // displacements that both arcs see
  int64_t shared[kMaxSharedSteps];

  // Whether a unit is a whole line, all of whose tiles see all of it.
  TORUS_INLINE bool dense() const { return !lines.lattice.causal(); }
  TORUS_INLINE int64_t chunks() const { return ceil_div(max_length, chunk); }
  TORUS_INLINE int64_t units() const { return lines.num_lines * chunks(); }
  // Chunks of an open line write gradients into their neighbour's keys, so they take turns; lines never meet.
  TORUS_INLINE int64_t turns() const { return chunks() > 1 ? 2 : 1; }
  TORUS_INLINE bool is_shared(int64_t step) const {
    for (int n = 0; n < num_shared; ++n)
      if (shared[n] == step) return true;
    return false;
  }
};

template <class P, class T = typename P::Compute>
LinePlan<T> plan_lines(const Lattice& lattice, Family family, int64_t seq_len) {
  LinePlan<T> plan{};
  plan.lines = line_family(lattice, family, seq_len);
  const LineFamily& lines = plan.lines;
  for (int s = 0; s < lines.num_streams; ++s) plan.active.add(lattice, lines.first_stream + s);
  if (plan.active.count == 0) return plan;
  if (plan.active.count == 2)
    for (int64_t step = lines.min_step; step <= lines.max_step; ++step)
      if (lines.visible(lines.first_stream, step) && lines.visible(lines.first_stream + 1, step))
        plan.shared[plan.num_shared++] = step;
  plan.max_length = lines.length(0);
  const bool banded = lattice.causal();
  plan.adjacent = family == kMinor;
  plan.grain = P::kGrain;
  plan.block = banded ? P::kBanded : P::kDense;
  const int64_t band = lines.max_step;
  plan.chunk = banded ? min_of(round_up(plan.max_length, plan.block),
                               max_of(4 * plan.block, round_up(4 * band, plan.block)))
                      : plan.max_length;
  const int64_t room = 2 * plan.grain;
  plan.max_keys = round_up(banded ? min_of(plan.max_length, plan.chunk + band) : plan.max_length, plan.grain) + room;
  plan.max_rows = min_of(banded ? round_up(plan.block + band, plan.grain) + room : plan.max_keys, plan.max_keys);
  // A tile reaches so far beyond the band: its keys begin at a whole grain, its lanes fill vectors.
  const int64_t margin = plan.block + plan.grain + kLanes<T>;
  plan.origin = margin - lines.min_step;
  plan.table_size = round_up(lines.max_step - lines.min_step + 1 + 2 * margin, kLanes<T>);
  return plan;
}

template <class T>
void fill_rho_squared(const LinePlan<T>& plan, T* table) {
  for (int64_t x = 0; x < plan.table_size; ++x) {
    const int64_t step = x - plan.origin;
    const bool in_band = step >= plan.lines.min_step && step <= plan.lines.max_step;
    table[x] = in_band ? static_cast<T>(plan.lines.rho_squared(step)) : T(0);
  }
}

// Biases of the plan's stream number `s`; the second leaves shared steps out.
template <class T>
void fill_bias(const LinePlan<T>& plan, int s, T decay, T* table) {
  const T factor = static_cast<T>(-0.5 * kLog2e) * decay;
  for (int64_t x = 0; x < plan.table_size; ++x) {
    const int64_t step = x - plan.origin;
    const bool here = plan.lines.visible(plan.active.index[s], step) && !(s == 1 && plan.is_shared(step));
    table[x] = here ? factor * plan.rho_squared[x] : kNegativeInfinity<T>;
  }
}

// One unit of work: queries [first, last) of a line and the keys that they can see.
template <class P>
struct LineUnit {
  using T = typename P::Compute;
  using E = typename P::Element;
  const LinePlan<T>& plan;
  const Head<P>& head;
  int64_t line, first, last;
  int64_t key0, num_keys;  // keys are positions key0 ... key0 + num_keys - 1 of the line
  int64_t padded_dim;
  const int64_t* tokens;  // of positions key0 ... last - 1

  TORUS_INLINE LineUnit(const LinePlan<T>& plan, const Head<P>& head, int64_t unit, int64_t* token_buffer)
      : plan(plan), head(head), line(unit / plan.chunks()), tokens(token_buffer) {
    const int64_t length = plan.lines.length(line);
    first = unit % plan.chunks() * plan.chunk;
    last = min_of(length, first + plan.chunk);
    key0 = max_of(0, first - plan.lines.max_step);
    num_keys = max_of(0, min_of(length, last - plan.lines.min_step) - key0);
    padded_dim = head.padded_dim;
    for (int64_t i = 0; i < num_keys; ++i) token_buffer[i] = plan.lines.token(line, key0 + i);
  }

  TORUS_INLINE int64_t token(int64_t i) const { return tokens[i - key0]; }
  TORUS_INLINE int64_t padded(int64_t n) const { return round_up(n, plan.grain); }
  // Whether n rows are used where they are: one after another, and nothing is made of the rows behind them.
  TORUS_INLINE bool in_place(int64_t n) const {
    return plan.adjacent && (P::kGrain == 1 || (!plan.lines.lattice.causal() && n % plan.grain == 0));
  }

  // Rows of positions i ... i + n - 1, wherever they are, and zeros behind them.
  TORUS_INLINE ScatteredRows<E> scattered(const TokenRows<E>& from, int64_t i, int64_t n) const {
    return {from, tokens + (i - key0), n, head.zeros};
  }

  // The same: where they are, or copied into `buffer` and padded.
  TORUS_INLINE TokenRows<E> rows(const TokenRows<E>& from, int64_t i, int64_t n, E* buffer) const {
    if (in_place(n)) return {from.at(token(i)), from.stride};
    for (int64_t r = 0; r < n; ++r) {
      prefetch_row(from.at(token(min_of(i + r + kPrefetchRows, i + n - 1))), padded_dim);
      copy_row(from.at(token(i + r)), buffer + r * padded_dim, padded_dim);
    }
    zero(buffer + n * padded_dim, (padded(n) - n) * padded_dim);
    return {buffer, padded_dim};
  }

  // The same as a right operand whose depth they are.
  TORUS_INLINE TokenRows<typename P::Unit> stack(const TokenRows<E>& from, int64_t i, int64_t n,
                                                 typename P::Unit* buffer) const {
    if constexpr (P::kPerUnit == 1) {
      return rows(from, i, n, buffer);
    } else {
      return P::stack(scattered(from, i, n), padded(n), padded_dim, buffer);
    }
  }

  // Where products add up rows of positions i ...: in place, or in `buffer`, from where `add_back` takes them.
  TORUS_INLINE T* accumulator(T* into, int64_t i, int64_t n, T* buffer) const {
    return in_place(n) ? into + token(i) * padded_dim : buffer;
  }
  // `first` says that nothing has been added up there before: rows are then stored.
  TORUS_INLINE void add_back(T* into, int64_t i, int64_t n, const T* buffer, bool first) const {
    if (in_place(n)) return;
    for (int64_t r = 0; r < n; ++r) {
      prefetch_row(into + token(min_of(i + r + kPrefetchRows, i + n - 1)) * padded_dim, padded_dim);
      T* const row = into + token(i + r) * padded_dim;
      if (first) {
        copy_row(buffer + r * padded_dim, row, padded_dim);
      } else {
        add_row(row, buffer + r * padded_dim, padded_dim);
      }
    }
  }
};

// One tile: queries row0 ... and the keys that any of them sees.
template <class P>
struct LineTile {
  using T = typename P::Compute;
  const LineUnit<P>& unit;
  int64_t row0, queries;  // of the line
  int64_t col0, keys;     // keys col0 ... col0 + keys - 1 of the unit

  TORUS_INLINE LineTile(const LineUnit<P>& unit, int64_t row0) : unit(unit), row0(row0) {
    const LineFamily& lines = unit.plan.lines;
    queries = min_of(unit.plan.block, unit.last - row0);
    // Right operands may hold keys in pairs, so that a tile starts at a whole grain.
    const int64_t from = max_of(0, row0 - lines.max_step - unit.key0) / unit.plan.grain * unit.plan.grain;
    const int64_t to = min_of(unit.num_keys, row0 + queries - lines.min_step - unit.key0);
    col0 = from;
    keys = to - from;
  }

  // The softmaxes of the vector of queries from row0 + lane0.
  TORUS_INLINE Columns<T> columns(int64_t lane0, T* scores, int64_t ld, T scale2, bool backward) const {
    const LinePlan<T>& plan = unit.plan;
    const Head<P>& head = unit.head;
    const LineFamily& lines = plan.lines;
    Columns<T> c;
    c.scores = scores + lane0;
    c.ld = ld, c.keys = keys, c.scale2 = scale2;
    c.count = plan.active.count;
    const int64_t lanes = min_of(kLanes<T>, queries - lane0);
    const int64_t step = row0 + lane0 - (unit.key0 + col0);  // from the first row's key to the first lane's query
    c.hide = false;
    if (head.first_key != nullptr) {
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        const int64_t oldest = head.oldest_key(unit.token(row0 + lane0 + min_of(i, lanes - 1))) - unit.line;
        const int64_t row = (oldest <= 0 ? 0 : ceil_div(oldest, lines.stride)) - unit.key0 - col0;
        c.oldest[i] = static_cast<typename Columns<T>::Index>(max_of(0, row));
        c.hide = c.hide || row > 0;
      }
    }
    for (int s = 0; s < c.count; ++s) {
      ColumnStream<T>& stream = c.streams[s];
      const int index = plan.active.index[s];
      stream.bias = head.bias[index] + plan.origin + step;
      stream.rho_squared = plan.rho_squared + plan.origin + step;
      T weight[kLanes<T>] = {};
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t t = unit.token(row0 + lane0 + i);
        // Alpha is folded in, so that delta is d_out . O_s, which the gradients of weights and alpha are made of.
        weight[i] = backward ? head.alpha_at(t) * head.weight(t, index) : head.weight(t, index);
      }
      stream.weight = load(weight);
    }
    c.shared_count = plan.num_shared;
    for (int n = 0; n < plan.num_shared; ++n) {
      const int64_t shared = plan.shared[n];
      const T rho_squared = plan.rho_squared[plan.origin + shared];
      c.shared[n] = {step - shared, static_cast<T>(-0.5 * kLog2e) * head.decay[plan.active.index[1]] * rho_squared,
                     rho_squared};
    }
    return c;
  }

  // Numbers of a vector of queries, one stream: into rows of eight.
  TORUS_INLINE void scatter(int64_t lane0, int stream, Vec<T> x, T* rows) const {
    if (rows == nullptr) return;
    T lanes[kLanes<T>];
    store(lanes, x);
    for (int64_t i = 0; i < min_of(kLanes<T>, queries - lane0); ++i)
      rows[unit.token(row0 + lane0 + i) * kNumStreams + stream] = lanes[i];
  }

  // What lies beyond the last key and the last query must not matter to products that read whole grains.
  TORUS_INLINE void clear_padding(T* tile, int64_t ld) const {
    if constexpr (P::kGrain > 1) {
      zero(tile + keys * ld, (unit.padded(keys) - keys) * ld);
      if (queries == ld) return;
      for (int64_t r = 0; r < keys; ++r) zero(tile + r * ld + queries, ld - queries);
    }
  }
};

template <class P>
struct LineForwardScratch {
  using T = typename P::Compute;
  int64_t* tokens;
  typename P::Element *keys, *probs;
  typename P::Unit *stacked_values, *turned_queries;
  T *scores, *outputs;
  LineForwardScratch(const LinePlan<T>& plan, int64_t padded_dim, Arena& arena) {
    tokens = arena.take<int64_t>(plan.max_keys);
    keys = arena.take<typename P::Element>(plan.max_keys * padded_dim);
    stacked_values = arena.take<typename P::Unit>(P::units_of_depth(plan.max_keys) * padded_dim);
    turned_queries = arena.take<typename P::Unit>(P::units_of_depth(padded_dim) * plan.block);
    scores = arena.take<T>(plan.max_rows * plan.block);
    probs = arena.take<typename P::Element>(plan.block * plan.max_rows);
    outputs = arena.take<T>(plan.block * padded_dim);
  }
};

// `first`: no family before this one has begun the head's sums.
template <class P>
void line_forward(const LinePlan<typename P::Compute>& plan, const Head<P>& head, int64_t index,
                  typename P::Compute scale, bool first, Arena arena) {
  using T = typename P::Compute;
  [[maybe_unused]] const typename P::Session session;
  const int64_t dp = head.padded_dim, ld = plan.block;
  const LineForwardScratch<P> w(plan, dp, arena);
  const LineUnit<P> unit(plan, head, index, w.tokens);
  if (unit.first >= unit.last) return;
  const T scale2 = scale * static_cast<T>(kLog2e);
  const auto keys = unit.rows(head.k, unit.key0, unit.num_keys, w.keys);
  const auto values = unit.stack(head.v, unit.key0, unit.num_keys, w.stacked_values);
  for (int64_t row0 = unit.first; row0 < unit.last; row0 += plan.block) {
    const LineTile<P> tile(unit, row0);
    const int64_t rows = unit.padded(tile.keys), lanes = round_up(tile.queries, kLanes<T>);
    P::turn(unit.scattered(head.q, row0, tile.queries), unit.padded(lanes), dp, w.turned_queries, ld);
    // S^T = K Q^T
    P::multiply(rows, unit.padded(lanes), dp, P::left(keys.from(tile.col0)), w.turned_queries, ld, w.scores, ld, false);
    for (int64_t lane0 = 0; lane0 < lanes; lane0 += kLanes<T>) {
      Columns<T> columns = tile.columns(lane0, w.scores, ld, scale2, false);
      softmax_columns(columns, head.lse != nullptr, head.entropy != nullptr);
      for (int s = 0; s < columns.count; ++s) {
        tile.scatter(lane0, plan.active.index[s], columns.streams[s].lse, head.lse);
        tile.scatter(lane0, plan.active.index[s], columns.streams[s].entropy, head.entropy);
      }
    }
    tile.clear_padding(w.scores, ld);
    // y += (sum_s g_s P_s) V
    T* outputs = unit.accumulator(head.y, row0, tile.queries, w.outputs);
    const auto depth = values.from(tile.col0 / P::kPerUnit);
    P::multiply(unit.padded(tile.queries), dp, rows, P::by_query(w.scores, rows, ld, w.probs), depth.data,
                depth.stride, outputs, dp, outputs != w.outputs && !first);
    unit.add_back(head.y, row0, tile.queries, w.outputs, first);
  }
}

template <class P>
struct LineBackwardScratch {
  using T = typename P::Compute;
  int64_t* tokens;
  typename P::Element *keys, *values, *probs;
  typename P::Unit *stacked_keys, *stacked_queries, *stacked_d_out, *turned_queries, *turned_d_out;
  T *scores, *d_probs, *d_queries, *d_keys, *d_values;
  LineBackwardScratch(const LinePlan<T>& plan, int64_t padded_dim, Arena& arena) {
    tokens = arena.take<int64_t>(plan.max_keys);
    for (auto** rows : {&keys, &values}) *rows = arena.take<typename P::Element>(plan.max_keys * padded_dim);
    stacked_keys = arena.take<typename P::Unit>(P::units_of_depth(plan.max_keys) * padded_dim);
    for (T** rows : {&d_keys, &d_values}) *rows = arena.take<T>(plan.max_keys * padded_dim);
    for (auto** rows : {&stacked_queries, &stacked_d_out})
      *rows = arena.take<typename P::Unit>(P::units_of_depth(plan.block) * padded_dim);
    for (auto** rows : {&turned_queries, &turned_d_out})
      *rows = arena.take<typename P::Unit>(P::units_of_depth(padded_dim) * plan.block);
    for (T** tile : {&scores, &d_probs}) *tile = arena.take<T>(plan.max_rows * plan.block);
    probs = arena.take<typename P::Element>(plan.block * plan.max_rows);
    d_queries = arena.take<T>(plan.block * padded_dim);
  }
};

// Which of the head's sums no family before this one has begun.
struct FirstSums {
  bool queries, keys;
};

template <class P>
void line_backward(const LinePlan<typename P::Compute>& plan, const Head<P>& head, int64_t index,
                   typename P::Compute scale, FirstSums first, Arena arena) {
  using T = typename P::Compute;
  [[maybe_unused]] const typename P::Session session;
  const int64_t dp = head.padded_dim, ld = plan.block;
  const LineBackwardScratch<P> w(plan, dp, arena);
  const LineUnit<P> unit(plan, head, index, w.tokens);
  if (unit.first >= unit.last) return;
  const T scale2 = scale * static_cast<T>(kLog2e);
  const int64_t all_keys = unit.padded(unit.num_keys);
  const auto keys = unit.rows(head.k, unit.key0, unit.num_keys, w.keys);
  const auto values = unit.rows(head.v, unit.key0, unit.num_keys, w.values);
  const auto stacked_keys = P::stack(keys, all_keys, dp, w.stacked_keys);
  T* const d_keys = unit.accumulator(head.d_k, unit.key0, unit.num_keys, w.d_keys);
  T* const d_values = unit.accumulator(head.d_v, unit.key0, unit.num_keys, w.d_values);
  // Every tile of a dense line sees all its keys, so that the first one may begin their sums.
  const bool buffered = d_keys == w.d_keys, begins = plan.dense() && (buffered || first.keys);
  if (buffered && !begins)
    for (T* sums : {w.d_keys, w.d_values}) zero(sums, all_keys * dp);
  for (int64_t row0 = unit.first; row0 < unit.last; row0 += plan.block) {
    const LineTile<P> tile(unit, row0);
    const int64_t rows = unit.padded(tile.keys), lanes = round_up(tile.queries, kLanes<T>);
    const int64_t cols = unit.padded(lanes), depth = unit.padded(tile.queries);
    P::turn(unit.scattered(head.q, row0, tile.queries), cols, dp, w.turned_queries, ld);
    P::turn(unit.scattered(head.d_out, row0, tile.queries), cols, dp, w.turned_d_out, ld);
    // S^T = K Q^T, dP^T = V dO^T
    P::multiply(rows, cols, dp, P::left(keys.from(tile.col0)), w.turned_queries, ld, w.scores, ld, false);
    P::multiply(rows, cols, dp, P::left(values.from(tile.col0)), w.turned_d_out, ld, w.d_probs, ld, false);
    for (int64_t lane0 = 0; lane0 < lanes; lane0 += kLanes<T>) {
      Columns<T> columns = tile.columns(lane0, w.scores, ld, scale2, true);
      softmax_columns_backward(columns, w.d_probs + lane0, scale);
      for (int s = 0; s < columns.count; ++s) {
        tile.scatter(lane0, plan.active.index[s], columns.streams[s].delta, head.delta);
        tile.scatter(lane0, plan.active.index[s], columns.streams[s].d_decay, head.d_decay);
      }
    }
    tile.clear_padding(w.scores, ld);
    tile.clear_padding(w.d_probs, ld);
    // dV += P^T dO, dK += dS^T Q, dQ += dS K
    const auto d_out_rows = unit.stack(head.d_out, row0, tile.queries, w.stacked_d_out);
    P::multiply(rows, dp, depth, P::by_key(w.scores, rows, ld, w.probs), d_out_rows.data, d_out_rows.stride,
                d_values + tile.col0 * dp, dp, !begins || row0 > unit.first);
    const auto query_rows = unit.stack(head.q, row0, tile.queries, w.stacked_queries);
    const auto key_rows = stacked_keys.from(tile.col0 / P::kPerUnit);
    T* d_queries = unit.accumulator(head.d_q, row0, tile.queries, w.d_queries);
    for (int part = 0; part < P::kGradientParts; ++part) {
      if (part > 0) P::keep_residual(w.d_probs, rows * ld);
      P::multiply(rows, dp, depth, P::by_key(w.d_probs, rows, ld, w.probs), query_rows.data, query_rows.stride,
                  d_keys + tile.col0 * dp, dp, part > 0 || !begins || row0 > unit.first);
      P::multiply(depth, dp, rows, P::by_query(w.d_probs, rows, ld, w.probs), key_rows.data, key_rows.stride,
                  d_queries, dp, part > 0 || (d_queries != w.d_queries && !first.queries));
    }
    unit.add_back(head.d_q, row0, tile.queries, w.d_queries, first.queries);
  }
  unit.add_back(head.d_k, unit.key0, unit.num_keys, w.d_keys, first.keys);
  unit.add_back(head.d_v, unit.key0, unit.num_keys, w.d_values, first.keys);
}

}  // namespace torus::TORUS_ISA
