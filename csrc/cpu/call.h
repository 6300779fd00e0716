// What one call of attention shares among its heads, and the order of the work: streams of a head run family by family
// into one accumulator, in a fixed order whatever the number of threads, so that results repeat to the bit.
#pragma once

#include "cross.h"
#include "lines.h"
#include "team.h"

namespace torus::TORUS_ISA {

constexpr int64_t kTokensPerUnit = 256;  // of work that goes token by token
constexpr int kRowsBesideFamily = 2;     // of scratch, for what is done token by token
constexpr int64_t kMaxTeamHeads = 256;   // that one group of threads works on together

// Everything about a call that does not depend on the head.
template <class P>
struct Call {
  using T = typename P::Compute;
  using E = typename P::Element;
  const AttentionInputs& in;
  const Runtime& runtime;
  int64_t padded_dim;
  T scale;
  LinePlan<T> lines[kNumFamilies];
  using Cross = CrossFlows<P>;
  using CrossPlan = typename Cross::Plan;
  CrossPlan cross;
  int64_t table_offset[kNumStreams];  // of each stream's bias in a head's tables
  int64_t table_count;
  int64_t group;   // query heads of a key/value head
  const E* zeros;  // [Dp]

  Call(const AttentionInputs& in, const Runtime& runtime, bool backward) : in(in), runtime(runtime) {
    padded_dim = round_up(in.head_dim, P::kLanesOfDim);
    scale = static_cast<T>(in.scale);
    group = in.heads / in.kv_heads;
    E* const no_token = allocate<E>(padded_dim);
    zero(no_token, padded_dim);
    zeros = no_token;
    table_count = 0;
    for (int f = 0; f < kNumFamilies; ++f) {
      lines[f] = plan_lines<P>(in.lattice, static_cast<Family>(f), in.seq_len);
      if (lines[f].active.count == 0) continue;
      lines[f].rho_squared = allocate<T>(lines[f].table_size);
      fill_rho_squared(lines[f], const_cast<T*>(lines[f].rho_squared));
      for (int s = 0; s < lines[f].active.count; ++s) reserve_table(lines[f].active.index[s], lines[f].table_size);
    }
    cross = Cross::plan(in.lattice, in.seq_len, backward);
    for (int s = 0; s < cross.active.count; ++s) {
      T* rho_squared = allocate<T>(cross.table_size);
      fill_rho_squared(cross, s, rho_squared);
      cross.rho_squared[s] = rho_squared;
      reserve_table(cross.active.index[s], cross.table_size);
    }
  }

  template <class Number>
  Number* allocate(int64_t count) const {
    return static_cast<Number*>(
        runtime.allocate(max_of(1, count) * static_cast<int64_t>(sizeof(Number)), runtime.owner));
  }
  void reserve_table(int stream, int64_t count) {
    table_offset[stream] = table_count;
    table_count += table_room(count);
  }
  static int64_t table_room(int64_t count) {
    constexpr int64_t size = sizeof(T);
    return round_up(count, 64 / size) + kRedZone / size;
  }
  int64_t tokens() const { return in.seq_len * padded_dim; }

  // Whether tokens are read where they are: in the type of operands, their rows whole vectors.
  bool in_place() const { return in.dtype == dtype_of<E>() && in.head_dim == padded_dim; }

  // Rows of one head as operands: in place, or `buffer` [T, Dp], which `fill` then writes.
  TokenRows<E> staged(const Tokens& tokens, int64_t batch, int64_t head, const E* buffer) const {
    if (!in_place()) return {buffer, padded_dim};
    return {static_cast<const E*>(tokens.data) + batch * tokens.batch + head * tokens.head, tokens.token};
  }
  void fill(const TokenRows<E>& rows, const Tokens& tokens, int64_t batch, int64_t head, int64_t t0,
            int64_t t1) const {
    if (in_place()) return;
    const Rows<E> from = rows_of<E>(tokens, in.dtype, batch, head, in.head_dim, padded_dim);
    for (int64_t t = t0; t < t1; ++t) from.read(t, const_cast<E*>(rows.at(t)));
  }

  // What one head needs from its inputs; `tables` is room for its biases.
  Head<P> head(int64_t index, T* tables) const {
    Head<P> head{};
    head.batch = index / in.heads;
    head.index = index % in.heads;
    const int64_t b = head.batch, h = head.index;
    head.padded_dim = padded_dim;
    head.zeros = zeros;
    head.weights = static_cast<const T*>(in.weights.data) + b * in.weights.batch + h * in.weights.head;
    head.weights_token = in.weights.token;
    head.decay = static_cast<const T*>(in.decay.data) + h * in.decay.head;
    if (in.alpha.data != nullptr) {
      head.alpha = static_cast<const T*>(in.alpha.data) + b * in.alpha.batch + h * in.alpha.head;
      head.alpha_token = in.alpha.token;
    }
    if (in.first_key != nullptr) head.first_key = in.first_key + b * in.seq_len;
    for (int s = 0; s < kNumStreams; ++s)
      if (in.lattice.has(s)) head.bias[s] = tables + table_offset[s];
    return head;
  }

