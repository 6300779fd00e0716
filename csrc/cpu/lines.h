// Line streams: after a change of coordinates a short attention along every line, dense where the lattice is closed
// and banded where time is open. Both arcs of a loop share one tile of scores and one product with V.
#pragma once

#include "head.h"

namespace torus::TORUS_ISA {

// What all lines of a family share in one call.
template <class T>
struct LinePlan {
  LineFamily lines;
  ActiveStreams active;
  int64_t block;       // queries per tile
  int64_t chunk;       // queries per unit of work; a line is cut only where it is open and long
  int64_t max_length;  // of the family's lines
  int64_t max_keys;    // of a unit, rounded up to vectors
  int64_t max_cols;    // of a tile
  bool adjacent;       // neighbours on a line are neighbours in memory
  // Tables over displacement, reversed so that a row reads them forwards: entry `origin - step`.
  int64_t origin, table_size;
  const T* rho_squared;  // shared by both arcs; zero beyond the band

  TORUS_INLINE int64_t chunks() const { return ceil_div(max_length, chunk); }
  TORUS_INLINE int64_t units() const { return lines.num_lines * chunks(); }
  // Chunks of an open line write gradients into their neighbour's keys, so they take turns; lines never meet.
  TORUS_INLINE int64_t turns() const { return chunks() > 1 ? 2 : 1; }
};

template <class T>
LinePlan<T> plan_lines(const Lattice& lattice, Family family, int64_t seq_len) {
  LinePlan<T> plan{};
  plan.lines = line_family(lattice, family, seq_len);
  for (int s = 0; s < plan.lines.num_streams; ++s) plan.active.add(lattice, plan.lines.first_stream + s);
  if (plan.active.count == 0) return plan;
  const int64_t lanes = kLanes<T>;
  plan.max_length = plan.lines.length(0);
  const bool banded = lattice.causal();
  plan.adjacent = family == kMinor;
  plan.block = banded ? 16 : 24;
  const int64_t band = plan.lines.max_step;
  plan.chunk = banded ? min_of(plan.max_length, max_of(4 * plan.block, round_up(4 * band, plan.block)))
                      : plan.max_length;
  plan.max_keys = round_up(banded ? min_of(plan.max_length, plan.chunk + band) : plan.max_length, lanes) + lanes;
  plan.max_cols = banded ? min_of(round_up(plan.block + band, lanes), plan.max_keys) : plan.max_keys;
  const int64_t margin = plan.block + 2 * lanes;
  plan.origin = plan.lines.max_step + margin;
  plan.table_size = round_up(plan.lines.max_step - plan.lines.min_step + 1 + 2 * margin, lanes);
  return plan;
}

template <class T>
void fill_rho_squared(const LinePlan<T>& plan, T* table) {
  for (int64_t x = 0; x < plan.table_size; ++x) {
    const int64_t step = plan.origin - x;
    const bool in_band = step >= plan.lines.min_step && step <= plan.lines.max_step;
    table[x] = in_band ? static_cast<T>(plan.lines.rho_squared(step)) : T(0);
  }
}

template <class T>
void fill_bias(const LinePlan<T>& plan, int stream, T decay, T* table) {
  const T factor = static_cast<T>(-0.5 * kLog2e) * decay;
  for (int64_t x = 0; x < plan.table_size; ++x)
    table[x] = plan.lines.visible(stream, plan.origin - x) ? factor * plan.rho_squared[x] : kNegativeInfinity<T>;
}

// One unit of work: queries [first, last) of a line and the keys that they can see.
template <class T>
struct LineUnit {
  const LinePlan<T>& plan;
  const Head<T>& head;
  int64_t line, first, last;
  int64_t key0, num_keys;  // keys are positions key0 ... key0 + num_keys - 1 of the line
  int64_t padded_dim, key_ld;
  const int64_t* tokens;  // of positions key0 ... last - 1

