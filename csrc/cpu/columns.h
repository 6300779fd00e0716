// Softmaxes down the columns of a tile: rows are keys, lanes are queries, so that nothing is summed across lanes.
//
// A line's biases depend on displacement alone, so that one row of a tile reads its biases as a slice of a table. Both
// arcs of a loop share one exponential: they meet only at the query's own site and half a loop away, and these shared
// keys, which the second arc's table hides, are added to it apart. Every stream has its own maximum and normaliser.
#pragma once

#include "softmax.h"

namespace torus::TORUS_ISA {

constexpr int kMaxSharedSteps = 3;  // displacements that both arcs see: 0 and half a loop, which has two signs

// What a vector of queries knows of one of its streams.
template <class T>
struct ColumnStream {
  const T* bias;         // of the first row's lanes; that of row r lies r numbers before
  const T* rho_squared;  // likewise, backward only
  Vec<T> weight;         // g, times alpha where there is a state
  Vec<T> lse;            // in nats, as the entropy:
  Vec<T> entropy;        // written by the forward where asked for
  Vec<T> delta;          // sum P dP, written by the backward
  Vec<T> d_decay;        // sum -rho^2/2 weight P (dP - delta), written by the backward
};

// A key that both arcs see: lane i sees it in row `row` + i, as the second arc's bias.
template <class T>
struct SharedStep {
  int64_t row;
  T bias, rho_squared;
};

// One vector of queries against the keys of a tile.
template <class T>
struct Columns {
  using V = Vec<T>;
  using Index = typename IntOf<T>::type;
  using VecIndex = typename VectorOf<Index, kLanes<T>>::type;

  T* scores;  // [keys, ld]
  int64_t ld, keys;
  T scale2;   // of the scores, in units of log 2
  VecIndex oldest;  // first row that a lane sees, where `hide`
  bool hide;
  int count;  // streams
  ColumnStream<T> streams[kMaxStreamsPerTile];
  int shared_count;
  SharedStep<T> shared[kMaxSharedSteps];
};

template <class T, int STREAMS, bool HIDE>
struct ColumnSoftmax {
  using V = Vec<T>;
  Columns<T>& c;
  V max[STREAMS], total[STREAMS];
  V extra[kMaxSharedSteps];  // of shared keys: the second arc's biased scores, then exponentials

  TORUS_INLINE explicit ColumnSoftmax(Columns<T>& columns) : c(columns) {}

  TORUS_INLINE V bias(int s, int64_t r) const {
    const V x = load(c.streams[s].bias - r);
    if constexpr (!HIDE) return x;
    using Index = typename Columns<T>::Index;
    return splat<typename Columns<T>::VecIndex>(static_cast<Index>(r)) >= c.oldest ? x : splat<V>(kNegativeInfinity<T>);
  }

  // Calls visit(lane, address) for every lane that sees a shared key.
  template <class Visit>
  TORUS_INLINE void each_shared_lane(const SharedStep<T>& step, Visit visit) const {
    const int64_t from = max_of(0, -step.row), to = min_of(kLanes<T>, c.keys - step.row);
    for (int64_t i = from; i < to; ++i)
      if (!HIDE || step.row + i >= c.oldest[i]) visit(i, (step.row + i) * c.ld + i);
  }
  // What `read` makes of a shared key's number in a tile; `absent` in lanes that do not see it.
  template <class Read>
  TORUS_INLINE V gather_shared(const SharedStep<T>& step, const T* tile, T absent, Read read) const {
    T lanes[kLanes<T>];
    for (int64_t i = 0; i < kLanes<T>; ++i) lanes[i] = absent;
    each_shared_lane(step, [&](int64_t i, int64_t at) { lanes[i] = read(tile[at]); });
    return load(lanes);
  }
  TORUS_INLINE void add_shared(const SharedStep<T>& step, T* tile, V x) const {
    T lanes[kLanes<T>];
    store(lanes, x);
    each_shared_lane(step, [&](int64_t i, int64_t at) { tile[at] += lanes[i]; });
  }

