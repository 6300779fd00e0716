// Tensors as the plain structs that kernels take, for all bindings together: an operator's arguments have been checked,
// their last dimensions are contiguous.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace torus {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: return DType::kFloat32;
  }
}

inline Tokens tokens_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }
inline Tokens tokens_of(const Optional& x) { return x ? tokens_of(*x) : Tokens{}; }

// Per head [H] (or [H, 8]) or per token [B, H, T] (or [B, H, T, 8]); contiguous.
inline Parameter parameter_of(const Tensor& x, bool per_stream) {
  const int64_t last = per_stream ? kNumStreams : 1;
  if (x.dim() == (per_stream ? 2 : 1)) return {x.data_ptr(), 0, last, 0};
  return {x.data_ptr(), x.size(1) * x.size(2) * last, x.size(2) * last, last};
}
inline Parameter parameter_of(const Optional& x) { return x ? parameter_of(*x, false) : Parameter{}; }

inline void* pointer(const Optional& x) { return x ? x->data_ptr() : nullptr; }

inline AttentionInputs attention_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weights,
                                        const Tensor& decay, const Optional& state, const Optional& alpha,
                                        const Optional& first_key, const std::vector<int64_t>& lattice,
                                        double scale) {
  AttentionInputs in{};
  in.lattice = lattice_from_spec(lattice.data());
  in.dtype = dtype_of(q);
  in.batch = q.size(0), in.heads = q.size(1), in.kv_heads = k.size(1), in.seq_len = q.size(2), in.head_dim = q.size(3);
  in.scale = scale;
  in.q = tokens_of(q), in.k = tokens_of(k), in.v = tokens_of(v), in.state = tokens_of(state);
  in.weights = parameter_of(weights, true), in.decay = parameter_of(decay, true), in.alpha = parameter_of(alpha);
  in.first_key = static_cast<const int64_t*>(pointer(first_key));
  return in;
}

inline Compound compound_of(const Tensor& x, const Tensor& state, const Tensor& alpha, const Optional& beta,
                            const Optional& velocity) {
  Compound p{};
  p.dtype = dtype_of(x);
  p.batch = x.size(0), p.heads = x.size(1), p.seq_len = x.size(2), p.head_dim = x.size(3);
  p.x = tokens_of(x), p.state = tokens_of(state), p.velocity = tokens_of(velocity);
  p.alpha = parameter_of(alpha, false), p.beta = parameter_of(beta);
  return p;
}

// The first of S states [S, B, H, T, D].
inline Tokens states_of(const Tensor& x) { return {x.data_ptr(), x.stride(1), x.stride(2), x.stride(3)}; }

inline Multiscale multiscale_of(const Tensor& x, const Tensor& states, const Tensor& alphas,
                                const Tensor& scale_weights) {
  Multiscale p{};
  p.dtype = dtype_of(x);
  p.scales = states.size(0);
  p.batch = x.size(0), p.heads = x.size(1), p.seq_len = x.size(2), p.head_dim = x.size(3);
  p.x = tokens_of(x), p.states = states_of(states), p.states_scale = states.stride(0);
  p.alphas = {alphas.data_ptr(), 0, 1, p.heads}, p.scale_weights = {scale_weights.data_ptr(), 0, 0, 1};
  return p;
}

}  // namespace torus
