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

// One query's tiles: scores, mixed probabilities and, backward, their gradients, with the strides of rows of keys.
template <class T>
struct BandQuery {
  const T *scores, *d_probs;
  int64_t score_row;
  T *mixed, *d_scores;
  int64_t mixed_row;
  T* exps;  // [vectors]
};

// The runs of one stream, as vectors. ROWS is their number where it is known and every run fits a vector: what is made
// of them then stays in registers. It is 0 elsewhere.
template <class T, bool PAIRED, int ROWS>
struct BandVectors {
  using V = Vec<T>;
  static constexpr int kVectors = PAIRED ? (ROWS + 1) / 2 : ROWS;
  const BandStream<T>& band;
  RowBuffer<T, kVectors> exps;

  // Calls visit(vector, row, column, last) for every vector; `last` says that a pair's second row is missing.
  template <class Visit>
  TORUS_INLINE void each(Visit visit) const {
    if constexpr (ROWS > 0) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const int row = PAIRED ? 2 * v : v;
        visit(v, row, int64_t{0}, PAIRED && row + 1 == ROWS);
      }
    } else if constexpr (PAIRED) {
      int64_t v = 0;
      for (int64_t row = 0; row < band.rows; row += 2, ++v) visit(v, row, int64_t{0}, row + 1 == band.rows);
    } else {
      int64_t v = 0;
      const int64_t per_row = band.vectors_per_row();
      for (int64_t row = 0; row < band.rows; ++row)
        for (int64_t i = 0; i < per_row; ++i, ++v) visit(v, row, i * kLanes<T>, false);
    }
  }
  // One vector of a tile of scores or of their gradients.
  TORUS_INLINE V scores(const T* tile, const BandQuery<T>& query, int64_t row, int64_t column, bool last) const {
    const T* const from = tile + band.score + row * query.score_row + column;
    if constexpr (!PAIRED) return load(from);
    constexpr int half = kHalfLanes<T>;
    const auto low = load<half>(from), high = load<half>(last ? from : from + query.score_row);
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

// The exponentials of a stream's scores into `runs`; returns their sum.
template <class T, bool PAIRED, int ROWS>
TORUS_INLINE T exponentiate(BandVectors<T, PAIRED, ROWS>& runs, const BandQuery<T>& query, T scale2, const T* bias,
                            T& max) {
  using V = Vec<T>;
  const V scale = splat<V>(scale2);
  V top = splat<V>(kNegativeInfinity<T>);
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) __attribute__((always_inline)) {
    const V x = runs.scores(query.scores, query, row, column, last) * scale + load(bias + v * kLanes<T>);
    runs.exps.set(v, x);
    top = max_keep(top, x);
  });
  max = max_of_lanes<T>(top);
  const V shift = splat<V>(max);
  V total = {};
  runs.each([&](int64_t v, int64_t, int64_t, bool) __attribute__((always_inline)) {
    const V e = exp2<T>(runs.exps.get(v) - shift);
    runs.exps.set(v, e);
    total += e;
  });
  return sum<T>(total);
}

template <class T, bool PAIRED, int ROWS>
void band_forward(const BandStream<T>& band, const BandQuery<T>& query, T scale2, StreamRow<T>& stream, bool with_lse,
                  bool with_entropy) {
  using V = Vec<T>;
  BandVectors<T, PAIRED, ROWS> runs{band, RowBuffer<T, BandVectors<T, PAIRED, ROWS>::kVectors>(query.exps)};
  T max;
  const T total = exponentiate(runs, query, scale2, stream.bias, max);
  const V factor = splat<V>(stream.weight / total);
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) __attribute__((always_inline)) {
    runs.mix(runs.exps.get(v) * factor, query.mixed + band.mixed + row * query.mixed_row + column, query.mixed_row,
             row, last);
  });
  if (!with_lse && !with_entropy) return;
  const T log2_total = log2_of(total);
  stream.lse = (max + log2_total) * static_cast<T>(kLn2);
  if (!with_entropy) return;
  // H = log Z - sum p (x - max); a p that underflows adds nothing.
  const V scale = splat<V>(scale2), shift = splat<V>(max);
  V weighted = {};
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) {
    const V e = runs.exps.get(v);
    const V x = runs.scores(query.scores, query, row, column, last) * scale + load(stream.bias + v * kLanes<T>) - shift;
    weighted += e == V{} ? V{} : e * x;
  });
  const T entropy = (log2_total - sum<T>(weighted) / total) * static_cast<T>(kLn2);
  stream.entropy = entropy < 0 ? 0 : entropy;
}

template <class T, bool PAIRED, int ROWS>
void band_backward(const BandStream<T>& band, const T* rho_squared, const BandQuery<T>& query, T scale, T scale2,
                   StreamRow<T>& stream) {
  using V = Vec<T>;
  BandVectors<T, PAIRED, ROWS> runs{band, RowBuffer<T, BandVectors<T, PAIRED, ROWS>::kVectors>(query.exps)};
  T max;
  const T total = exponentiate(runs, query, scale2, stream.bias, max);
  V product = {};
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) __attribute__((always_inline)) {
    product += runs.exps.get(v) * runs.scores(query.d_probs, query, row, column, last);
  });
  stream.delta = sum<T>(product) / total;
  const V weight = splat<V>(stream.weight / total), delta = splat<V>(stream.delta), out_scale = splat<V>(scale);
  V d_decay = {};
  runs.each([&](int64_t v, int64_t row, int64_t column, bool last) __attribute__((always_inline)) {
    const V p = runs.exps.get(v) * weight;
    const V d_logits = p * (runs.scores(query.d_probs, query, row, column, last) - delta);
    d_decay += d_logits * load(rho_squared + v * kLanes<T>);
    const int64_t at = band.mixed + row * query.mixed_row + column;
    runs.mix(p, query.mixed + at, query.mixed_row, row, last);
    runs.mix(d_logits * out_scale, query.d_scores + at, query.mixed_row, row, last);
  });
  stream.d_decay = static_cast<T>(-0.5) * sum<T>(d_decay);
}

// Calls call(paired, rows) with both as constants; the default windows have code of their own.
template <class T, class F>
TORUS_INLINE void with_run_shape(const BandStream<T>& band, F call) {
  if (band.paired()) {
    if (band.rows == 15) return call(std::true_type{}, std::integral_constant<int, 15>{});
    if (band.rows == 8) return call(std::true_type{}, std::integral_constant<int, 8>{});
    return call(std::true_type{}, std::integral_constant<int, 0>{});
  }
  if (band.vectors_per_row() == 1) {
    if (band.rows == 7) return call(std::false_type{}, std::integral_constant<int, 7>{});
    if (band.rows == 4) return call(std::false_type{}, std::integral_constant<int, 4>{});
  }
  call(std::false_type{}, std::integral_constant<int, 0>{});
}

template <class T>
TORUS_INLINE void band_softmax_forward(const BandStream<T>& band, const BandQuery<T>& query, T scale2,
                                       StreamRow<T>& stream, bool with_lse, bool with_entropy) {
  with_run_shape(band, [&](auto paired, auto rows) {
    band_forward<T, paired(), rows()>(band, query, scale2, stream, with_lse, with_entropy);
  });
}

template <class T>
TORUS_INLINE void band_softmax_backward(const BandStream<T>& band, const T* rho_squared, const BandQuery<T>& query,
                                        T scale, T scale2, StreamRow<T>& stream) {
  with_run_shape(band, [&](auto paired, auto rows) {
    band_backward<T, paired(), rows()>(band, rho_squared, query, scale, scale2, stream);
  });
}

}  // namespace torus::TORUS_ISA
