// One stream of sixteen queries, by chunks of sixteen keys, one or two at a time.
//
// Exponents are taken from a number that need not be the maximum, as long as nothing overflows and the largest
// exponential is not small: the maximum of the first chunk, or of any later one in which the exponentials of a row come
// to more than kHeadroom. So the loop that almost all scores go through looks for no maximum and never rescales; it
// leaves a chunk that is too large to `add_chunk`. Whether one is depends on the row's own scores alone, and both add a
// row's chunks up in the same order: what a query gets depends on no other.
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
      scores[t].value[i] = scores[t].value[i] * scale2 + biases.at(first_tile + t, i / 2, i % 2);
}

// 2^(x - from) in place of x, and sums over a lane's columns, one after another.
TORUS_DEVICE void exponentiate(Sum (&x)[kChunkTiles], const Lane<float> (&from)[2], Lane<float> (&sums)[2]) {
  TORUS_UNROLL
  for (int half = 0; half < 2; ++half)
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      TORUS_UNROLL
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        x[t].value[i] = exp2_of(x[t].value[i] - from[half]);
        sums[half] = t + i == 2 * half ? x[t].value[i] : sums[half] + x[t].value[i];
      }
}

template <class E, int D>
struct ChunkSoftmax : SoftmaxSums {
  using Rows = PaddedTile<E, D>;
  const RowFragments<E, D>& query;
  const Rows keys, values;
  const float scale2;
  Sum out[D / kColumns];

  TORUS_DEVICE ChunkSoftmax(const RowFragments<E, D>& query, const Rows& keys, const Rows& values, float scale2)
      : query(query), keys(keys), values(values), scale2(scale2) {
    zero_sums(out);
  }

  // The queries' own chunk, before any other: every row sees something of it.
  template <class Table>
  TORUS_DEVICE void begin(const Table& table, int slot) {
    Sum x[kChunkTiles];
    multiply_rows(x, query, keys, slot * kChunkRows);
    add_biases(x, ChunkNumbers<kChunkTiles>(table, 0), 0, scale2);
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half) maximum[half] = anchor(quad_maximum(highest(x, half)));
    exponentiate(x, maximum, total);
    multiply_depth<E, D>(out, left_of<E>(x[0], x[1]), values, slot * kChunkRows);
  }

  // Neighbouring chunks that lie in slots, the first so far from the queries' own; false, and nothing done, where their
  // exponentials are too large. Not before there is a maximum.
  template <int kChunks, class Table>
  TORUS_DEVICE bool add_chunks(const Table& table, int chunk, const int (&slots)[kChunks]) {
    Sum e[kChunks][kChunkTiles];
    Lane<float> sums[kChunks][2];
    TORUS_UNROLL
    for (int c = 0; c < kChunks; ++c) multiply_rows(e[c], query, keys, slots[c] * kChunkRows);
    const ChunkNumbers<kChunks * kChunkTiles> biases(table, chunk);
    Lane<bool> large = false;
    TORUS_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      add_biases(e[c], biases, c * kChunkTiles, scale2);
      exponentiate(e[c], maximum, sums[c]);
      large = large || sums[c][0] > kHeadroom || sums[c][1] > kHeadroom;
    }
    if (any(large)) return false;
    TORUS_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      TORUS_UNROLL
      for (int half = 0; half < 2; ++half) total[half] = total[half] + sums[c][half];
      multiply_depth<E, D>(out, left_of<E>(e[c][0], e[c][1]), values, slots[c] * kChunkRows);
    }
    return true;
  }

  // One chunk, whatever its scores; hide(scores) makes those of hidden pairs -inf once they are scaled.
  template <class Table, class Hide>
  TORUS_DEVICE void add_chunk(const Table& table, int chunk, int slot, bool with_spread, Hide hide) {
    Sum x[kChunkTiles], e[kChunkTiles];
    Lane<float> sums[2], kept[2], from[2];
    multiply_rows(x, query, keys, slot * kChunkRows);
    hide(x);
    add_biases(x, ChunkNumbers<kChunkTiles>(table, chunk), 0, scale2);
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half) from[half] = anchor(maximum[half]);
    copy(e, x);
    exponentiate(e, from, sums);
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Lane<float> before = maximum[half];
      const Lane<bool> grows = before == kNegativeInfinity || quad_maximum(sums[half]) > kHeadroom;
      maximum[half] = select(grows, quad_maximum(highest(x, half)), before);
      const Lane<float> shift = from[half];
      from[half] = anchor(maximum[half]);
      kept[half] = exp2_of(before - from[half]);
      if (with_spread) spread[half] = (spread[half] + total[half] * (shift - from[half])) * kept[half];
    }
    copy(e, x);
    exponentiate(e, from, sums);
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      total[half] = total[half] * kept[half] + sums[half];
      if (!with_spread) continue;
      TORUS_UNROLL
      for (int t = 0; t < kChunkTiles; ++t)
        TORUS_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i)
          spread[half] = spread[half] + select(e[t].value[i] == 0.0f, Lane<float>(0.0f),
                                               e[t].value[i] * (x[t].value[i] - from[half]));
    }
    if (any(kept[0] != 1.0f || kept[1] != 1.0f)) {
      TORUS_UNROLL
      for (int t = 0; t < D / kColumns; ++t)
        TORUS_UNROLL
        for (int i = 0; i < 4; ++i) out[t].value[i] = out[t].value[i] * kept[i / 2];
    }
    multiply_depth<E, D>(out, left_of<E>(e[0], e[1]), values, slot * kChunkRows);
  }

 private:
  // Of a row's columns in a lane.
  static TORUS_DEVICE Lane<float> highest(const Sum (&x)[kChunkTiles], int half) {
    Lane<float> result = kNegativeInfinity;
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      result = max_of_floats(result, max_of_floats(x[t].value[2 * half], x[t].value[2 * half + 1]));
    return result;
  }
  static TORUS_DEVICE void copy(Sum (&to)[kChunkTiles], const Sum (&from)[kChunkTiles]) {
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t) to[t] = from[t];
  }
};

}  // namespace torus::cuda
