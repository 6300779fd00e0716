// Scores of a warp's sixteen own rows against a tile of others, as every stream sees them.
//
// kTiles sums stand side by side, 8 kTiles columns. In them a lane has rows group and group + 8 and, of each sum,
// columns 2 member and 2 member + 1; the displacement of row r from column c is r - c, so a lane meets kTiles + 1
// diagonals of blocks, twice.
#pragma once

#include "operands.h"

namespace torus::cuda {

constexpr int kTilesOfOthers = kOtherRows / kColumns;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

struct alignas(8) FloatPair {
  float low, high;
};

TORUS_DEVICE Lane<float> quad_sum(Lane<float> x) {
  x = x + shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
TORUS_DEVICE Lane<float> quad_maximum(Lane<float> x) {
  x = max_of_floats(x, shuffle_xor(x, 1));
  return max_of_floats(x, shuffle_xor(x, 2));
}

// A maximum as exponents are taken from it: 0 where nothing has been seen yet.
TORUS_DEVICE Lane<float> anchor(const Lane<float>& maximum) {
  return select(maximum == kNegativeInfinity, Lane<float>(0.0f), maximum);
}

// A warp's own rows as left operands: in registers, or loaded at every use where registers are needed for sums.
template <class E, int D, bool kHeld>
struct OwnFragments {
  Tile<E, D> tile;
  Left<E> held[kHeld ? D / kDepth : 1];

  // Once the tile is there.
  TORUS_DEVICE void load() {
    if constexpr (kHeld) {
      TORUS_UNROLL
      for (int k = 0; k < D / kDepth; ++k) held[k] = tile.left(0, k * kDepth);
    }
  }
  TORUS_DEVICE Left<E> operator()(int k) const {
    if constexpr (kHeld) return held[k];
    return tile.left(0, k * kDepth);
  }
};

// sums = start(tile) + own rows * rows row0 ... + 8 kTiles - 1 of others^T
template <int kTiles, class Own, class Others, class Start>
TORUS_DEVICE void multiply_rows(Sum (&sums)[kTiles], const Own& own, const Others& others, int row0, Start start) {
  static_assert(kTiles % 2 == 0, "others are loaded sixteen at a time");
  using E = typename Others::Element;
  TORUS_UNROLL
  for (int k = 0; k < Others::kWidth / kDepth; ++k) {
    const Left<E> left = own(k);
    TORUS_UNROLL
    for (int t = 0; t < kTiles; t += 2) {
      Right<E> right[2];
      others.right_of_rows(row0 + t * kColumns, k * kDepth, right);
      TORUS_UNROLL
      for (int i = t; i < t + 2; ++i) multiply(sums[i], left, right[i - t], k == 0 ? start(i) : sums[i]);
    }
  }
}
template <int kTiles, class Own, class Others>
TORUS_DEVICE void multiply_rows(Sum (&sums)[kTiles], const Own& own, const Others& others, int row0) {
  multiply_rows(sums, own, others, row0, [](int) { return zero_sum(); });
}

// out (+)= left * rows row0 ... + 15 of others
template <class E, int D, class Others>
TORUS_DEVICE void multiply_depth(Sum (&out)[D / kColumns], const Left<E>& left, const Others& others, int row0) {
TORUS_UNROLL
  for (int t = 0; t < D / kColumns; t += 2) {
    Right<E> right[2];
    others.right_of_depth(row0, t * kColumns, right);
    multiply(out[t], left, right[0]);
    multiply(out[t + 1], left, right[1]);
  }
}

// For one stream and one tile of others: a number for every displacement r - c of a warp, at r - c + kOtherRows - 1.
struct Slice {
  static constexpr int kSize = kOwnRows + kOtherRows;  // one more than there are
  Shared<float> values;
  int offset;

  TORUS_DEVICE Lane<int> index(int diagonal, int i) const {
    return fragment_group() - fragment_member() * 2 + (diagonal * kColumns + kOtherRows - 1 - i + offset);
  }
};

// Numbers of a slice where a lane needs them.
template <int kTiles>
struct Diagonals {
  Lane<float> value[kTiles + 1][2];

  // Of columns 8 tile0 ... of the slice.
  TORUS_DEVICE Diagonals(const Slice& slice, int tile0) {
TORUS_UNROLL
    for (int d = 0; d <= kTiles; ++d)
TORUS_UNROLL
      for (int i = 0; i < 2; ++i) value[d][i] = slice.values.load(slice.index(d + 1 - kTiles - tile0, i));
  }
  // At value 2 half + i of a sum.
  TORUS_DEVICE const Lane<float>& at(int tile, int half, int i) const { return value[half - tile + kTiles - 1][i]; }
};

// A warp's slices of all streams: biases and, where kSquared, squared distances.
template <bool kSquared>
struct Slices {
  static constexpr int kFloats = kMaxStreams * (kSquared ? 2 : 1) * Slice::kSize;
  Shared<float> values;    // kFloats, this warp's own
  bool seen[kMaxStreams];  // whether a stream sees anything of the tile

  TORUS_DEVICE Slice bias(int k) const { return {values, k * Slice::kSize}; }
  TORUS_DEVICE Slice squared(int k) const { return {values, (kMaxStreams + k) * Slice::kSize}; }

  // Whether any stream does.
  TORUS_DEVICE bool fill(const Operands& in, const Warp& warp, const OwnRows& own, const OtherPlace& other,
                         const float (&slope)[kMaxStreams]) {
    const Schedule& schedule = in.schedule;
    const TablePlace at = schedule.table_place(own.place, warp.index(), other);
    if (!own.any || !schedule.meets(at, other)) return false;
    warp.sync();
    bool sees = false;
    const int columns = schedule.table_columns();
TORUS_UNROLL
    for (int k = 0; k < kMaxStreams; ++k) {
      seen[k] = false;
      if (k >= schedule.num_streams) continue;
      const float* const row = in.squared + (int64_t{1} * k * schedule.table_rows() + at.row) * columns;
      Lane<bool> visible = false;
TORUS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Lane<int> e = lane_index() + half * kWarpLanes;
        const Lane<int> column = (e - (kOtherRows - 1)) * schedule.sign() + at.first;
        const Lane<float> squared = load(row, cast<int64_t>(column), column >= 0 && column < columns, -1.0f);
        const Lane<bool> wanted = e < Slice::kSize;
        values.store(e + k * Slice::kSize, select(squared >= 0.0f, squared * slope[k], kNegativeInfinity), wanted);
        if constexpr (kSquared) values.store(e + (kMaxStreams + k) * Slice::kSize, squared, wanted);
        visible = visible || (squared >= 0.0f && e < Slice::kSize - 1);
      }
      seen[k] = any(visible);
      sees = sees || seen[k];
    }
    warp.sync();
    return sees;
  }
};

// Scores of pairs that do not exist, or that first_key hides, become -inf once they are scaled. A query sees keys
// from its oldest on: own rows are queries and `of_others` the others' tokens, or, mirrored, own rows are keys and
// `of_others` the others' oldest keys.
template <bool kMirrored, int kTiles>
TORUS_DEVICE void hide(Sum (&scores)[kTiles], const Lane<int> (&of_own)[2], const Shared<int>& of_others, int row0,
                       float scale2) {
  const float hidden = scale2 < 0.0f ? -kNegativeInfinity : kNegativeInfinity;
TORUS_UNROLL
  for (int t = 0; t < kTiles; ++t)
TORUS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Lane<int> theirs = of_others.load(fragment_member() * 2 + (row0 + t * kColumns + i));
TORUS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Lane<bool> seen = kMirrored ? of_own[half] >= theirs : theirs >= of_own[half];
        scores[t].value[2 * half + i] = select(seen, scores[t].value[2 * half + i], hidden);
      }
    }
}