  TORUS_INLINE LineUnit(const LinePlan<T>& plan, const Head<T>& head, int64_t unit, int64_t* token_buffer)
      : plan(plan), head(head), line(unit / plan.chunks()), tokens(token_buffer) {
    const int64_t length = plan.lines.length(line);
    first = unit % plan.chunks() * plan.chunk;
    last = min_of(length, first + plan.chunk);
    key0 = max_of(0, first - plan.lines.max_step);
    num_keys = max_of(0, min_of(length, last - plan.lines.min_step) - key0);
    padded_dim = head.padded_dim;
    key_ld = plan.max_keys;
    for (int64_t i = 0; i < num_keys; ++i) token_buffer[i] = plan.lines.token(line, key0 + i);
  }

  TORUS_INLINE int64_t token(int64_t i) const { return tokens[i - key0]; }

  // Rows of positions i ... i + n - 1: where they are if they lie one after another, else copied into `buffer`.
  TORUS_INLINE TokenRows<T> rows(const TokenRows<T>& from, int64_t i, int64_t n, T* buffer) const {
    if (plan.adjacent) return {from.at(token(i)), from.stride};
    for (int64_t r = 0; r < n; ++r) {
      prefetch_row(from.at(token(min_of(i + r + kPrefetchRows, i + n - 1))), padded_dim);
      copy_row(from.at(token(i + r)), buffer + r * padded_dim, padded_dim);
    }
    return {buffer, padded_dim};
  }

  // Where to add up rows of positions i ...: in place if they lie one after another, else in a cleared `buffer`, from
  // where `add_back` takes them.
  TORUS_INLINE T* accumulator(T* into, int64_t i, int64_t n, T* buffer) const {
    if (plan.adjacent) return into + token(i) * padded_dim;
    zero(buffer, n * padded_dim);
    return buffer;
  }
  TORUS_INLINE void add_back(T* into, int64_t i, int64_t n, const T* buffer) const {
    if (plan.adjacent) return;
    for (int64_t r = 0; r < n; ++r) {
      prefetch_row(into + token(min_of(i + r + kPrefetchRows, i + n - 1)) * padded_dim, padded_dim);
      add_row(into + token(i + r) * padded_dim, buffer + r * padded_dim, padded_dim);
    }
  }

  // The keys' rows, turned: [Dp, key_ld], zeros behind the last key. `tail` holds the last, incomplete block.
  TORUS_INLINE void turn(const TokenRows<T>& keys, T* turned, T* tail) const {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t whole = num_keys / lanes * lanes, rest = num_keys - whole;
    transpose(keys.data, whole, padded_dim, keys.stride, turned, key_ld);
    int64_t done = whole;
    if (rest > 0) {
      zero(tail, lanes * padded_dim);
      for (int64_t r = 0; r < rest; ++r) copy_row(keys.at(whole + r), tail + r * padded_dim, padded_dim);
      transpose(tail, lanes, padded_dim, padded_dim, turned + whole, key_ld);
      done += lanes;
    }
    for (int64_t d = 0; d < padded_dim; ++d) zero(turned + d * key_ld + done, key_ld - done);
  }
};

// The columns of one tile of queries, and the bias row of each query in it.
template <class T>
struct LineTile {
  const LineUnit<T>& unit;
  int64_t row0, rows;
  int64_t col0, keys, cols;  // keys col0 ... col0 + keys - 1 of the unit; cols: rounded up to vectors

  TORUS_INLINE LineTile(const LineUnit<T>& unit, int64_t row0) : unit(unit), row0(row0) {
    const LineFamily& lines = unit.plan.lines;
    rows = min_of(unit.plan.block, unit.last - row0);
    const int64_t from = max_of(unit.key0, row0 - lines.max_step);
    const int64_t to = min_of(unit.key0 + unit.num_keys, row0 + rows - lines.min_step);
    col0 = from - unit.key0;
    keys = to - from;
    cols = round_up(keys, kLanes<T>);
  }

