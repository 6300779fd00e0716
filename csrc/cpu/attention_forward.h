// Torus attention, forward: the streams of each head one family after another, then mixing and EMA compounding as the
// last family hands over its rows.
#pragma once

#include "call.h"

namespace torus::TORUS_ISA {

// out = state + alpha * (y - state), or y without a state: one row at a time.
template <class P>
struct Compounding {
  using T = typename P::Compute;
  const Head<P>& head;
  Rows<T> out, state;
  T* state_row;

  Compounding(const AttentionForward& problem, const Head<P>& head, Arena& arena)
      : head(head), out(rows(problem.out, problem.in)), state(rows(problem.in.state, problem.in)),
        state_row(arena.take<T>(head.padded_dim)) {}
  Rows<T> rows(const Tokens& tokens, const AttentionInputs& in) const {
    return rows_of<T>(tokens, in.dtype, head.batch, head.index, in.head_dim, head.padded_dim);
  }
  TORUS_INLINE void operator()(int64_t t, T* y) const {
    if (head.alpha != nullptr) {
      const Vec<T> alpha = splat<Vec<T>>(head.alpha_at(t));
      state.read(t, state_row);
      for (int64_t d = 0; d < head.padded_dim; d += kLanes<T>) {
        const Vec<T> previous = load(state_row + d);
        store(y + d, previous + alpha * (load(y + d) - previous));
      }
    }
    out.write(t, y);
  }
};

template <class P>
void attention_forward(const AttentionForward& problem, const Runtime& given) {
  using T = typename P::Compute;
  using E = typename P::Element;
  Runtime runtime = given;
  runtime.num_threads = min_of(runtime.num_threads, kMaxTeamHeads);
  const AttentionInputs& in = problem.in;
  const Call<P> call(in, runtime, false);
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
      for (int64_t t = t0; t < t1; ++t)
        for (int s = 0; s < kNumStreams; ++s) {
          if (in.lattice.has(s)) continue;
          if (head.lse != nullptr) head.lse[t * kNumStreams + s] = kNegativeInfinity<T>;
          if (head.entropy != nullptr) head.entropy[t * kNumStreams + s] = 0;
        }
    });
    const bool has_lines = call.has_lines();
    call.for_each_family(
        team, heads, count, false,
        [&](const LinePlan<T>& plan, const Head<P>& head, int64_t unit, bool is_first, Arena arena) {
          line_forward(plan, head, unit, call.scale, is_first, arena);
        },
        [&](const typename Call<P>::CrossPlan& plan, const Head<P>& head, int64_t unit, Arena arena) {
          const Compounding<P> compound(problem, head, arena);
          const auto finish = [&](int64_t t, T* y) {
            if (has_lines) add_row(y, head.y + t * dp, dp);
            compound(t, y);
          };
          cross_forward(plan, head, unit, call.scale, finish, arena);
        });
    if (call.has_cross()) return;
    call.for_tokens(team, heads, count, [&](const Head<P>& head, int64_t t0, int64_t t1, Arena arena) {
      const Compounding<P> compound(problem, head, arena);
      for (int64_t t = t0; t < t1; ++t) compound(t, head.y + t * dp);
    });
  });
}

}  // namespace torus::TORUS_ISA
