// Softmaxes of one query of the cross flows: its visible keys lie in bands, one run of neighbouring columns in every
// row of keys, which is the same run for all queries but for a shift.
//
// A stream whose runs fit half a vector takes two rows of keys at a time.
#pragma once

#include "softmax.h"

namespace torus::TORUS_ISA {

// Where a stream's runs lie. Offsets are those of the first lattice row's first query.
template <class T>
struct BandStream {
  int64_t rows, length;   // runs, and keys in each
  int64_t score;          // offset of the first run in a tile of scores
  int64_t mixed;          // and in a query's mixed probabilities
  int64_t add_from, add_to;  // rows whose mixed probabilities another stream has begun
  int64_t vectors;        // of scores, all rows

  TORUS_INLINE bool paired() const { return length <= kHalfLanes<T>; }
  TORUS_INLINE int64_t vectors_per_row() const { return ceil_div(length, kLanes<T>); }
  TORUS_INLINE void count_vectors() { vectors = paired() ? ceil_div(rows, 2) : rows * vectors_per_row(); }
  // Calls visit(place, row, column) for every place of the stream's tables; row is -1 where nothing lies.
  template <class Visit>
  TORUS_INLINE void for_each_place(Visit visit) const {
    const int64_t width = paired() ? kHalfLanes<T> : vectors_per_row() * kLanes<T>;
    for (int64_t place = 0; place < vectors * kLanes<T>; ++place) {
      const int64_t row = place / width, column = place % width;
      const bool here = row < rows && column < length;
      visit(place, here ? row : -1, column);
    }
  }
};

// The runs of one stream, as vectors.
template <class T, bool PAIRED>
struct BandVectors {
  using V = Vec<T>;
  const BandStream<T>& band;

  // Calls visit(vector, row, column, last) for every vector; `last` says that a pair's second row is missing.
  template <class Visit>
  TORUS_INLINE void each(Visit visit) const {
    int64_t v = 0;
    if constexpr (PAIRED) {
      for (int64_t row = 0; row < band.rows; row += 2, ++v) visit(v, row, int64_t{0}, row + 1 == band.rows);
    } else {
      const int64_t per_row = band.vectors_per_row();
      for (int64_t row = 0; row < band.rows; ++row)
        for (int64_t i = 0; i < per_row; ++i, ++v) visit(v, row, i * kLanes<T>, false);
    }
  }
  static TORUS_INLINE V load_runs(const T* from, int64_t row_stride, bool last) {
    if constexpr (!PAIRED) return load(from);
    constexpr int half = kHalfLanes<T>;
    const auto low = load<half>(from), high = load<half>(last ? from : from + row_stride);
    return join(low, high, std::make_integer_sequence<int, kLanes<T>>{});
  }
  template <int... I>
  static TORUS_INLINE V join(Vec<T, kHalfLanes<T>> low, Vec<T, kHalfLanes<T>> high, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(low, high, I...);
  }
  // Into the rows of mixed probabilities: added where another stream has begun them, else stored.
  TORUS_INLINE void mix(V x, T* to, int64_t row_stride, int64_t row, bool last) const {
    if constexpr (!PAIRED) {
      mix_row<kLanes<T>>(x, to, row);
    } else {
      constexpr std::make_integer_sequence<int, kHalfLanes<T>> half;
      mix_row<kHalfLanes<T>>(half_of<T, kLanes<T>, false>(x, half), to, row);
      if (!last) mix_row<kHalfLanes<T>>(half_of<T, kLanes<T>, true>(x, half), to + row_stride, row + 1);
    }
  }
  template <int LANES>
  TORUS_INLINE void mix_row(Vec<T, LANES> x, T* to, int64_t row) const {
    store(to, row >= band.add_from && row < band.add_to ? load<LANES>(to) + x : x);
  }
};

// One query's tiles: scores, mixed probabilities and, backward, their gradients, with the strides of rows of keys.
template <class T>
struct BandQuery {
  const T *scores, *d_probs;
  int64_t score_row;
  T *mixed, *d_scores;
  int64_t mixed_row;
  T* exps;  // [vectors]
};

template <class T, bool PAIRED>
TORUS_INLINE T band_exponentials(const BandVectors<T, PAIRED>& runs, const BandQuery<T>& query, T scale2,
                                 const T* bias, T& max) {
  using V = Vec<T>;
  const V scale = splat<V>(scale2);
  const BandStream<T>& band = runs.band;
  V top = splat<V>(kNegativeInfinity<T>);
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) __attribute__((always_inline)) {
    const T* from = query.scores + band.score + row * query.score_row + column;
    const V x = runs.load_runs(from, query.score_row, last) * scale + load(bias + v * kLanes<T>);
    store(query.exps + v * kLanes<T>, x);
    top = max_keep(top, x);
  });
  max = max_of_lanes<T>(top);
  const V shift = splat<V>(max);
  V total = {};
