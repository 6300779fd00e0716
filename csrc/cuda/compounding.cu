// EMA compounding on its own: token by token, with momentum, and with several time constants at once. The gradients of
// gates per head and of weights are sums over tokens: a warp leaves one number a run, and a second kernel adds these up.
#include "runs.h"

namespace torus::cuda {

namespace {

template <class E, bool kMomentum>
struct CompoundKernel {
  struct Arguments {
    Runs runs;
    Compound p;
  };
  static constexpr const char* kName = "ema_compound";
  static constexpr int kMaxWarps = Runs::kWarps;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const Compound& p = a.p;
    const Run run(a.runs, warp);
    if (!run.exists) return;
    for (int64_t first = run.first; first < run.end; first += a.runs.lanes.rows()) {
      const RunRows rows(a.runs, run, first);
      const Lane<float> alpha = rows.gate(p.alpha);
      const Elements x = rows.read<E>(p.x), state = rows.read<E>(p.state);
      Elements step, out;
TORUS_UNROLL
      for (int i = 0; i < kElements; ++i) step[i] = x[i] - state[i];
      if constexpr (kMomentum) {
        const Lane<float> beta = rows.gate(p.beta);
        const Elements velocity = rows.read<float>(p.velocity);
TORUS_UNROLL
        for (int i = 0; i < kElements; ++i) step[i] = beta * velocity[i] + (1.0f - beta) * step[i];
        rows.write<float>(p.new_velocity, step);
      }
TORUS_UNROLL
      for (int i = 0; i < kElements; ++i) out[i] = state[i] + alpha * step[i];
      rows.write<E>(p.out, out);
    }
  }
};

template <class E, bool kMomentum>
struct CompoundBackwardKernel {
  struct Arguments {
    Runs runs;
    CompoundBackward g;
    float *alpha_parts, *beta_parts;  // one number a run, where the gate is per head
  };
  static constexpr const char* kName = "ema_compound_backward";
  static constexpr int kMaxWarps = Runs::kWarps;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const CompoundBackward& g = a.g;
    const Compound& p = g.forward;
    const Run run(a.runs, warp);
    if (!run.exists) return;
    Lane<float> sum_alpha = 0.0f, sum_beta = 0.0f;
    for (int64_t first = run.first; first < run.end; first += a.runs.lanes.rows()) {
      const RunRows rows(a.runs, run, first);
      const Lane<float> alpha = rows.gate(p.alpha);
      const Elements x = rows.read<E>(p.x), state = rows.read<E>(p.state), d_out = rows.read<E>(g.d_out);
      Elements d_x, d_state;
      Lane<float> d_alpha = 0.0f, d_beta = 0.0f;
      if constexpr (kMomentum) {
        const Lane<float> beta = rows.gate(p.beta);
        const Elements velocity = rows.read<float>(p.velocity), d_new = rows.read<float>(g.d_new_velocity);
        Elements d_velocity;
TORUS_UNROLL
        for (int i = 0; i < kElements; ++i) {
          const Lane<float> gap = x[i] - state[i], d_step = d_new[i] + alpha * d_out[i];
          d_alpha = d_alpha + d_out[i] * (beta * velocity[i] + (1.0f - beta) * gap);
          d_beta = d_beta + d_step * (velocity[i] - gap);
          d_velocity[i] = beta * d_step;
          d_x[i] = (1.0f - beta) * d_step;
        }
        rows.write<float>(g.d_velocity, d_velocity);
      } else {
TORUS_UNROLL
        for (int i = 0; i < kElements; ++i) {
          d_alpha = d_alpha + d_out[i] * (x[i] - state[i]);
          d_x[i] = alpha * d_out[i];
        }
      }
TORUS_UNROLL
      for (int i = 0; i < kElements; ++i) d_state[i] = d_out[i] - d_x[i];
      rows.write<E>(g.d_x, d_x);
      rows.write<E>(g.d_state, d_state);
      sum_alpha = sum_alpha + d_alpha, sum_beta = sum_beta + d_beta;
      if (a.alpha_parts == nullptr) rows.write_number(static_cast<float*>(g.d_alpha), a.runs.lanes.sum(d_alpha));
      if (kMomentum && a.beta_parts == nullptr)
        rows.write_number(static_cast<float*>(g.d_beta), a.runs.lanes.sum(d_beta));
    }
    const Lane<int64_t> part = run.index;
    if (a.alpha_parts != nullptr) store(a.alpha_parts, part, sum_of_lanes(sum_alpha), lane_index() == 0);
    if (kMomentum && a.beta_parts != nullptr) store(a.beta_parts, part, sum_of_lanes(sum_beta), lane_index() == 0);
  }
};

