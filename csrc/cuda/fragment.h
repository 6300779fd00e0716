// Matrix fragments of one warp for mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
// type"), and tiles of rows in shared memory that they are loaded from by ldmatrix.
//
// With group = lane / 4 and member = lane % 4, a register holds two neighbours:
//   Left  16 x 16, rows x depth:    register r: row group + 8 (r % 2), depth 2 member + 8 (r / 2) + {0, 1}
//   Right 16 x 8,  depth x columns: register r: depth 2 member + 8 r + {0, 1}, column group
//   Sum   16 x 8,  rows x columns:  value i: row group + 8 (i / 2), column 2 member + i % 2
#pragma once

#include "element.h"
#include "warp.h"

namespace torus::cuda {

constexpr int kRows = 16;     // of Left and Sum
constexpr int kDepth = 16;    // of Left and Right
constexpr int kColumns = 8;   // of Right and Sum

template <class E>
struct Left {
  Lane<uint32_t> reg[4];
};
template <class E>
struct Right {
  Lane<uint32_t> reg[2];
};
struct Sum {
  Lane<float> value[4];
};

TORUS_DEVICE Lane<int> fragment_group() { return lane_index() / 4; }
TORUS_DEVICE Lane<int> fragment_member() { return lane_index() % 4; }

TORUS_DEVICE Sum zero_sum() { return {{0.0f, 0.0f, 0.0f, 0.0f}}; }
template <int kCount>
TORUS_DEVICE void zero_sums(Sum (&sums)[kCount]) {
  TORUS_UNROLL
  for (int t = 0; t < kCount; ++t) sums[t] = zero_sum();
}

#if !defined(__CUDACC__)

// left [16][16] and right [16][8] in float32: products are exact there, sums are rounded one after another.
template <class E>
void unpack(const Left<E>& left, float (*matrix)[kDepth]) {
  for (int lane = 0; lane < kWarpLanes; ++lane)
    for (int r = 0; r < 4; ++r) {
      float* const at = &matrix[lane / 4 + 8 * (r % 2)][lane % 4 * 2 + 8 * (r / 2)];
      at[0] = low_of<E>(left.reg[r][lane]), at[1] = high_of<E>(left.reg[r][lane]);
    }
}
template <class E>
void unpack(const Right<E>& right, float (*matrix)[kColumns]) {
  for (int lane = 0; lane < kWarpLanes; ++lane)
    for (int r = 0; r < 2; ++r) {
      const int depth = lane % 4 * 2 + 8 * r, column = lane / 4;
      matrix[depth][column] = low_of<E>(right.reg[r][lane]), matrix[depth + 1][column] = high_of<E>(right.reg[r][lane]);
    }
}

#endif

// sum = start + left * right
template <class E>
TORUS_DEVICE void multiply(Sum& sum, const Left<E>& left, const Right<E>& right, const Sum& start) {
#if defined(__CUDACC__)
  float* const d = sum.value;
  const float* const c = start.value;
  if constexpr (std::is_same_v<E, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(left.reg[0]), "r"(left.reg[1]), "r"(left.reg[2]), "r"(left.reg[3]), "r"(right.reg[0]), "r"(right.reg[1]),
          "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(left.reg[0]), "r"(left.reg[1]), "r"(left.reg[2]), "r"(left.reg[3]), "r"(right.reg[0]), "r"(right.reg[1]),
          "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
#else
  float a[kRows][kDepth], b[kDepth][kColumns];
  unpack(left, a);
  unpack(right, b);
  for (int row = 0; row < kRows; ++row) {
    float total[kColumns];
    for (int column = 0; column < kColumns; ++column)
      total[column] = start.value[row / 8 * 2 + column % 2][row % 8 * 4 + column / 2];
    for (int depth = 0; depth < kDepth; ++depth)
      for (int column = 0; column < kColumns; ++column) total[column] += a[row][depth] * b[depth][column];
    for (int column = 0; column < kColumns; ++column)
      sum.value[row / 8 * 2 + column % 2][row % 8 * 4 + column / 2] = total[column];
  }
#endif
}

// sum += left * right
template <class E>
TORUS_DEVICE void multiply(Sum& sum, const Left<E>& left, const Right<E>& right) {
  multiply(sum, left, right, sum);
}

// Two neighbouring sums, 16 columns, as the left operand of a product over those columns; rounded to E.
template <class E>
TORUS_DEVICE Left<E> left_of(const Sum& first, const Sum& second) {
  const auto pack = [](float low, float high) { return pack_pair<E>(low, high); };
  Left<E> left;
  left.reg[0] = map(pack, first.value[0], first.value[1]);
  left.reg[1] = map(pack, first.value[2], first.value[3]);
  left.reg[2] = map(pack, second.value[0], second.value[1]);
  left.reg[3] = map(pack, second.value[2], second.value[3]);
  return left;
}

// What `left_of` lost by rounding.
template <class E>
TORUS_DEVICE Left<E> residual_of(const Sum& first, const Sum& second, const Left<E>& rounded) {
  const auto low = [](float x, uint32_t pair) { return x - low_of<E>(pair); };
  const auto high = [](float x, uint32_t pair) { return x - high_of<E>(pair); };
  Sum rest[2];
  const Sum* const sums[2] = {&first, &second};
  for (int s = 0; s < 2; ++s)
    for (int half = 0; half < 2; ++half) {
      const Lane<uint32_t> pair = rounded.reg[2 * s + half];
      rest[s].value[2 * half] = map(low, sums[s]->value[2 * half], pair);
      rest[s].value[2 * half + 1] = map(high, sums[s]->value[2 * half + 1], pair);
    }
  return left_of<E>(rest[0], rest[1]);
}

// ldmatrix: four 8 x 8 matrices whose rows of 16 bytes begin at the elements `row` of lanes 0-7, 8-15, 16-23, 24-31.
template <bool kTransposed, class E>
TORUS_DEVICE void load_matrices(const Shared<E>& from, const Lane<int>& row, Lane<uint32_t> (&to)[4]) {
#if defined(__CUDACC__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(from.data + row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
#else
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * matrix + r;
      from.block->shared.read(from.address(row[lane], 8), 16, rows[r], from.block->actor(from.warp, Actor::kMany));
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint16_t low = kTransposed ? rows[c][r] : rows[r][c], high = kTransposed ? rows[c + 1][r] : rows[r][c + 1];
      to[matrix][lane] = static_cast<uint32_t>(high) << 16 | low;
    }
  }
#endif
}

