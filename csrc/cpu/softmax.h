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

TORUS_INLINE float log2_of(float x) { return __builtin_log2f(x); }
TORUS_INLINE double log2_of(double x) { return __builtin_log2(x); }

// What a row of a tile says about one of its streams.
template <class T>
struct StreamRow {
  const T* bias;         // [n], -inf where the key is invisible
  const T* rho_squared;  // [n], backward only; finite everywhere
  T weight;              // g, times alpha where there is a state
  T lse;                 // in nats, as the entropy:
  T entropy;             // written by the forward where asked for
  T delta;               // sum P dP, written by the backward
  T d_decay;             // sum -rho^2/2 weight P (dP - delta), written by the backward
};

// The numbers of one row and stream between two passes: in registers where their count is known, else in memory.
template <class T, int COUNT>
struct RowBuffer {
  Vec<T> values[COUNT];
  TORUS_INLINE explicit RowBuffer(T*) {}
  TORUS_INLINE Vec<T> get(int64_t i) const { return values[i]; }
  TORUS_INLINE void set(int64_t i, Vec<T> x) { values[i] = x; }
};
template <class T>
struct RowBuffer<T, 0> {
  T* values;
  TORUS_INLINE explicit RowBuffer(T* memory) : values(memory) {}
  TORUS_INLINE Vec<T> get(int64_t i) const { return load(values + i * kLanes<T>); }
  TORUS_INLINE void set(int64_t i, Vec<T> x) { store(values + i * kLanes<T>, x); }
};

// One row of a tile: COUNT vectors of scores (0: as many as `n` says) and STREAMS streams that see it.
template <class T, int COUNT, int STREAMS>
struct Row {
  using V = Vec<T>;
  int64_t vectors;
  RowBuffer<T, COUNT> first, second;

  TORUS_INLINE Row(int64_t n, T* exps, int64_t ld_exps)
      : vectors(COUNT > 0 ? COUNT : n / kLanes<T>), first(exps), second(exps + ld_exps) {}

  template <class F>
  TORUS_INLINE void each(F visit) const {
    if constexpr (COUNT > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < COUNT; ++i) visit(i, i * kLanes<T>);
    } else {
      for (int64_t i = 0; i < vectors; ++i) visit(i, i * kLanes<T>);
    }
  }
  template <int S>
  TORUS_INLINE RowBuffer<T, COUNT>& buffer() {
    if constexpr (S == 0) return first;
    else return second;
  }

  // Biased scores into the buffer of stream S; returns their maximum.
  template <int S>
  TORUS_INLINE T bias_scores(const T* scores, V scale2, const T* bias) {
    V top = splat<V>(kNegativeInfinity<T>);
    each([&](int64_t i, int64_t j) {
      const V x = load(scores + j) * scale2 + load(bias + j);
      buffer<S>().set(i, x);
      top = max_keep(top, x);
    });
    return max_of_lanes<T>(top);
  }
};

template <class T, int COUNT, int STREAMS>
void softmax_forward_row(T* scores, int64_t n, T scale2, StreamRow<T>* streams, T* exps, int64_t ld_exps,
                         bool with_lse, bool with_entropy) {
  using V = Vec<T>;
  Row<T, COUNT, STREAMS> row(n, exps, ld_exps);
  const V c = splat<V>(scale2);
  T max[STREAMS], factor[STREAMS];
  max[0] = row.template bias_scores<0>(scores, c, streams[0].bias);
  if constexpr (STREAMS == 2) max[1] = row.template bias_scores<1>(scores, c, streams[1].bias);
  const auto exponentiate = [&]<int S>(std::integral_constant<int, S>) __attribute__((always_inline)) {
    const V shift = splat<V>(max[S]);
    V total = {};
    row.each([&](int64_t i, int64_t) {
      const V p = exp2<T>(row.template buffer<S>().get(i) - shift);
      row.template buffer<S>().set(i, p);
      total += p;
    });
    const T normaliser = sum<T>(total);
    factor[S] = streams[S].weight / normaliser;
    if (!with_lse && !with_entropy) return;
    const T log2_normaliser = log2_of(normaliser);
    streams[S].lse = (max[S] + log2_normaliser) * static_cast<T>(kLn2);
    if (!with_entropy) return;
    // H = log Z - sum p (x - max); a p that underflows adds nothing.
    V weighted = {};
    row.each([&](int64_t i, int64_t j) {
      const V p = row.template buffer<S>().get(i), x = load(scores + j) * c + load(streams[S].bias + j) - shift;
      weighted += p == V{} ? V{} : p * x;
    });
    const T entropy = (log2_normaliser - sum<T>(weighted) / normaliser) * static_cast<T>(kLn2);
    streams[S].entropy = entropy < 0 ? 0 : entropy;
  };
  exponentiate(std::integral_constant<int, 0>{});
  if constexpr (STREAMS == 2) exponentiate(std::integral_constant<int, 1>{});
  row.each([&](int64_t i, int64_t j) {
    V mixed = row.first.get(i) * splat<V>(factor[0]);
    if constexpr (STREAMS == 2) mixed += row.second.get(i) * splat<V>(factor[1]);
    store(scores + j, mixed);
  });
}