// The tokens of one of several states.
template <class E>
TORUS_DEVICE Tokens at_scale(Tokens tokens, int64_t stride, int64_t scale) {
  tokens.data = static_cast<E*>(tokens.data) + scale * stride;
  return tokens;
}

TORUS_DEVICE float number_at(const Parameter& p, int64_t head, int64_t scale) {
  return static_cast<const float*>(p.data)[head * p.head + scale * p.token];
}

template <class E>
struct MultiscaleKernel {
  struct Arguments {
    Runs runs;
    Multiscale p;
  };
  static constexpr const char* kName = "ema_multiscale";
  static constexpr int kMaxWarps = Runs::kWarps;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const Multiscale& p = a.p;
    const Run run(a.runs, warp);
    if (!run.exists) return;
    for (int64_t first = run.first; first < run.end; first += a.runs.lanes.rows()) {
      const RunRows rows(a.runs, run, first);
      const Elements x = rows.read<E>(p.x);
      Elements mixed;
TORUS_UNROLL
      for (int i = 0; i < kElements; ++i) mixed[i] = 0.0f;
      for (int64_t s = 0; s < p.scales; ++s) {
        const float alpha = number_at(p.alphas, run.head, s), weight = number_at(p.scale_weights, 0, s);
        Elements state = rows.read<E>(at_scale<E>(p.states, p.states_scale, s));
TORUS_UNROLL
        for (int i = 0; i < kElements; ++i) {
          state[i] = state[i] + alpha * (x[i] - state[i]);
          mixed[i] = mixed[i] + weight * state[i];
        }
        rows.write<E>(at_scale<E>(p.new_states, p.new_states_scale, s), state);
      }
      rows.write<E>(p.mixed, mixed);
    }
  }
};

template <class E>
struct MultiscaleBackwardKernel {
  struct Arguments {
    Runs runs;
    MultiscaleBackward g;
    float *alpha_parts, *weight_parts;  // [S, runs]
  };
  static constexpr const char* kName = "ema_multiscale_backward";
  static constexpr int kMaxWarps = Runs::kWarps;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const MultiscaleBackward& g = a.g;
    const Multiscale& p = g.forward;
    const Run run(a.runs, warp);
    if (!run.exists) return;
    for (int64_t first = run.first; first < run.end; first += a.runs.lanes.rows()) {
      const RunRows rows(a.runs, run, first);
      const Elements x = rows.read<E>(p.x), d_mixed = rows.read<E>(g.d_mixed);
      Elements d_x;
TORUS_UNROLL
      for (int i = 0; i < kElements; ++i) d_x[i] = 0.0f;
      for (int64_t s = 0; s < p.scales; ++s) {
        const float alpha = number_at(p.alphas, run.head, s), weight = number_at(p.scale_weights, 0, s);
        const Elements state = rows.read<E>(at_scale<E>(p.states, p.states_scale, s));
        const Elements d_new = rows.read<E>(at_scale<E>(g.d_new_states, g.d_new_states_scale, s));
        Elements d_state;
        Lane<float> d_alpha = 0.0f, d_weight = 0.0f;
TORUS_UNROLL
        for (int i = 0; i < kElements; ++i) {
          const Lane<float> gap = x[i] - state[i], d_updated = d_new[i] + weight * d_mixed[i];
          d_alpha = d_alpha + d_updated * gap;
          d_weight = d_weight + d_mixed[i] * (state[i] + alpha * gap);
          d_x[i] = d_x[i] + alpha * d_updated;
          d_state[i] = d_updated - alpha * d_updated;
        }
        rows.write<E>(at_scale<E>(g.d_states, g.d_states_scale, s), d_state);
        const Lane<int64_t> part = s * a.runs.count() + run.index;
        add(a.alpha_parts, part, sum_of_lanes(d_alpha), first == run.first);
        add(a.weight_parts, part, sum_of_lanes(d_weight), first == run.first);
      }
      rows.write<E>(g.d_x, d_x);
    }
  }

 private:
  // A run's sum, kept where its first lane alone reads and writes it.
  static TORUS_DEVICE void add(float* parts, const Lane<int64_t>& part, const Lane<float>& x, bool begins) {
    const Lane<bool> mine = lane_index() == 0;
    store(parts, part, begins ? x : x + load(parts, part, mine, 0.0f), mine);
  }
};

