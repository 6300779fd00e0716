// Chunks of sixteen other rows in shared memory, one or two at a time, beside sixteen own rows in registers: what the
// forward and the backward of lines and of the cross flows are made of.
#pragma once

#include "scores.h"

namespace torus::cuda {

constexpr int kChunkRows = kOwnRows;
constexpr int kChunkTiles = kChunkRows / kColumns;
static_assert(kChunkRows == kDepth, "a chunk is the depth of one product");

// Blocks of a multiprocessor, for kernels made of this: of 168 and 255 registers a thread.
template <int D>
constexpr int kChunkBlocks = D <= 64 ? 3 : 2;

// Own rows as left operands; of each lane's two tokens.
template <class E, int D>
struct RowFragments {
  Left<E> held[D / kDepth];

  TORUS_DEVICE RowFragments(const Operands& in, const E* rows, int64_t stride, const Lane<int> (&token)[2]) {
    TORUS_UNROLL
    for (int k = 0; k < D / kDepth; ++k)
      TORUS_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int column = k * kDepth + r / 2 * kColumns;
        const Lane<int>& row = token[r % 2];
        held[k].reg[r] = load_pair(rows, pair_index(row, stride, fragment_member() + column / 2),
                                   row >= 0 && column < in.head_dim);
      }
  }
  TORUS_DEVICE const Left<E>& operator()(int k) const { return held[k]; }
};

// `factor` makes of q . k a score in base 2, `inverse` turns it back.
struct ScoreScale {
  float factor, inverse;

  TORUS_DEVICE explicit ScoreScale(const Operands& in) : factor(in.scale2), inverse(in.inverse2) {}
};

// What products with own rows begin with: a number of each of a lane's two rows, which is added to scores for nothing.
// Its place in a sum is four registers. Copied there, two would be copied before every product; by a shuffle among
// lanes that have the same, the compiler keeps all four.
struct RowStart {
  Sum start;

  TORUS_DEVICE RowStart() : start(zero_sum()) {}
  TORUS_DEVICE RowStart(const Lane<float>& first, const Lane<float>& second)
      : start{{first, shuffle_xor(first, 1), second, shuffle_xor(second, 1)}} {}
  TORUS_DEVICE const Lane<float>& of_row(int half) const { return start.value[2 * half]; }
  TORUS_DEVICE const Sum& operator()(int) const { return start; }
};

// Begins to copy keys and values of the tokens in its lanes, up to two chunks, into rows from row0 on.
template <class E, int D>
TORUS_DEVICE void bring_keys(const Operands& in, const Head& head, const Lane<int>& token,
                             const PaddedTile<E, D> (&to)[2], int row0, int rows) {
  copy_rows<2 * kChunkRows, 2, PaddedTile<E, D>>(in, token,
                                                 {rows_of<const E>(in.k, head.batch, head.key_value),
                                                  rows_of<const E>(in.v, head.batch, head.key_value)},
                                                 {in.k.token, in.v.token}, to, row0, rows);
}

// Where chunks that are neighbours lie in shared memory: side by side.
template <int kChunks>
struct ChunkSlots {
  int first;

  TORUS_DEVICE int row0(int c) const { return (first + c) * kChunkRows; }
};

// Makes scores of keys -inf, once they are scaled, that are older than the oldest one that their query sees;
// token_of(column) of a chunk's keys.
template <class TokenOf>
TORUS_DEVICE void hide_older(Sum (&scores)[kChunkTiles], float scale2, const Lane<int> (&oldest)[2], TokenOf token_of) {
  const float hidden = scale2 < 0.0f ? -kNegativeInfinity : kNegativeInfinity;
  TORUS_UNROLL
  for (int t = 0; t < kChunkTiles; ++t)
    TORUS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Lane<int> key = token_of(fragment_member() * 2 + (t * kColumns + i % 2));
      scores[t].value[i] = select(key >= oldest[i / 2], scores[t].value[i], hidden);
    }
}

struct HidesNothing {
  TORUS_DEVICE void operator()(Sum (&)[kChunkTiles]) const {}
};

// What tables are made of: functions of the squared distance, negative where nothing is seen.
struct Bias {
  float slope;
  TORUS_DEVICE Lane<float> operator()(const Lane<float>& squared) const {
    return select(squared >= 0.0f, squared * slope, kNegativeInfinity);
  }
};
struct SquaredDistance {
  TORUS_DEVICE Lane<float> operator()(const Lane<float>& squared) const {
    return select(squared >= 0.0f, squared, Lane<float>(0.0f));
  }
};

// Numbers of displacements (own row less other row) in shared memory: two in a place, of a lane's two columns of a sum,
// which are one step apart. Sums that are neighbours, in rows or in columns, are kTileStep places apart, and chunks
// twice that.
template <int kTileStep>
struct DisplacementTable {
  Shared<FloatPair> pairs;
  Lane<int> first;  // place of the first sum of the rows' own chunk
};

// Fills places of a table with what `number` makes of two squared distances.
template <class Number>
struct PutPairs {
  Shared<FloatPair> pairs;
  Number number;

  TORUS_DEVICE void operator()(const Lane<int>& at, const Lane<float> (&squared)[2], const Lane<bool>& where) const {
    const auto pair = [](float low, float high) { return FloatPair{low, high}; };
    pairs.store(at, map(pair, number(squared[0]), number(squared[1])), where);
  }
};
template <class Number>
PutPairs(Shared<FloatPair>, Number) -> PutPairs<Number>;

// Those of 8 kTiles others, beginning with a chunk so far from the own one.
template <int kTiles>
struct ChunkNumbers {
  Lane<FloatPair> value[kTiles + 1];

  template <int kTileStep>
  TORUS_DEVICE ChunkNumbers(const DisplacementTable<kTileStep>& table, int chunk) {
    const Lane<int> first = table.first - chunk * (kChunkTiles * kTileStep);
    TORUS_UNROLL
    for (int d = 0; d <= kTiles; ++d) value[d] = table.pairs.load(first + (d + 1 - kTiles) * kTileStep);
  }
  // At value 2 half + i of a sum.
  TORUS_DEVICE Lane<float> at(int tile, int half, int i) const {
    return map([i](FloatPair two) { return i == 0 ? two.low : two.high; }, value[half - tile + kTiles - 1]);
  }
};

}  // namespace torus::cuda