  TORUS_INLINE void find_maxima() {
    const V scale = splat<V>(c.scale2);
    for (int s = 0; s < STREAMS; ++s) max[s] = splat<V>(kNegativeInfinity<T>);
    for (int64_t r = 0; r < c.keys; ++r) {
      const V score = load(c.scores + r * c.ld);
#pragma GCC unroll 2
      for (int s = 0; s < STREAMS; ++s) max[s] = max_keep(max[s], score * scale + bias(s, r));
    }
    if constexpr (STREAMS == 2)
      for (int n = 0; n < c.shared_count; ++n) {
        extra[n] = gather_shared(c.shared[n], c.scores, kNegativeInfinity<T>,
                                 [&](T score) { return score * c.scale2 + c.shared[n].bias; });
        max[1] = max_keep(max[1], extra[n]);
      }
  }

  // The biased score of row r less the maximum of the stream that sees it, in which lanes `first` says which that is.
  TORUS_INLINE V centred(int64_t r, V score, V scale) const {
    const V x = score * scale + bias(0, r) - max[0];
    if constexpr (STREAMS == 1) return x;
    return max_keep(score * scale + bias(1, r) - max[1], x);
  }
  TORUS_INLINE auto is_first(int64_t r) const { return load(c.streams[0].bias - r) > splat<V>(kNegativeInfinity<T>); }

  // Scores become exponentials, less the second arc's share of shared keys, which goes to `extra`; visit(r, e, first)
  // sees every row.
  template <class Visit>
  TORUS_INLINE void exponentiate(Visit visit) {
    const V scale = splat<V>(c.scale2);
    for (int s = 0; s < STREAMS; ++s) total[s] = V{};
#pragma GCC unroll 2
    for (int64_t r = 0; r < c.keys; ++r) {
      const V e = exp2<T>(centred(r, load(c.scores + r * c.ld), scale));
      store(c.scores + r * c.ld, e);
      if constexpr (STREAMS == 1) {
        total[0] += e;
      } else {
        const auto first = is_first(r);
        total[0] = first ? total[0] + e : total[0];
        total[1] = first ? total[1] : total[1] + e;
      }
      visit(r, e);
    }
    if constexpr (STREAMS == 2)
      for (int n = 0; n < c.shared_count; ++n) {
        extra[n] = exp2<T>(extra[n] - max[1]);
        total[1] += extra[n];
      }
  }