float* allocate(const Device& device, int64_t count) {
  return static_cast<float*>(device.allocate(count * static_cast<int64_t>(sizeof(float)), device.owner));
}

template <class Body>
void with_element(DType dtype, Body body) {
  if (dtype == DType::kBFloat16) {
    body(BFloat16{});
  } else if (dtype == DType::kFloat16) {
    body(Float16{});
  } else {
    throw std::runtime_error("the CUDA kernels take float16 and bfloat16");
  }
}

// d_gate [H] from one number a run.
void sum_of_gate(const Runs& runs, const float* parts, void* d_gate, const Device& device) {
  SumKernel::launch({parts, static_cast<float*>(d_gate), runs.heads, 0, runs.parts, runs.heads * runs.parts, runs.batch,
                     runs.parts},
                    1, device);
}

}  // namespace

void ema_compound(const Compound& p, const Device& device) {
  const Runs runs = Runs::of(p.batch, p.heads, p.seq_len, p.head_dim);
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    if (p.beta.data != nullptr) {
      launch<CompoundKernel<E, true>>(runs.grid(), Runs::kWarps, 0, device, {runs, p});
    } else {
      launch<CompoundKernel<E, false>>(runs.grid(), Runs::kWarps, 0, device, {runs, p});
    }
  });
}

void ema_compound_backward(const CompoundBackward& g, const Device& device) {
  const Compound& p = g.forward;
  const Runs runs = Runs::of(p.batch, p.heads, p.seq_len, p.head_dim);
  const bool momentum = p.beta.data != nullptr;
  float* const alpha_parts = p.alpha.token == 0 ? allocate(device, runs.count()) : nullptr;
  float* const beta_parts = momentum && p.beta.token == 0 ? allocate(device, runs.count()) : nullptr;
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    if (momentum) {
      launch<CompoundBackwardKernel<E, true>>(runs.grid(), Runs::kWarps, 0, device, {runs, g, alpha_parts, beta_parts});
    } else {
      launch<CompoundBackwardKernel<E, false>>(runs.grid(), Runs::kWarps, 0, device, {runs, g, alpha_parts, beta_parts});
    }
  });
  if (alpha_parts != nullptr) sum_of_gate(runs, alpha_parts, g.d_alpha, device);
  if (beta_parts != nullptr) sum_of_gate(runs, beta_parts, g.d_beta, device);
}

void ema_multiscale(const Multiscale& p, const Device& device) {
  const Runs runs = Runs::of(p.batch, p.heads, p.seq_len, p.head_dim);
  with_element(p.dtype, [&](auto element) {
    launch<MultiscaleKernel<decltype(element)>>(runs.grid(), Runs::kWarps, 0, device, {runs, p});
  });
}

void ema_multiscale_backward(const MultiscaleBackward& g, const Device& device) {
  const Multiscale& p = g.forward;
  const Runs runs = Runs::of(p.batch, p.heads, p.seq_len, p.head_dim);
  float* const alpha_parts = allocate(device, p.scales * runs.count());
  float* const weight_parts = allocate(device, p.scales * runs.count());
  with_element(p.dtype, [&](auto element) {
    launch<MultiscaleBackwardKernel<decltype(element)>>(runs.grid(), Runs::kWarps, 0, device,
                                                        {runs, g, alpha_parts, weight_parts});
  });
  // [S, B, H, parts]
  SumKernel::launch({alpha_parts, static_cast<float*>(g.d_alphas), p.heads, runs.count(), runs.parts,
                     p.heads * runs.parts, p.batch, runs.parts},
                    p.scales, device);
  SumKernel::launch({weight_parts, static_cast<float*>(g.d_scale_weights), 1, runs.count(), 0, 0, 1, runs.count()},
                    p.scales, device);
}

}  // namespace torus::cuda