#pragma GCC unroll 2
  for (int64_t i = 0; i < band.vectors * kLanes<T>; i += kLanes<T>) {
    const V e = exp2<T>(load(query.exps + i) - shift);
    store(query.exps + i, e);
    total += e;
  }
  return sum<T>(total);
}

template <class T, bool PAIRED>
void band_softmax_forward(const BandStream<T>& band, const BandQuery<T>& query, T scale2, StreamRow<T>& stream,
                          bool with_lse, bool with_entropy) {
  using V = Vec<T>;
  const BandVectors<T, PAIRED> runs{band};
  T max;
  const T total = band_exponentials(runs, query, scale2, stream.bias, max);
  const V factor = splat<V>(stream.weight / total);
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) __attribute__((always_inline)) {
    runs.mix(load(query.exps + v * kLanes<T>) * factor, query.mixed + band.mixed + row * query.mixed_row + column,
             query.mixed_row, row, last);
  });
  if (!with_lse && !with_entropy) return;
  const T log2_total = log2_of(total);
  stream.lse = (max + log2_total) * static_cast<T>(kLn2);
  if (!with_entropy) return;
  // H = log Z - sum p (x - max); a p that underflows adds nothing.
  const V scale = splat<V>(scale2), shift = splat<V>(max);
  V weighted = {};
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) {
    const T* from = query.scores + band.score + row * query.score_row + column;
    const V e = load(query.exps + v * kLanes<T>);
    const V x = runs.load_runs(from, query.score_row, last) * scale + load(stream.bias + v * kLanes<T>) - shift;
    weighted += e == V{} ? V{} : e * x;
  });
  const T entropy = (log2_total - sum<T>(weighted) / total) * static_cast<T>(kLn2);
  stream.entropy = entropy < 0 ? 0 : entropy;
}

template <class T, bool PAIRED>
void band_softmax_backward(const BandStream<T>& band, const T* rho_squared, const BandQuery<T>& query, T scale, T scale2,
                           StreamRow<T>& stream) {
  using V = Vec<T>;
  const BandVectors<T, PAIRED> runs{band};
  T max;
  const T total = band_exponentials(runs, query, scale2, stream.bias, max);
  const auto d_prob = [&](int64_t row, int64_t column, bool last) __attribute__((always_inline)) {
    return runs.load_runs(query.d_probs + band.score + row * query.score_row + column, query.score_row, last);
  };
  V product = {};
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) __attribute__((always_inline)) {
    product += load(query.exps + v * kLanes<T>) * d_prob(row, column, last);
  });
  stream.delta = sum<T>(product) / total;
  const V weight = splat<V>(stream.weight / total), delta = splat<V>(stream.delta), out_scale = splat<V>(scale);
  V d_decay = {};
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) __attribute__((always_inline)) {
    const V p = load(query.exps + v * kLanes<T>) * weight;
    const V d_logits = p * (d_prob(row, column, last) - delta);
    d_decay += d_logits * load(rho_squared + v * kLanes<T>);
    const int64_t at = band.mixed + row * query.mixed_row + column;
    runs.mix(p, query.mixed + at, query.mixed_row, row, last);
    runs.mix(d_logits * out_scale, query.d_scores + at, query.mixed_row, row, last);
  });
  stream.d_decay = static_cast<T>(-0.5) * sum<T>(d_decay);
}

}  // namespace torus::TORUS_ISA
