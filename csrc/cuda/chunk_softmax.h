// One stream of sixteen queries, by chunks of sixteen keys, one or two at a time.
//
// Exponents are taken from a number that need not be the maximum, as long as nothing overflows and the largest
// exponential is not small: the maximum of the first chunk, or of any later one in which the exponentials of a row come
// to more than kHeadroom. So the loop that almost all scores go through looks for no maximum and never rescales; it
// leaves a chunk that is too large to `add_chunk`. Whether one is depends on the row's own scores alone, and both add a
// row's chunks up in the same order: what a query gets depends on no other. The number is not subtracted either: in
// units of q . k it is what the products begin with.
#pragma once

#include "chunks.h"
#include "outputs.h"

namespace torus::cuda {

constexpr float kHeadroom = 256.0f;  // well within float16

// Scores of a chunk, biased and in base 2, in place of its sums.
template <int kTiles>
TORUS_DEVICE void add_biases(Sum (&scores)[kChunkTiles], const ChunkNumbers<kTiles>& biases, int first_tile,
                             float scale2) {
  TORUS_UNROLL
  for (int t = 0; t < kChunkTiles; ++t)
    TORUS_UNROLL
    for (int i = 0; i < 4; ++i)
      scores[t].value[i] = multiply_add(scores[t].value[i], scale2, biases.at(first_tile + t, i / 2, i % 2));
}

// 2^x in place of x, and sums over a lane's columns, one after another.
TORUS_DEVICE void exponentiate(Sum (&x)[kChunkTiles], Lane<float> (&sums)[2]) {
  TORUS_UNROLL
  for (int half = 0; half < 2; ++half)
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      TORUS_UNROLL
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        x[t].value[i] = exp2_of(x[t].value[i]);
        sums[half] = t + i == 2 * half ? x[t].value[i] : sums[half] + x[t].value[i];
      }
}

template <class E, int D>
struct ChunkSoftmax : SoftmaxSums {
  using Rows = PaddedTile<E, D>;
  const RowFragments<E, D>& query;
  const Rows keys, values;
  const ScoreScale scale;
  RowStart level;  // exponents are taken from -level, in units of q . k; products with keys begin with it
  Sum out[D / kColumns];

  TORUS_DEVICE ChunkSoftmax(const RowFragments<E, D>& query, const Rows& keys, const Rows& values,
                            const ScoreScale& scale)
      : query(query), keys(keys), values(values), scale(scale) {
    zero_sums(out);
  }

  // The queries' own chunk, before any other: every row sees something of it. hide(scores) makes those of hidden pairs
  // -inf once they are scaled.
  template <class Table, class Hide>
  TORUS_DEVICE void begin(const Table& table, int slot, bool with_spread, Hide hide) {
    Sum x[kChunkTiles];
    multiply_rows(x, query, keys, slot * kChunkRows);
    hide(x);
    add_biases(x, ChunkNumbers<kChunkTiles>(table, 0), 0, scale.factor);
    const Lane<float> none[2] = {0.0f, 0.0f}, shift[2] = {anchor(highest(x, 0)), anchor(highest(x, 1))};
    level = RowStart(shift[0] * -scale.inverse, shift[1] * -scale.inverse);
    add_exponentials(x, shift, none, with_spread, slot);
  }