template <class E>
TORUS_DEVICE void split(const Lane<uint32_t> (&reg)[4], Right<E> (&result)[2]) {
  result[0].reg[0] = reg[0], result[0].reg[1] = reg[1];
  result[1].reg[0] = reg[2], result[1].reg[1] = reg[3];
}

// Rows of D elements in shared memory. Chunks of 16 bytes are permuted within a row, so that the eight rows of a matrix
// lie in different banks: by the row's number where a row fills all banks, and by half of it where two rows do.
template <class E, int D>
struct Tile {
  static_assert(D == 32 || D == 64 || D == 128, "a row is 64, 128 or 256 bytes");
  static_assert(sizeof(E) == 2, "ldmatrix moves 16-bit elements");
  using Element = E;
  static constexpr int kWidth = D;
  static constexpr int kChunk = 8;
  static constexpr int kChunks = D / kChunk;
  static TORUS_INLINE constexpr int bytes(int rows) { return rows * D * static_cast<int>(sizeof(E)); }

  Shared<E> data;

  static TORUS_DEVICE Lane<int> at(const Lane<int>& row, const Lane<int>& chunk) {
    const Lane<int> turn = kChunks == 4 ? row / 2 % 4 : row % 8;
    return row * D + (chunk ^ turn) * kChunk;
  }

  // Rows row0 ... + 15, columns col0 ... + 15, as a left operand.
  TORUS_DEVICE Left<E> left(int row0, int col0) const {
    Left<E> result;
    const Lane<int> lane = lane_index();
    load_matrices<false>(data, at(lane % 16 + row0, lane / 16 + col0 / kChunk), result.reg);
    return result;
  }

  // The same rows as columns of two right operands, whose depth is columns col0 ... + 15: the tile's transpose.
  TORUS_DEVICE void right_of_rows(int row0, int col0, Right<E> (&result)[2]) const {
    const Lane<int> lane = lane_index();
    Lane<uint32_t> reg[4];
    load_matrices<false>(data, at(lane % 8 + lane / 16 * 8 + row0, lane / 8 % 2 + col0 / kChunk), reg);
    split<E>(reg, result);
  }

  // The same rows as the depth of two right operands, whose columns are columns col0 ... + 15.
  TORUS_DEVICE void right_of_depth(int row0, int col0, Right<E> (&result)[2]) const {
    const Lane<int> lane = lane_index();
    Lane<uint32_t> reg[4];
    load_matrices<true>(data, at(lane % 16 + row0, lane / 16 + col0 / kChunk), reg);
    split<E>(reg, result);
  }
};

// The same with rows 16 bytes longer instead, which puts matrices into different banks, too: columns are then constant
// offsets, and a loop over rows has one address to compute.
template <class E, int D>
struct PaddedTile {
  static_assert(sizeof(E) == 2 && D % kDepth == 0);
  using Element = E;
  static constexpr int kWidth = D;
  static constexpr int kChunk = 8;
  static constexpr int kChunks = D / kChunk;
  static constexpr int kPitch = D + kChunk;
  static TORUS_INLINE constexpr int bytes(int rows) { return rows * kPitch * static_cast<int>(sizeof(E)); }

  Shared<E> data;

  static TORUS_DEVICE Lane<int> at(const Lane<int>& row, const Lane<int>& chunk) {
    return row * kPitch + chunk * kChunk;
  }
  TORUS_DEVICE void right_of_rows(int row0, int col0, Right<E> (&result)[2]) const {
    const Lane<int> lane = lane_index();
    Lane<uint32_t> reg[4];
    load_matrices<false>(data, at(lane % 8 + lane / 16 * 8, lane / 8 % 2) + (row0 * kPitch + col0), reg);
    split<E>(reg, result);
  }
  TORUS_DEVICE void right_of_depth(int row0, int col0, Right<E> (&result)[2]) const {
    const Lane<int> lane = lane_index();
    Lane<uint32_t> reg[4];
    load_matrices<true>(data, at(lane % 16, lane / 16) + (row0 * kPitch + col0), reg);
    split<E>(reg, result);
  }
};

}  // namespace torus::cuda