// Index of a pair of columns of a token's row, counted in pairs; strides are even.
TORUS_DEVICE Lane<int64_t> pair_index(const Lane<int>& token, int64_t stride, const Lane<int>& pair) {
  return index_of(token) * (stride / 2) + cast<int64_t>(pair);
}

// Two neighbouring elements of a token's row.
template <class E>
TORUS_DEVICE Lane<uint32_t> load_pair(const E* rows, const Lane<int64_t>& at, const Lane<bool>& where) {
  return load(reinterpret_cast<const uint32_t*>(rows), at, where, 0u);
}
template <class E>
TORUS_DEVICE void store_pair(E* rows, const Lane<int64_t>& at, const Lane<float>& low, const Lane<float>& high,
                             const Lane<bool>& where) {
  store(reinterpret_cast<uint32_t*>(rows), at, map([](float x, float y) { return pack_pair<E>(x, y); }, low, high),
        where);
}

// visit(half, t, at, where) for the pairs of columns that a lane has of rows [16, D] as sums: `at` of that in sum t,
// counted in pairs, in a tensor whose tokens are so many elements apart.
template <int D, class Visit>
TORUS_DEVICE void for_each_pair(const Operands& in, const Lane<int> (&token)[2], int64_t stride, Visit visit) {
  TORUS_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Lane<int64_t> first = pair_index(token[half], stride, fragment_member());
    // Columns beyond head_dim, a multiple of kColumns, are missing in all lanes.
    TORUS_UNROLL
    for (int t = 0; t < D / kColumns; ++t)
      visit(half, t, first + int64_t{1} * t * (kColumns / 2), token[half] >= 0 && t * kColumns < in.head_dim);
  }
}

// Adds rows of float32 sums [16, D] up in a workspace of [T, head_dim] or, where they are complete, calls finish(sums).
template <int D, class Finish>
TORUS_DEVICE void add_rows(const Operands& in, float* workspace, const Lane<int> (&token)[2],
                           const Sum (&sums)[D / kColumns], Finish finish) {
  FloatPair* const pairs = reinterpret_cast<FloatPair*>(workspace);
  Sum total[D / kColumns];
  TORUS_UNROLL
  for (int t = 0; t < D / kColumns; ++t) total[t] = sums[t];
  if (!in.begins)
    for_each_pair<D>(in, token, in.head_dim, [&](int half, int t, const Lane<int64_t>& at, const Lane<bool>& where) {
      const Lane<FloatPair> before = load(pairs, at, where, FloatPair{0.0f, 0.0f});
      total[t].value[2 * half] = total[t].value[2 * half] + map([](FloatPair two) { return two.low; }, before);
      total[t].value[2 * half + 1] = total[t].value[2 * half + 1] + map([](FloatPair two) { return two.high; }, before);
    });
  if (in.ends) return finish(total);
  for_each_pair<D>(in, token, in.head_dim, [&](int half, int t, const Lane<int64_t>& at, const Lane<bool>& where) {
    const auto pair = [](float low, float high) { return FloatPair{low, high}; };
    store(pairs, at, map(pair, total[t].value[2 * half], total[t].value[2 * half + 1]), where);
  });
}

}  // namespace torus::cuda