  // Neighbouring chunks from `slot` on, the first so far from the queries' own; false, and nothing done, where their
  // exponentials are too large.
  template <int kChunks, class Table>
  TORUS_DEVICE bool add_chunks(const Table& table, int chunk, int slot) {
    Sum e[kChunks][kChunkTiles];
    Lane<float> sums[kChunks][2];
    TORUS_UNROLL
    for (int c = 0; c < kChunks; ++c) multiply_rows(e[c], query, keys, (slot + c) * kChunkRows, level);
    const ChunkNumbers<kChunks * kChunkTiles> biases(table, chunk);
    Lane<bool> large = false;
    TORUS_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      add_biases(e[c], biases, c * kChunkTiles, scale.factor);
      exponentiate(e[c], sums[c]);
      large = large || sums[c][0] > kHeadroom || sums[c][1] > kHeadroom;
    }
    if (any(large)) return false;
    TORUS_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      TORUS_UNROLL
      for (int half = 0; half < 2; ++half) total[half] = total[half] + sums[c][half];
      multiply_depth<E, D>(out, left_of<E>(e[c][0], e[c][1]), values, (slot + c) * kChunkRows);
    }
    return true;
  }

  // One chunk, whatever its scores. Rows in which they are too large have a new level, from which they are computed
  // again: as far above the old one as they are, they have lost digits. Their largest is then subtracted, so that its
  // exponential is 1 whatever the level was rounded to.
  template <class Table, class Hide>
  TORUS_DEVICE void add_chunk(const Table& table, int chunk, int slot, bool with_spread, Hide hide) {
    Sum x[kChunkTiles], e[kChunkTiles];
    Lane<float> sums[2], shift[2] = {0.0f, 0.0f}, kept[2] = {1.0f, 1.0f};
    const auto score = [&] {
      multiply_rows(x, query, keys, slot * kChunkRows, level);
      hide(x);
      add_biases(x, ChunkNumbers<kChunkTiles>(table, chunk), 0, scale.factor);
    };
    score();
    copy(e, x);
    exponentiate(e, sums);
    const Lane<bool> grows[2] = {quad_maximum(sums[0]) > kHeadroom, quad_maximum(sums[1]) > kHeadroom};
    if (any(grows[0] || grows[1])) {
      Lane<float> new_level[2];
      TORUS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Lane<float> above = select(grows[half], highest(x, half), Lane<float>(0.0f));
        kept[half] = exp2_of(-above);
        new_level[half] = multiply_add(above, -scale.inverse, level.of_row(half));
        if (with_spread) spread[half] = (spread[half] - total[half] * above) * kept[half];
      }
      level = RowStart(new_level[0], new_level[1]);
      score();
      TORUS_UNROLL
      for (int half = 0; half < 2; ++half) shift[half] = select(grows[half], highest(x, half), Lane<float>(0.0f));
      TORUS_UNROLL
      for (int t = 0; t < D / kColumns; ++t)
        TORUS_UNROLL
        for (int i = 0; i < 4; ++i) out[t].value[i] = out[t].value[i] * kept[i / 2];
    }
    add_exponentials(x, shift, kept, with_spread, slot);
  }

  TORUS_DEVICE void finish() {
    for (int half = 0; half < 2; ++half) maximum[half] = level.of_row(half) * -scale.factor;
    SoftmaxSums::finish();
  }

 private:
  // Of scores x less a shift, where what there is has been multiplied by `kept`, but for the total.
  TORUS_DEVICE void add_exponentials(Sum (&x)[kChunkTiles], const Lane<float> (&shift)[2], const Lane<float> (&kept)[2],
                                     bool with_spread, int slot) {
    Sum e[kChunkTiles];
    Lane<float> sums[2];
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      TORUS_UNROLL
      for (int i = 0; i < 4; ++i) x[t].value[i] = x[t].value[i] - shift[i / 2];
    copy(e, x);
    exponentiate(e, sums);
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      total[half] = multiply_add(total[half], kept[half], sums[half]);
      if (!with_spread) continue;
      TORUS_UNROLL
      for (int t = 0; t < kChunkTiles; ++t)
        TORUS_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i)
          spread[half] = spread[half] + select(e[t].value[i] == 0.0f, Lane<float>(0.0f), e[t].value[i] * x[t].value[i]);
    }
    multiply_depth<E, D>(out, left_of<E>(e[0], e[1]), values, slot * kChunkRows);
  }
  // Of a row.
  static TORUS_DEVICE Lane<float> highest(const Sum (&x)[kChunkTiles], int half) {
    Lane<float> result = kNegativeInfinity;
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      result = max_of_floats(result, max_of_floats(x[t].value[2 * half], x[t].value[2 * half + 1]));
    return quad_maximum(result);
  }
  static TORUS_DEVICE void copy(Sum (&to)[kChunkTiles], const Sum (&from)[kChunkTiles]) {
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t) to[t] = from[t];
  }
};

}  // namespace torus::cuda