  TORUS_INLINE void bias_rows(int64_t row, int64_t t, StreamRow<T>* streams, T* buffer, int64_t ld_buffer) const {
    const LinePlan<T>& plan = unit.plan;
    const LineFamily& lines = plan.lines;
    const int64_t at = plan.origin - (row0 + row) + unit.key0 + col0;
    int64_t from = 0;
    if (unit.head.first_key != nullptr) {
      const int64_t oldest = unit.head.oldest_key(t) - unit.line;
      from = max_of(0, (oldest <= 0 ? 0 : ceil_div(oldest, lines.stride)) - unit.key0 - col0);
    }
    // Behind the last key of an open line lies the future, which the table hides; of a closed one, padding.
    const bool hide = from > 0 || (!lines.lattice.causal() && keys < cols);
    for (int s = 0; s < plan.active.count; ++s) {
      const T* bias = unit.head.bias[plan.active.index[s]] + at;
      streams[s].bias = hide ? hide_outside(bias, cols, from, keys, buffer + s * ld_buffer) : bias;
      streams[s].rho_squared = plan.rho_squared + at;
    }
  }
};

template <class T>
struct LineForwardScratch {
  int64_t* tokens;
  T *keys, *values, *tail, *turned_keys, *queries, *scores, *outputs, *exps, *bias;
  LineForwardScratch(const LinePlan<T>& plan, int64_t padded_dim, Arena& arena) {
    tokens = arena.take<int64_t>(plan.max_keys);
    for (T** panel : {&keys, &values, &turned_keys}) *panel = arena.take<T>(plan.max_keys * padded_dim);
    tail = arena.take<T>(kLanes<T> * padded_dim);
    for (T** panel : {&queries, &outputs}) *panel = arena.take<T>(plan.block * padded_dim);
    scores = arena.take<T>(plan.block * plan.max_cols);
    for (T** pair : {&exps, &bias}) *pair = arena.take<T>(kMaxStreamsPerTile * plan.max_cols);
  }
};

template <class T>
void line_forward(const LinePlan<T>& plan, const Head<T>& head, int64_t index, T scale, Arena arena) {
  const int64_t dp = head.padded_dim, ld = plan.max_cols;
  const LineForwardScratch<T> w(plan, dp, arena);
  const LineUnit<T> unit(plan, head, index, w.tokens);
  if (unit.first >= unit.last) return;
  const T scale2 = scale * static_cast<T>(kLog2e);
  unit.turn(unit.rows(head.k, unit.key0, unit.num_keys, w.keys), w.turned_keys, w.tail);
  const TokenRows<T> values = unit.rows(head.v, unit.key0, unit.num_keys, w.values);
  for (int64_t row0 = unit.first; row0 < unit.last; row0 += plan.block) {
    const LineTile<T> tile(unit, row0);
    const TokenRows<T> queries = unit.rows(head.q, row0, tile.rows, w.queries);
    // S = Q K^T
    gemm<T>(tile.rows, tile.cols, dp, {queries.data, every(queries.stride), every(1)}, w.turned_keys + tile.col0,
            unit.key_ld, {w.scores, every(ld), false});
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t t = unit.token(row0 + r);
      StreamRow<T> streams[kMaxStreamsPerTile];
      tile.bias_rows(r, t, streams, w.bias, ld);
      mix_streams(head, plan.active, t, w.scores + r * ld, tile.cols, scale2, streams, w.exps, ld);
    }
    // y += (sum_s g_s P_s) V
    T* outputs = unit.accumulator(head.y, row0, tile.rows, w.outputs);
    gemm<T>(tile.rows, dp, tile.keys, {w.scores, every(ld), every(1)}, values.at(tile.col0), values.stride,
            {outputs, every(dp), true});
    unit.add_back(head.y, row0, tile.rows, w.outputs);
  }
}

