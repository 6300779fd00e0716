// Torus attention: the order of the work. Streams of a head run family by family into one accumulator, in a fixed
// order whatever the number of threads, so that results repeat to the bit.
#pragma once

#include "cross.h"
#include "lines.h"
#include "team.h"

namespace torus::TORUS_ISA {

constexpr int64_t kTokensPerUnit = 256;  // of work that goes token by token
constexpr int kPartials = 2 * kNumStreams + 1;  // sums of one head: d_weights, d_decay, d_alpha

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
  int64_t group;  // query heads of a key/value head

  Call(const AttentionInputs& in, const Runtime& runtime) : in(in), runtime(runtime) {
    padded_dim = round_up(in.head_dim, P::kLanesOfDim);
    scale = static_cast<T>(in.scale);
    group = in.heads / in.kv_heads;
    table_count = 0;
    for (int f = 0; f < kNumFamilies; ++f) {
      lines[f] = plan_lines<P>(in.lattice, static_cast<Family>(f), in.seq_len);
      if (lines[f].active.count == 0) continue;
      lines[f].rho_squared = allocate<T>(lines[f].table_size);
      fill_rho_squared(lines[f], const_cast<T*>(lines[f].rho_squared));
      for (int s = 0; s < lines[f].active.count; ++s) reserve_table(lines[f].active.index[s], lines[f].table_size);
    }
    cross = Cross::plan(in.lattice, in.seq_len);
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
    table_count += round_up(count, 64 / static_cast<int64_t>(sizeof(T)));
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
    for (int f = 0; f < kNumFamilies; ++f)
      for (int s = 0; s < lines[f].active.count; ++s) {
        const int stream = lines[f].active.index[s];
        fill_bias(lines[f], s, head.decay[stream], const_cast<T*>(head.bias[stream]));
      }
    for (int s = 0; s < cross.active.count; ++s) {
      const int stream = cross.active.index[s];
      fill_bias(cross, s, head.decay[stream], const_cast<T*>(head.bias[stream]));
    }
  }

  template <class LineScratch, class CrossScratch>
  int64_t scratch_bytes() const {
    int64_t bytes = padded_dim * 4 * static_cast<int64_t>(sizeof(T));  // rows of the epilogue
    for (const LinePlan<T>& plan : lines) {
      if (plan.active.count == 0) continue;
      Arena arena;
      LineScratch(plan, padded_dim, arena);
      bytes = max_of(bytes, arena.used);
    }
    if (cross.active.count > 0) {
      Arena arena;
      CrossScratch(cross, padded_dim, arena);
      bytes = max_of(bytes, arena.used);
    }
    return round_up(bytes, 4096);
  }