  // Queries, keys and values of a head; `buffer` is room for three times [T, Dp].
  void stage_inputs(Head<P>& head, const E* buffer) const {
    const int64_t b = head.batch, h = head.index;
    head.q = staged(in.q, b, h, buffer);
    head.k = staged(in.k, b, h / group, buffer + tokens());
    head.v = staged(in.v, b, h / group, buffer + 2 * tokens());
  }
  void fill_inputs(const Head<P>& head, int64_t t0, int64_t t1) const {
    const int64_t b = head.batch, h = head.index;
    fill(head.q, in.q, b, h, t0, t1);
    fill(head.k, in.k, b, h / group, t0, t1);
    fill(head.v, in.v, b, h / group, t0, t1);
  }

  void fill_tables(const Head<P>& head) const {
    const auto fill = [&](const auto& plan) {
      for (int s = 0; s < plan.active.count; ++s) {
        const int stream = plan.active.index[s];
        T* const table = const_cast<T*>(head.bias[stream]);
        constexpr int64_t size = sizeof(T);
        fence(table, plan.table_size * size, table_room(plan.table_size) * size);
        fill_bias(plan, s, head.decay[stream], table);
      }
    };
    for (const LinePlan<T>& plan : lines) fill(plan);
    fill(cross);
  }

  // Of one thread: a family's scratch, and before it the rows of whatever takes over what the family hands on.
  template <class LineScratch, class CrossScratch>
  int64_t scratch_bytes() const {
    Arena rows;
    for (int i = 0; i < kRowsBesideFamily; ++i) rows.template take<T>(padded_dim);
    int64_t bytes = rows.used;
    for (const LinePlan<T>& plan : lines) {
      if (plan.active.count == 0) continue;
      Arena arena = rows;
      LineScratch(plan, padded_dim, arena);
      bytes = max_of(bytes, arena.used);
    }
    if (has_cross()) {
      Arena arena = rows;
      CrossScratch(cross, padded_dim, arena);
      bytes = max_of(bytes, arena.used);
    }
    return round_up(bytes, 4096);
  }

  // Whether lines, or the cross flows, have any part in the work.
  bool has_lines() const {
    for (const LinePlan<T>& plan : lines)
      if (plan.active.count > 0) return true;
    return false;
  }
  bool has_cross() const { return cross.active.count > 0; }

  // Runs one family after another over `count` heads: line_body(plan, head, unit, first, arena), where `first` says that
  // no family came before, then cross_body(plan, head, unit, arena).
  template <class Runner, class LineBody, class CrossBody>
  void for_each_family(const Runner& team, const Head<P>* heads, int64_t count, bool in_turns, LineBody line_body,
                       CrossBody cross_body) const {
    bool first = true;
    for (const LinePlan<T>& plan : lines) {
      if (plan.active.count == 0) continue;
      const int64_t units = plan.units(), turns = in_turns ? plan.turns() : 1;
      for (int64_t turn = 0; turn < turns; ++turn)
        team.run(count * units, [&](int64_t i, Arena arena) {
          const int64_t unit = i % units;
          if (unit % plan.chunks() % turns == turn) line_body(plan, heads[i / units], unit, first, arena);
        });
      first = false;
    }
    if (!has_cross()) return;
    const int64_t units = cross.num_units, turns = in_turns ? cross.turns() : 1;
    for (int64_t turn = 0; turn < turns; ++turn)
      team.run(count * units, [&](int64_t i, Arena arena) {
        const int64_t unit = i % units;
        if (turns == 1 || cross.turn(unit) == turn) cross_body(cross, heads[i / units], unit, arena);
      });
  }

  // body(head, first token, last token, arena) over the tokens of `count` heads.
  template <class Runner, class Body>
  void for_tokens(const Runner& team, const Head<P>* heads, int64_t count, Body body) const {
    const int64_t units = ceil_div(in.seq_len, kTokensPerUnit);
    team.run(count * units, [&](int64_t i, Arena arena) {
      const int64_t first = i % units * kTokensPerUnit;
      body(heads[i / units], first, min_of(in.seq_len, first + kTokensPerUnit), arena);
    });
  }
};

}  // namespace torus::TORUS_ISA
