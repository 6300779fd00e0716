// Rows of scores: every stream has its own maximum, normaliser and bias; invisible keys have a bias of -inf.
//
// Scores and biases are in units of log 2, so that the exponential is 2^x.
#pragma once

#include "vec.h"

namespace torus::TORUS_ISA {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr int kMaxStreamsPerTile = 2;

template <class T>
constexpr T kNegativeInfinity = -__builtin_inf();

// What a row of a tile says about one of its streams.
template <class T>
struct StreamRow {
  const T* bias;         // [n], -inf where the key is invisible
  const T* rho_squared;  // [n], backward only; finite everywhere
  T weight;              // g, times alpha where there is a state
  T lse;                 // natural units } written by the forward
  T entropy;             // nats          } where asked for
  T delta;               // sum P dP, written by the backward
  T d_decay;             // sum -rho^2/2 weight P (dP - delta), written by the backward
};

template <class T>
TORUS_INLINE T row_max(const T* scores, const T* bias, int64_t n, Vec<T> c) {
  Vec<T> top = splat<Vec<T>>(kNegativeInfinity<T>);
  for (int64_t j = 0; j < n; j += kLanes<T>) top = max_keep(top, load(scores + j) * c + load(bias + j));
  return max_of_lanes<T>(top);
}

// scores [n] -> sum_s weight_s * softmax_s, in place. `exps` holds [streams, ld_exps] numbers.
template <class T>
void softmax_forward(T* scores, int64_t n, T scale2, StreamRow<T>* streams, int count, T* exps, int64_t ld_exps,
                     bool with_lse, bool with_entropy) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const V c = splat<V>(scale2);
  T factor[kMaxStreamsPerTile] = {};
  for (int s = 0; s < count; ++s) {
    const T* bias = streams[s].bias;
    T* e = exps + s * ld_exps;
    const T max = row_max(scores, bias, n, c);
    const V shift = splat<V>(max);
    V total = {};
    for (int64_t j = 0; j < n; j += lanes) {
      const V p = exp2<T>(load(scores + j) * c + load(bias + j) - shift);
      store(e + j, p);
      total += p;
    }
    const T normaliser = sum<T>(total);
    factor[s] = streams[s].weight / normaliser;
    if (!with_lse && !with_entropy) continue;
    const T log2_normaliser = static_cast<T>(__builtin_log2(normaliser));
    streams[s].lse = (max + log2_normaliser) * static_cast<T>(kLn2);
    if (with_entropy) {
      // H = log Z - sum p (x - max); an underflown p adds nothing.
      V weighted = {};
      for (int64_t j = 0; j < n; j += lanes) {
        const V p = load(e + j), x = load(scores + j) * c + load(bias + j) - shift;
        weighted += p == V{} ? V{} : p * x;
      }
      const T entropy = (log2_normaliser - sum<T>(weighted) / normaliser) * static_cast<T>(kLn2);
      streams[s].entropy = entropy < 0 ? 0 : entropy;
    }
  }
  const V f0 = splat<V>(factor[0]);
  if (count == 1) {
    for (int64_t j = 0; j < n; j += lanes) store(scores + j, load(exps + j) * f0);
  } else {
    const V f1 = splat<V>(factor[1]);
    for (int64_t j = 0; j < n; j += lanes)
      store(scores + j, load(exps + j) * f0 + load(exps + ld_exps + j) * f1);
  }
}

// scores [n] -> sum_s weight_s P_s and d_probs [n] -> scale * sum_s weight_s P_s (dP - delta_s), in place.
//
// A row holds whole softmaxes, so they are recomputed from their own maximum rather than from a rounded LSE.
template <class T>
void softmax_backward(T* scores, T* d_probs, int64_t n, T scale, T scale2, StreamRow<T>* streams, int count, T* exps,
                      int64_t ld_exps) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  const V c = splat<V>(scale2);
  for (int s = 0; s < count; ++s) {
    const T* bias = streams[s].bias;
    T* e = exps + s * ld_exps;
    const V shift = splat<V>(row_max(scores, bias, n, c));
    V total = {}, delta = {};
    for (int64_t j = 0; j < n; j += lanes) {
      const V p = exp2<T>(load(scores + j) * c + load(bias + j) - shift);
      store(e + j, p);
      total += p;
      delta += p * load(d_probs + j);
    }
    const T normaliser = sum<T>(total);
    streams[s].delta = sum<T>(delta) / normaliser;
    streams[s].weight /= normaliser;
  }
  const V out_scale = splat<V>(scale);
  const V w0 = splat<V>(streams[0].weight), delta0 = splat<V>(streams[0].delta);
  V d_decay0 = {};
  if (count == 1) {
    for (int64_t j = 0; j < n; j += lanes) {
      const V p = load(exps + j) * w0, d_logits = p * (load(d_probs + j) - delta0);
      d_decay0 += d_logits * load(streams[0].rho_squared + j);
      store(scores + j, p);
      store(d_probs + j, d_logits * out_scale);
    }
  } else {
    const V w1 = splat<V>(streams[1].weight), delta1 = splat<V>(streams[1].delta);
    V d_decay1 = {};
    for (int64_t j = 0; j < n; j += lanes) {
      const V dp = load(d_probs + j);
      const V p0 = load(exps + j) * w0, p1 = load(exps + ld_exps + j) * w1;
      const V d0 = p0 * (dp - delta0), d1 = p1 * (dp - delta1);
      d_decay0 += d0 * load(streams[0].rho_squared + j);
      d_decay1 += d1 * load(streams[1].rho_squared + j);
      store(scores + j, p0 + p1);
      store(d_probs + j, (d0 + d1) * out_scale);
    }
    streams[1].d_decay = static_cast<T>(-0.5) * sum<T>(d_decay1);
  }
  streams[0].d_decay = static_cast<T>(-0.5) * sum<T>(d_decay0);
}

}  // namespace torus::TORUS_ISA