  // Runs one family after another over `count` heads: body(head, unit, arena) for lines and for the cross flows.
  template <class Runner, class LineBody, class CrossBody>
  void for_each_family(const Runner& team, const Head<P>* heads, int64_t count, bool in_turns, LineBody line_body,
                       CrossBody cross_body) const {
    for (const LinePlan<T>& plan : lines) {
      if (plan.active.count == 0) continue;
      const int64_t units = plan.units(), turns = in_turns ? plan.turns() : 1;
      for (int64_t turn = 0; turn < turns; ++turn)
        team.run(count * units, [&](int64_t i, Arena arena) {
          const int64_t unit = i % units;
          if (unit % plan.chunks() % turns == turn) line_body(plan, heads[i / units], unit, arena);
        });
    }
    if (cross.active.count == 0) return;
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

// Heads that one group of threads works on together.
constexpr int64_t kMaxTeamHeads = 256;

template <class P>
void attention_forward(const AttentionForward& problem, const Runtime& given) {
  using T = typename P::Compute;
  using E = typename P::Element;
  Runtime runtime = given;
  runtime.num_threads = min_of(runtime.num_threads, kMaxTeamHeads);
  const AttentionInputs& in = problem.in;
  const Call<P> call(in, runtime);
  const int64_t threads = runtime.num_threads, tokens = call.tokens(), dp = call.padded_dim;
  const int64_t scratch_bytes = call.template scratch_bytes<LineForwardScratch<P>, typename CrossFlows<P>::ForwardScratch>();
  const uintptr_t scratch = reinterpret_cast<uintptr_t>(runtime.allocate(threads * scratch_bytes, runtime.owner));
  T* const tables = call.template allocate<T>(threads * call.table_count);
  T* const sums = call.template allocate<T>(threads * tokens);
  const int64_t staging = call.in_place() ? 0 : 3 * tokens;
  E* const stage = call.template allocate<E>(threads * staging);

  for_heads(runtime, in.batch * in.heads, scratch, scratch_bytes,
            [&](int64_t first, int64_t last, int64_t slot, const auto& team) {
    const int64_t count = last - first;
    Head<P> heads[kMaxTeamHeads];
    for (int64_t i = 0; i < count; ++i) {
      heads[i] = call.head(first + i, tables + (slot + i) * call.table_count);
      heads[i].y = sums + (slot + i) * tokens;
      call.stage_inputs(heads[i], stage + (slot + i) * staging);
      const int64_t statistics = (first + i) * in.seq_len * kNumStreams;
      if (problem.lse != nullptr) heads[i].lse = static_cast<T*>(problem.lse) + statistics;
      if (problem.entropy != nullptr) heads[i].entropy = static_cast<T*>(problem.entropy) + statistics;
    }
    team.run(count, [&](int64_t i, Arena) { call.fill_tables(heads[i]); });
    call.for_tokens(team, heads, count, [&](const Head<P>& head, int64_t t0, int64_t t1, Arena) {
      call.fill_inputs(head, t0, t1);
      zero(head.y + t0 * dp, (t1 - t0) * dp);
      for (int64_t t = t0; t < t1; ++t)
        for (int s = 0; s < kNumStreams; ++s) {
          if (in.lattice.has(s)) continue;
          if (head.lse != nullptr) head.lse[t * kNumStreams + s] = kNegativeInfinity<T>;
          if (head.entropy != nullptr) head.entropy[t * kNumStreams + s] = 0;
        }
    });
    call.for_each_family(
        team, heads, count, false,
        [&](const LinePlan<T>& plan, const Head<P>& head, int64_t unit, Arena arena) {
          line_forward(plan, head, unit, call.scale, arena);
        },
        [&](const typename Call<P>::CrossPlan& plan, const Head<P>& head, int64_t unit, Arena arena) {
          cross_forward(plan, head, unit, call.scale, arena);
        });
    // out = state + alpha * (y - state)
    call.for_tokens(team, heads, count, [&](const Head<P>& head, int64_t t0, int64_t t1, Arena arena) {
      T* state_row = arena.take<T>(dp);
      const Rows<T> out = rows_of<T>(problem.out, in.dtype, head.batch, head.index, in.head_dim, dp);
      const Rows<T> state = rows_of<T>(in.state, in.dtype, head.batch, head.index, in.head_dim, dp);
      for (int64_t t = t0; t < t1; ++t) {
        T* y = head.y + t * dp;
        if (head.alpha != nullptr) {
          const T alpha = head.alpha_at(t);
          state.read(t, state_row);
          for (int64_t d = 0; d < dp; ++d) y[d] = state_row[d] + alpha * (y[d] - state_row[d]);
        }
        out.write(t, y);
      }
    });
  });
}

// Gradients that go token by token: of the weights, of alpha and of the state; and this head's sums over tokens.
template <class P>
void token_gradients(const AttentionBackward& problem, const Head<P>& head, double* partial, Arena arena) {
  using T = typename P::Compute;
  const AttentionInputs& in = problem.in;
  const int64_t row = (head.batch * in.heads + head.index) * in.seq_len;
  const bool token_weights = in.weights.token != 0, token_alpha = in.alpha.token != 0;
  const Rows<T> state = rows_of<T>(in.state, in.dtype, head.batch, head.index, in.head_dim, head.padded_dim);
  const Rows<T> d_state = rows_of<T>(problem.d_state, in.dtype, head.batch, head.index, in.head_dim, head.padded_dim);
  const Rows<T> d_out = rows_of<T>(problem.d_out, in.dtype, head.batch, head.index, in.head_dim, head.padded_dim);
  T* state_row = arena.take<T>(head.padded_dim);
  T* d_out_row = arena.take<T>(head.padded_dim);
  for (int i = 0; i < kPartials; ++i) partial[i] = 0;
  for (int64_t t = 0; t < in.seq_len; ++t) {
    const T* delta = head.delta + t * kNumStreams;
    const T alpha = head.alpha_at(t);
    T y_dot_d_out = 0;
    for (int s = 0; s < kNumStreams; ++s) {
      y_dot_d_out += head.weight(t, s) * delta[s];
      if (token_weights) {
        static_cast<T*>(problem.d_weights)[(row + t) * kNumStreams + s] = alpha * delta[s];
      } else {
        partial[s] += alpha * delta[s];
      }
      partial[kNumStreams + s] += head.d_decay[t * kNumStreams + s];
    }
    if (head.alpha == nullptr) continue;
    d_out.read(t, d_out_row);
    state.read(t, state_row);
    T d_alpha = y_dot_d_out;
    Vec<T> dot = {};
    for (int64_t d = 0; d < head.padded_dim; d += kLanes<T>) {
      const Vec<T> g = load(d_out_row + d);
      dot += g * load(state_row + d);
      store(state_row + d, g - splat<Vec<T>>(alpha) * g);
    }
    d_alpha -= sum<T>(dot);
    d_state.write(t, state_row);
    if (token_alpha) {
      static_cast<T*>(problem.d_alpha)[row + t] = d_alpha;
    } else {
      partial[2 * kNumStreams] += d_alpha;
    }
  }
}

// Sums over the batch, in order.
template <class T>
void reduce_parameters(const AttentionBackward& problem, const double* partials) {
  const AttentionInputs& in = problem.in;
  for (int64_t h = 0; h < in.heads; ++h) {
    double total[kPartials] = {};
    for (int64_t b = 0; b < in.batch; ++b)
      for (int i = 0; i < kPartials; ++i) total[i] += partials[(b * in.heads + h) * kPartials + i];
    for (int s = 0; s < kNumStreams; ++s) {
      if (in.weights.token == 0) static_cast<T*>(problem.d_weights)[h * kNumStreams + s] = static_cast<T>(total[s]);
      static_cast<T*>(problem.d_decay)[h * kNumStreams + s] = static_cast<T>(total[kNumStreams + s]);
    }
    if (in.alpha.data != nullptr && in.alpha.token == 0)
      static_cast<T*>(problem.d_alpha)[h] = static_cast<T>(total[2 * kNumStreams]);
  }
}

template <class P>
void attention_backward(const AttentionBackward& problem, const Runtime& given) {
  using T = typename P::Compute;
  using E = typename P::Element;
  Runtime runtime = given;
  runtime.num_threads = min_of(runtime.num_threads, kMaxTeamHeads);
  const AttentionInputs& in = problem.in;
  const Call<P> call(in, runtime);
  const int64_t threads = runtime.num_threads, tokens = call.tokens(), dp = call.padded_dim;
  const int64_t rows = in.seq_len * kNumStreams;
  const int64_t scratch_bytes = call.template scratch_bytes<LineBackwardScratch<P>, typename CrossFlows<P>::BackwardScratch>();
  const uintptr_t scratch = reinterpret_cast<uintptr_t>(runtime.allocate(threads * scratch_bytes, runtime.owner));
  T* const tables = call.template allocate<T>(threads * call.table_count);
  T* const sums = call.template allocate<T>(threads * 3 * tokens);
  const int64_t staging = call.in_place() ? 0 : 4 * tokens;
  E* const stage = call.template allocate<E>(threads * staging);
  T* const row_sums = call.template allocate<T>(threads * 2 * rows);
  double* const partials = static_cast<double*>(runtime.allocate(
      in.batch * in.heads * kPartials * static_cast<int64_t>(sizeof(double)), runtime.owner));

  // A key/value head's gradients are the sum over its group of query heads, taken one after another.
  for_heads(runtime, in.batch * in.kv_heads, scratch, scratch_bytes,
            [&](int64_t first, int64_t last, int64_t slot, const auto& team) {
    const int64_t count = last - first;
    Head<P> heads[kMaxTeamHeads];
    for (int64_t member = 0; member < call.group; ++member) {
      for (int64_t i = 0; i < count; ++i) {
        heads[i] = call.head((first + i) * call.group + member, tables + (slot + i) * call.table_count);
        Head<P>& head = heads[i];
        E* const buffer = stage + (slot + i) * staging;
        call.stage_inputs(head, buffer);
        head.d_out = call.staged(problem.d_out, head.batch, head.index, buffer + 3 * tokens);
        T* const mine = sums + (slot + i) * 3 * tokens;
        head.d_q = mine, head.d_k = mine + tokens, head.d_v = mine + 2 * tokens;
        head.delta = row_sums + (slot + i) * 2 * rows;
        head.d_decay = head.delta + rows;
      }
      team.run(count, [&](int64_t i, Arena) { call.fill_tables(heads[i]); });
      call.for_tokens(team, heads, count, [&](const Head<P>& head, int64_t t0, int64_t t1, Arena) {
        call.fill_inputs(head, t0, t1);
        call.fill(head.d_out, problem.d_out, head.batch, head.index, t0, t1);
        zero(head.d_q + t0 * dp, (t1 - t0) * dp);
        zero(head.delta + t0 * kNumStreams, (t1 - t0) * kNumStreams);
        zero(head.d_decay + t0 * kNumStreams, (t1 - t0) * kNumStreams);
        if (member > 0) return;
        zero(head.d_k + t0 * dp, (t1 - t0) * dp);
        zero(head.d_v + t0 * dp, (t1 - t0) * dp);
      });
      call.for_each_family(
          team, heads, count, true,
          [&](const LinePlan<T>& plan, const Head<P>& head, int64_t unit, Arena arena) {
            line_backward(plan, head, unit, call.scale, arena);
          },
          [&](const typename Call<P>::CrossPlan& plan, const Head<P>& head, int64_t unit, Arena arena) {
            cross_backward(plan, head, unit, call.scale, arena);
          });
      const bool last_member = member == call.group - 1;
      call.for_tokens(team, heads, count, [&](const Head<P>& head, int64_t t0, int64_t t1, Arena) {
        const int64_t kv_head = head.index / call.group;
        const Rows<T> d_q = rows_of<T>(problem.d_q, in.dtype, head.batch, head.index, in.head_dim, dp);
        const Rows<T> d_k = rows_of<T>(problem.d_k, in.dtype, head.batch, kv_head, in.head_dim, dp);
        const Rows<T> d_v = rows_of<T>(problem.d_v, in.dtype, head.batch, kv_head, in.head_dim, dp);
        for (int64_t t = t0; t < t1; ++t) {
          d_q.write(t, head.d_q + t * dp);
          if (!last_member) continue;
          d_k.write(t, head.d_k + t * dp);
          d_v.write(t, head.d_v + t * dp);
        }
      });
      team.run(count, [&](int64_t i, Arena arena) {
        const int64_t index = heads[i].batch * in.heads + heads[i].index;
        token_gradients(problem, heads[i], partials + index * kPartials, arena);
      });
    }
  });
  reduce_parameters<T>(problem, partials);
}

}  // namespace torus::TORUS_ISA
