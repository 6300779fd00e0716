// Torus attention, backward: the streams of each head one family after another, then what goes token by token.
#pragma once

#include "call.h"

namespace torus::TORUS_ISA {

constexpr int kPartials = 2 * kNumStreams + 1;  // sums of one head: d_weights, d_decay, d_alpha

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
  const Call<P> call(in, runtime, true);
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

  const auto gradient = [&](const Tokens& tokens, const Head<P>& head, int64_t index) {
    return rows_of<T>(tokens, in.dtype, head.batch, index, in.head_dim, dp);
  };
  // Lines of a dense family never share a key: the first one to come stores the sums that others add to.
  const bool has_lines = call.has_lines(), stores_keys = has_lines && !in.lattice.causal();

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
        zero(head.delta + t0 * kNumStreams, (t1 - t0) * kNumStreams);
        zero(head.d_decay + t0 * kNumStreams, (t1 - t0) * kNumStreams);
        if (member > 0 || stores_keys) return;
        zero(head.d_k + t0 * dp, (t1 - t0) * dp);
        zero(head.d_v + t0 * dp, (t1 - t0) * dp);
      });
      call.for_each_family(
          team, heads, count, true,
          [&](const LinePlan<T>& plan, const Head<P>& head, int64_t unit, bool is_first, Arena arena) {
            line_backward(plan, head, unit, call.scale, {is_first, is_first && stores_keys && member == 0}, arena);
          },
          [&](const typename Call<P>::CrossPlan& plan, const Head<P>& head, int64_t unit, Arena arena) {
            const Rows<T> d_q = gradient(problem.d_q, head, head.index);
            const auto finish = [&](int64_t t, T* row) {
              if (has_lines) add_row(row, head.d_q + t * dp, dp);
              d_q.write(t, row);
            };
            cross_backward(plan, head, unit, call.scale, finish, arena);
          });
      const bool last_member = member == call.group - 1;
      call.for_tokens(team, heads, count, [&](const Head<P>& head, int64_t t0, int64_t t1, Arena) {
        const int64_t kv_head = head.index / call.group;
        const Rows<T> d_q = gradient(problem.d_q, head, head.index);
        const Rows<T> d_k = gradient(problem.d_k, head, kv_head), d_v = gradient(problem.d_v, head, kv_head);
        for (int64_t t = t0; t < t1; ++t) {
          if (!call.has_cross()) d_q.write(t, head.d_q + t * dp);
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