template <class T, int COUNT, int STREAMS>
void softmax_backward_row(T* scores, T* d_probs, int64_t n, T scale, T scale2, StreamRow<T>* streams, T* exps,
                          int64_t ld_exps) {
  using V = Vec<T>;
  Row<T, COUNT, STREAMS> row(n, exps, ld_exps);
  const V c = splat<V>(scale2);
  T max[STREAMS];
  max[0] = row.template bias_scores<0>(scores, c, streams[0].bias);
  if constexpr (STREAMS == 2) max[1] = row.template bias_scores<1>(scores, c, streams[1].bias);
  T weight[STREAMS];
  const auto exponentiate = [&]<int S>(std::integral_constant<int, S>) __attribute__((always_inline)) {
    const V shift = splat<V>(max[S]);
    V total = {}, delta = {};
    row.each([&](int64_t i, int64_t j) {
      const V p = exp2<T>(row.template buffer<S>().get(i) - shift);
      row.template buffer<S>().set(i, p);
      total += p;
      delta += p * load(d_probs + j);
    });
    const T normaliser = sum<T>(total);
    streams[S].delta = sum<T>(delta) / normaliser;
    weight[S] = streams[S].weight / normaliser;
  };
  exponentiate(std::integral_constant<int, 0>{});
  if constexpr (STREAMS == 2) exponentiate(std::integral_constant<int, 1>{});
  const V out_scale = splat<V>(scale);
  V d_decay[STREAMS] = {};
  row.each([&](int64_t i, int64_t j) {
    const V d_prob = load(d_probs + j);
    const auto gradient = [&](int s, V p) __attribute__((always_inline)) {
      const V d_logits = p * (d_prob - splat<V>(streams[s].delta));
      d_decay[s] += d_logits * load(streams[s].rho_squared + j);
      return d_logits;
    };
    V mixed = row.first.get(i) * splat<V>(weight[0]);
    V d_score = gradient(0, mixed);
    if constexpr (STREAMS == 2) {
      const V p = row.second.get(i) * splat<V>(weight[1]);
      mixed += p;
      d_score += gradient(1, p);
    }
    store(scores + j, mixed);
    store(d_probs + j, d_score * out_scale);
  });
  for (int s = 0; s < STREAMS; ++s) streams[s].d_decay = static_cast<T>(-0.5) * sum<T>(d_decay[s]);
}

// Calls call(vectors, streams) with both as constants where a row of this many vectors has code of its own (`vectors`
// is 0 where it has not): those of the default windows, closed and causal, which keep their exponentials in registers.
template <class T, class F>
TORUS_INLINE void with_row_shape(int64_t n, int count, F call) {
  const auto with_streams = [&](auto vectors) __attribute__((always_inline)) {
    if (count == 1) return call(vectors, std::integral_constant<int, 1>{});
    return call(vectors, std::integral_constant<int, 2>{});
  };
  if constexpr (kVectorRegisters == 32 && sizeof(T) == 4) {
    switch (n / kLanes<T>) {
      case 6: return with_streams(std::integral_constant<int, 6>{});
      case 11: return with_streams(std::integral_constant<int, 11>{});
    }
  }
  with_streams(std::integral_constant<int, 0>{});
}

// scores [n] -> sum_s weight_s * softmax_s, in place. `exps` holds [streams, ld_exps] numbers.
template <class T>
TORUS_INLINE void softmax_forward(T* scores, int64_t n, T scale2, StreamRow<T>* streams, int count, T* exps,
                                  int64_t ld_exps, bool with_lse, bool with_entropy) {
  with_row_shape<T>(n, count, [&](auto vectors, auto several) {
    softmax_forward_row<T, vectors(), several()>(scores, n, scale2, streams, exps, ld_exps, with_lse, with_entropy);
  });
}

// scores [n] -> sum_s weight_s P_s and d_probs [n] -> scale * sum_s weight_s P_s (dP - delta_s), in place.
//
// A row holds whole softmaxes, so they are recomputed from their own maximum rather than from a rounded LSE.
template <class T>
TORUS_INLINE void softmax_backward(T* scores, T* d_probs, int64_t n, T scale, T scale2, StreamRow<T>* streams,
                                   int count, T* exps, int64_t ld_exps) {
  with_row_shape<T>(n, count, [&](auto vectors, auto several) {
    softmax_backward_row<T, vectors(), several()>(scores, d_probs, n, scale, scale2, streams, exps, ld_exps);
  });
}

}  // namespace torus::TORUS_ISA