template <class T>
struct LineBackwardScratch {
  int64_t* tokens;
  T *keys, *values, *tail, *turned_keys, *turned_values, *queries, *d_out, *scores, *d_probs, *d_queries, *d_keys,
      *d_values, *exps, *bias;
  LineBackwardScratch(const LinePlan<T>& plan, int64_t padded_dim, Arena& arena) {
    tokens = arena.take<int64_t>(plan.max_keys);
    for (T** panel : {&keys, &values, &turned_keys, &turned_values, &d_keys, &d_values})
      *panel = arena.take<T>(plan.max_keys * padded_dim);
    tail = arena.take<T>(kLanes<T> * padded_dim);
    for (T** panel : {&queries, &d_out, &d_queries}) *panel = arena.take<T>(plan.block * padded_dim);
    for (T** panel : {&scores, &d_probs}) *panel = arena.take<T>(plan.block * plan.max_cols);
    for (T** pair : {&exps, &bias}) *pair = arena.take<T>(kMaxStreamsPerTile * plan.max_cols);
  }
};

template <class T>
void line_backward(const LinePlan<T>& plan, const Head<T>& head, int64_t index, T scale, Arena arena) {
  const int64_t dp = head.padded_dim, ld = plan.max_cols;
  const LineBackwardScratch<T> w(plan, dp, arena);
  const LineUnit<T> unit(plan, head, index, w.tokens);
  if (unit.first >= unit.last) return;
  const T scale2 = scale * static_cast<T>(kLog2e);
  const TokenRows<T> keys = unit.rows(head.k, unit.key0, unit.num_keys, w.keys);
  unit.turn(keys, w.turned_keys, w.tail);
  unit.turn(unit.rows(head.v, unit.key0, unit.num_keys, w.values), w.turned_values, w.tail);
  T* const d_keys = unit.accumulator(head.d_k, unit.key0, unit.num_keys, w.d_keys);
  T* const d_values = unit.accumulator(head.d_v, unit.key0, unit.num_keys, w.d_values);
  for (int64_t row0 = unit.first; row0 < unit.last; row0 += plan.block) {
    const LineTile<T> tile(unit, row0);
    const TokenRows<T> queries = unit.rows(head.q, row0, tile.rows, w.queries);
    const TokenRows<T> d_out = unit.rows(head.d_out, row0, tile.rows, w.d_out);
    // S = Q K^T, dP = dO V^T
    gemm<T>(tile.rows, tile.cols, dp, {queries.data, every(queries.stride), every(1)}, w.turned_keys + tile.col0,
            unit.key_ld, {w.scores, every(ld), false});
    gemm<T>(tile.rows, tile.cols, dp, {d_out.data, every(d_out.stride), every(1)}, w.turned_values + tile.col0,
            unit.key_ld, {w.d_probs, every(ld), false});
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t t = unit.token(row0 + r);
      StreamRow<T> streams[kMaxStreamsPerTile];
      tile.bias_rows(r, t, streams, w.bias, ld);
      mix_streams_backward(head, plan.active, t, w.scores + r * ld, w.d_probs + r * ld, tile.cols, scale, scale2,
                           streams, w.exps, ld);
    }
    // dV += P^T dO, dK += dS^T Q, dQ += dS K
    gemm<T>(tile.keys, dp, tile.rows, {w.scores, every(1), every(ld)}, d_out.data, d_out.stride,
            {d_values + tile.col0 * dp, every(dp), true});
    gemm<T>(tile.keys, dp, tile.rows, {w.d_probs, every(1), every(ld)}, queries.data, queries.stride,
            {d_keys + tile.col0 * dp, every(dp), true});
    T* d_queries = unit.accumulator(head.d_q, row0, tile.rows, w.d_queries);
    gemm<T>(tile.rows, dp, tile.keys, {w.d_probs, every(ld), every(1)}, keys.at(tile.col0), keys.stride,
            {d_queries, every(dp), true});
    unit.add_back(head.d_q, row0, tile.rows, w.d_queries);
  }
  unit.add_back(head.d_k, unit.key0, unit.num_keys, w.d_keys);
  unit.add_back(head.d_v, unit.key0, unit.num_keys, w.d_values);
}

}  // namespace torus::TORUS_ISA
