// EMA compounding on its own: token by token, with momentum, and with several time constants at once.
#pragma once

#include "team.h"

namespace torus::TORUS_ISA {

template <class T>
TORUS_INLINE T value_at(const Parameter& p, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(p.data)[batch * p.batch + head * p.head + token * p.token];
}

template <class T>
constexpr DType kComputeDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Runs body(batch, head, arena) for every head, each by one thread; `rows` rows of scratch.
template <class T, class Body>
void for_each_head(const Runtime& runtime, int64_t batch, int64_t heads, int64_t head_dim, int64_t rows, Body body) {
  Arena measured;
  for (int64_t row = 0; row < rows; ++row) measured.take<T>(round_up(head_dim, kLanes<T>));
  const int64_t bytes = measured.used;
  const uintptr_t scratch =
      reinterpret_cast<uintptr_t>(runtime.allocate(runtime.num_threads * bytes, runtime.owner));
  Team{runtime, scratch, bytes}.run(batch * heads,
                                    [&](int64_t i, Arena arena) { body(i / heads, i % heads, arena); });
}

template <class T>
void ema_compound(const Compound& p, const Runtime& runtime) {
  const bool momentum = p.beta.data != nullptr;
  for_each_head<T>(runtime, p.batch, p.heads, p.head_dim, 3, [&](int64_t b, int64_t h, Arena arena) {
    const auto rows = [&](const Tokens& tokens, DType dtype) { return rows_of<T>(tokens, dtype, b, h, p.head_dim); };
    const Rows<T> x = rows(p.x, p.dtype), state = rows(p.state, p.dtype), out = rows(p.out, p.dtype);
    const Rows<T> velocity = rows(p.velocity, kComputeDType<T>), updated = rows(p.new_velocity, kComputeDType<T>);
    T *x_row = arena.take<T>(x.padded_dim), *state_row = arena.take<T>(x.padded_dim);
    T* step = arena.take<T>(x.padded_dim);
    for (int64_t t = 0; t < p.seq_len; ++t) {
      const T alpha = value_at<T>(p.alpha, b, h, t);
      x.read(t, x_row);
      state.read(t, state_row);
      if (momentum) {
        const T beta = value_at<T>(p.beta, b, h, t);
        velocity.read(t, step);
        for (int64_t d = 0; d < x.padded_dim; ++d)
          step[d] = beta * step[d] + (1 - beta) * (x_row[d] - state_row[d]);
        updated.write(t, step);
      } else {
        for (int64_t d = 0; d < x.padded_dim; ++d) step[d] = x_row[d] - state_row[d];
      }
      for (int64_t d = 0; d < x.padded_dim; ++d) step[d] = state_row[d] + alpha * step[d];
      out.write(t, step);
    }
  });
}

template <class T>
void ema_compound_backward(const CompoundBackward& g, const Runtime& runtime) {
  const Compound& p = g.forward;
  const bool momentum = p.beta.data != nullptr;
  double* const partials = static_cast<double*>(
      runtime.allocate(p.batch * p.heads * 2 * static_cast<int64_t>(sizeof(double)), runtime.owner));
  for_each_head<T>(runtime, p.batch, p.heads, p.head_dim, 5, [&](int64_t b, int64_t h, Arena arena) {
    const auto rows = [&](const Tokens& tokens, DType dtype) { return rows_of<T>(tokens, dtype, b, h, p.head_dim); };
    const Rows<T> x = rows(p.x, p.dtype), state = rows(p.state, p.dtype), d_out = rows(g.d_out, p.dtype);
    const Rows<T> d_x = rows(g.d_x, p.dtype), d_state = rows(g.d_state, p.dtype);
    const Rows<T> velocity = rows(p.velocity, kComputeDType<T>), d_velocity = rows(g.d_velocity, kComputeDType<T>);
    const Rows<T> d_updated = rows(g.d_new_velocity, kComputeDType<T>);
    const int64_t dp = x.padded_dim;
    T *gap = arena.take<T>(dp), *state_row = arena.take<T>(dp), *grad = arena.take<T>(dp);
    T *old = arena.take<T>(dp), *d_step = arena.take<T>(dp);
    double total_alpha = 0, total_beta = 0;
    for (int64_t t = 0; t < p.seq_len; ++t) {
      const T alpha = value_at<T>(p.alpha, b, h, t), beta = momentum ? value_at<T>(p.beta, b, h, t) : T(0);
      x.read(t, gap);
      state.read(t, state_row);
      d_out.read(t, grad);
      zero(old, dp);
      zero(d_step, dp);
      if (momentum) {
        velocity.read(t, old);
        d_updated.read(t, d_step);
      }
      Vec<T> sum_alpha = {}, sum_beta = {};
      for (int64_t d = 0; d < dp; d += kLanes<T>) {
        const Vec<T> g = load(grad + d), was = load(old + d), difference = load(gap + d) - load(state_row + d);
        const Vec<T> d_step_d = load(d_step + d) + alpha * g, d_gap = (1 - beta) * d_step_d;
        sum_alpha += g * (beta * was + (1 - beta) * difference);
        sum_beta += d_step_d * (was - difference);
        store(gap + d, d_gap);
        store(grad + d, g - d_gap);
        store(d_step + d, beta * d_step_d);
      }
      const T d_alpha = sum<T>(sum_alpha), d_beta = sum<T>(sum_beta);
      d_x.write(t, gap);
      d_state.write(t, grad);
      if (momentum) d_velocity.write(t, d_step);
      const int64_t row = (b * p.heads + h) * p.seq_len + t;
      if (p.alpha.token != 0) static_cast<T*>(g.d_alpha)[row] = d_alpha;
      if (momentum && p.beta.token != 0) static_cast<T*>(g.d_beta)[row] = d_beta;
      total_alpha += d_alpha;
      total_beta += d_beta;
    }
    partials[(b * p.heads + h) * 2] = total_alpha;
    partials[(b * p.heads + h) * 2 + 1] = total_beta;
  });
  for (int64_t h = 0; h < p.heads; ++h) {
    double total_alpha = 0, total_beta = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      total_alpha += partials[(b * p.heads + h) * 2];
      total_beta += partials[(b * p.heads + h) * 2 + 1];
    }
    if (p.alpha.token == 0) static_cast<T*>(g.d_alpha)[h] = static_cast<T>(total_alpha);
    if (momentum && p.beta.token == 0) static_cast<T*>(g.d_beta)[h] = static_cast<T>(total_beta);
  }
}