  TORUS_INLINE V chosen(int64_t r, V first, V second) const {
    if constexpr (STREAMS == 1) return first;
    return is_first(r) ? first : second;
  }
};

template <class T, int STREAMS, bool HIDE>
void softmax_columns_forward(Columns<T>& c, bool with_lse, bool with_entropy) {
  using V = Vec<T>;
  ColumnSoftmax<T, STREAMS, HIDE> softmax(c);
  softmax.find_maxima();
  V weighted[STREAMS] = {};  // sum of e times its exponent; an e that underflows adds nothing
  if (with_entropy) {
    const V scale = splat<V>(c.scale2);
    T* const scores = c.scores;
    if constexpr (STREAMS == 2)
      for (int n = 0; n < c.shared_count; ++n) {
        const V x = softmax.extra[n] - softmax.max[1], e = exp2<T>(x);
        weighted[1] += e == V{} ? V{} : e * x;
      }
    for (int64_t r = 0; r < c.keys; ++r) {
      const V x = softmax.centred(r, load(scores + r * c.ld), scale), e = exp2<T>(x);
      const V term = e == V{} ? V{} : e * x;
      if constexpr (STREAMS == 1) {
        weighted[0] += term;
      } else {
        const auto first = softmax.is_first(r);
        weighted[0] = first ? weighted[0] + term : weighted[0];
        weighted[1] = first ? weighted[1] : weighted[1] + term;
      }
    }
  }
  softmax.exponentiate([](int64_t, V) {});
  V factor[2] = {};
  for (int s = 0; s < STREAMS; ++s) {
    factor[s] = c.streams[s].weight / softmax.total[s];
    if (!with_lse && !with_entropy) continue;
    const V log2_total = log2_of(softmax.total[s]);
    c.streams[s].lse = (softmax.max[s] + log2_total) * splat<V>(static_cast<T>(kLn2));
    const V entropy = (log2_total - weighted[s] / softmax.total[s]) * splat<V>(static_cast<T>(kLn2));
    c.streams[s].entropy = entropy < V{} ? V{} : entropy;
  }
  for (int64_t r = 0; r < c.keys; ++r) {
    T* const at = c.scores + r * c.ld;
    store(at, load(at) * softmax.chosen(r, factor[0], factor[1]));
  }
  if constexpr (STREAMS == 2)
    for (int n = 0; n < c.shared_count; ++n) softmax.add_shared(c.shared[n], c.scores, softmax.extra[n] * factor[1]);
}

template <class T, int STREAMS, bool HIDE>
void softmax_columns_backward(Columns<T>& c, T* d_probs, T scale) {
  using V = Vec<T>;
  ColumnSoftmax<T, STREAMS, HIDE> softmax(c);
  softmax.find_maxima();
  V delta[2] = {};
  softmax.exponentiate([&](int64_t r, V e) __attribute__((always_inline)) {
    const V term = e * load(d_probs + r * c.ld);
    if constexpr (STREAMS == 1) {
      delta[0] += term;
    } else {
      const auto first = softmax.is_first(r);
      delta[0] = first ? delta[0] + term : delta[0];
      delta[1] = first ? delta[1] : delta[1] + term;
    }
  });
  V shared_d_prob[kMaxSharedSteps];
  if constexpr (STREAMS == 2)
    for (int n = 0; n < c.shared_count; ++n) {
      shared_d_prob[n] = softmax.gather_shared(c.shared[n], d_probs, T(0), [](T x) { return x; });
      delta[1] += softmax.extra[n] * shared_d_prob[n];
    }
  V weight[2] = {}, d_decay[2] = {};
  for (int s = 0; s < STREAMS; ++s) {
    weight[s] = c.streams[s].weight / softmax.total[s];
    delta[s] /= softmax.total[s];
    c.streams[s].delta = delta[s];
  }
  const V out_scale = splat<V>(scale);
  for (int64_t r = 0; r < c.keys; ++r) {
    T* const at = c.scores + r * c.ld;
    const V p = load(at) * softmax.chosen(r, weight[0], weight[1]);
    const V d_logits = p * (load(d_probs + r * c.ld) - softmax.chosen(r, delta[0], delta[1]));
    const V d_bias = d_logits * load(c.streams[0].rho_squared - r);
    if constexpr (STREAMS == 1) {
      d_decay[0] += d_bias;
    } else {
      const auto first = softmax.is_first(r);
      d_decay[0] = first ? d_decay[0] + d_bias : d_decay[0];
      d_decay[1] = first ? d_decay[1] : d_decay[1] + d_bias;
    }
    store(at, p);
    store(d_probs + r * c.ld, d_logits * out_scale);
  }
  if constexpr (STREAMS == 2)
    for (int n = 0; n < c.shared_count; ++n) {
      const V p = softmax.extra[n] * weight[1], d_logits = p * (shared_d_prob[n] - delta[1]);
      d_decay[1] += d_logits * splat<V>(c.shared[n].rho_squared);
      softmax.add_shared(c.shared[n], c.scores, p);
      softmax.add_shared(c.shared[n], d_probs, d_logits * out_scale);
    }
  for (int s = 0; s < STREAMS; ++s) c.streams[s].d_decay = d_decay[s] * splat<V>(static_cast<T>(-0.5));
}

template <class T, class F>
TORUS_INLINE void with_column_shape(const Columns<T>& c, F call) {
  const auto with_streams = [&](auto hide) __attribute__((always_inline)) {
    if (c.count == 1) return call(std::integral_constant<int, 1>{}, hide);
    return call(std::integral_constant<int, 2>{}, hide);
  };
  if (c.hide) return with_streams(std::true_type{});
  with_streams(std::false_type{});
}

// scores [keys, lanes] -> sum_s weight_s * softmax_s, in place.
template <class T>
TORUS_INLINE void softmax_columns(Columns<T>& c, bool with_lse, bool with_entropy) {
  with_column_shape(c, [&](auto streams, auto hide) {
    softmax_columns_forward<T, streams(), hide()>(c, with_lse, with_entropy);
  });
}

// scores -> sum_s weight_s P_s and d_probs -> scale * sum_s weight_s P_s (dP - delta_s), both [keys, lanes], in place.
//
// A column holds whole softmaxes, so they are recomputed from their own maximum rather than from a rounded LSE.
template <class T>
TORUS_INLINE void softmax_columns_backward(Columns<T>& c, T* d_probs, T scale) {
  with_column_shape(c, [&](auto streams, auto hide) {
    softmax_columns_backward<T, streams(), hide()>(c, d_probs, scale);
  });
}

}  // namespace torus::TORUS_ISA