// The tokens of one of several states.
TORUS_INLINE Tokens at_scale(Tokens tokens, int64_t stride, int64_t scale, int64_t element_bytes) {
  tokens.data = static_cast<char*>(tokens.data) + scale * stride * element_bytes;
  return tokens;
}
TORUS_INLINE int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <class T>
void ema_multiscale(const Multiscale& p, const Runtime& runtime) {
  const int64_t bytes = element_bytes(p.dtype);
  for_each_head<T>(runtime, p.batch, p.heads, p.head_dim, 3, [&](int64_t b, int64_t h, Arena arena) {
    const auto rows = [&](const Tokens& tokens) { return rows_of<T>(tokens, p.dtype, b, h, p.head_dim); };
    const Rows<T> x = rows(p.x), mixed = rows(p.mixed);
    const int64_t dp = x.padded_dim;
    T *x_row = arena.take<T>(dp), *state_row = arena.take<T>(dp), *sum_row = arena.take<T>(dp);
    for (int64_t t = 0; t < p.seq_len; ++t) {
      x.read(t, x_row);
      zero(sum_row, dp);
      for (int64_t s = 0; s < p.scales; ++s) {
        const T alpha = value_at<T>(p.alphas, 0, h, s), weight = value_at<T>(p.scale_weights, 0, 0, s);
        rows(at_scale(p.states, p.states_scale, s, bytes)).read(t, state_row);
        for (int64_t d = 0; d < dp; ++d) {
          state_row[d] += alpha * (x_row[d] - state_row[d]);
          sum_row[d] += weight * state_row[d];
        }
        rows(at_scale(p.new_states, p.new_states_scale, s, bytes)).write(t, state_row);
      }
      mixed.write(t, sum_row);
    }
  });
}

template <class T>
void ema_multiscale_backward(const MultiscaleBackward& g, const Runtime& runtime) {
  const Multiscale& p = g.forward;
  const int64_t bytes = element_bytes(p.dtype), sums = 2 * p.scales;
  double* const partials = static_cast<double*>(
      runtime.allocate(p.batch * p.heads * sums * static_cast<int64_t>(sizeof(double)), runtime.owner));
  for_each_head<T>(runtime, p.batch, p.heads, p.head_dim, 5, [&](int64_t b, int64_t h, Arena arena) {
    const auto rows = [&](const Tokens& tokens) { return rows_of<T>(tokens, p.dtype, b, h, p.head_dim); };
    const Rows<T> x = rows(p.x), d_mixed = rows(g.d_mixed), d_x = rows(g.d_x);
    const int64_t dp = x.padded_dim;
    T *x_row = arena.take<T>(dp), *mixed_row = arena.take<T>(dp), *d_x_row = arena.take<T>(dp);
    T *state_row = arena.take<T>(dp), *grad = arena.take<T>(dp);
    double* partial = partials + (b * p.heads + h) * sums;
    for (int64_t i = 0; i < sums; ++i) partial[i] = 0;
    for (int64_t t = 0; t < p.seq_len; ++t) {
      x.read(t, x_row);
      d_mixed.read(t, mixed_row);
      zero(d_x_row, dp);
      for (int64_t s = 0; s < p.scales; ++s) {
        const T alpha = value_at<T>(p.alphas, 0, h, s), weight = value_at<T>(p.scale_weights, 0, 0, s);
        rows(at_scale(p.states, p.states_scale, s, bytes)).read(t, state_row);
        rows(at_scale(g.d_new_states, g.d_new_states_scale, s, bytes)).read(t, grad);
        Vec<T> d_alpha = {}, d_weight = {};
        for (int64_t d = 0; d < dp; d += kLanes<T>) {
          const Vec<T> old = load(state_row + d), gap = load(x_row + d) - old, d_mix = load(mixed_row + d);
          const Vec<T> d_updated = load(grad + d) + weight * d_mix;
          d_alpha += d_updated * gap;
          d_weight += d_mix * (old + alpha * gap);
          store(d_x_row + d, load(d_x_row + d) + alpha * d_updated);
          store(grad + d, d_updated - alpha * d_updated);
        }
        rows(at_scale(g.d_states, g.d_states_scale, s, bytes)).write(t, grad);
        partial[s] += sum<T>(d_alpha);
        partial[p.scales + s] += sum<T>(d_weight);
      }
      d_x.write(t, d_x_row);
    }
  });
  for (int64_t s = 0; s < p.scales; ++s) {
    double d_weight = 0;
    for (int64_t h = 0; h < p.heads; ++h) {
      double d_alpha = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        d_alpha += partials[(b * p.heads + h) * sums + s];
        d_weight += partials[(b * p.heads + h) * sums + p.scales + s];
      }
      static_cast<T*>(g.d_alphas)[s * p.heads + h] = static_cast<T>(d_alpha);
    }
    static_cast<T*>(g.d_scale_weights)[s] = static_cast<T>(d_weight);
  }
}

}  // namespace torus::TORUS_ISA
