// Products in bfloat16 with float32 sums, on the matrix tiles of AMX: 16 rows of 64 bytes each.
//
// A right operand is stored in units of two numbers that follow each other in the depth, as the instruction reads it.
// Rows, columns and depths come padded to whole pairs of tiles, so that there is one way through.
#pragma once

#include <immintrin.h>

#include "products.h"

// Tile instructions are inline assembly, which no sanitizer looks into.
#define TORUS_TILE_LOAD(tile, rows, stride) \
  do {                                      \
    touch_tile(rows, stride, false);        \
    _tile_loadd(tile, rows, stride);        \
  } while (0)
#define TORUS_TILE_STORE(tile, rows, stride) \
  do {                                       \
    touch_tile(rows, stride, true);          \
    _tile_stored(tile, rows, stride);        \
  } while (0)

namespace torus::TORUS_ISA {

constexpr int64_t kTile = 16;  // rows of a tile, and 32-bit units in one of its rows

// Two vectors of numbers rounded to bfloat16, as units: `even` in the low halves.
TORUS_INLINE __m512i pair_units(Vec<float> even, Vec<float> odd) {
  const __m512i halves = reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even)));
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleaved, halves);
}

// What rounding to bfloat16 leaves of a vector.
TORUS_INLINE __m512 residual_of(__m512 x, __m256bh rounded) {
  typedef uint16_t Bits __attribute__((vector_size(32)));
  typedef uint32_t Wide __attribute__((vector_size(64)));
  return x - reinterpret_cast<__m512>(__builtin_convertvector(reinterpret_cast<Bits>(rounded), Wide) << 16);
}

struct TileProducts {
  using Compute = float;
  using Element = BFloat16;
  using Unit = float;  // two bfloat16 numbers: only ever moved
  struct Left {
    const BFloat16* data;
    int64_t stride;
  };

  static constexpr int64_t kGrain = 2 * kTile;
  static constexpr int64_t kLanesOfDim = 2 * kTile;
  static constexpr int64_t kDense = 2 * kTile;
  static constexpr int64_t kBanded = 2 * kTile;
  static constexpr int64_t kPerUnit = 2;
  // The score gradients of a query sum to zero, and large keys need that of the numbers that are multiplied.
  static constexpr int kGradientParts = 2;

  // All eight tiles are whole; the configuration is the thread's for as long as a unit of work runs.
  struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  struct Session {
    Session() {
      // In static memory: GCC's intrinsic does not say that the instruction reads it.
      static constexpr Configuration whole_tiles;
      _tile_loadconfig(&whole_tiles);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  static TORUS_INLINE int64_t units_of_depth(int64_t depth) { return depth / kPerUnit; }

  // rows [n, dp], n a multiple of 16 -> [dp / 2, ld] units: 32-bit blocks turned.
  template <class Rows>
  static TORUS_INLINE void turn(const Rows& rows, int64_t n, int64_t dp, Unit* turned, int64_t ld) {
    for (int64_t i = 0; i < n; i += kTile)
      for (int64_t d = 0; d < dp; d += 2 * kTile)
        transpose_block<Unit>([&](int64_t r) { return reinterpret_cast<const Unit*>(rows.at(i + r) + d); },
                              turned + d / 2 * ld + i, ld);
  }
  // rows [n, dp], n even -> [n / 2, dp] units: pairs of rows interleaved.
  template <class Rows>
  static TORUS_INLINE TokenRows<Unit> stack(const Rows& rows, int64_t n, int64_t dp, Unit* stacked) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t r = 0; r < n; r += 2) {
      const BFloat16 *const even_row = rows.at(r), *const odd_row = rows.at(r + 1);
      Unit* const to = stacked + r / 2 * dp;
      for (int64_t d = 0; d < dp; d += 2 * kTile) {
        const __m512i even = _mm512_loadu_si512(even_row + d), odd = _mm512_loadu_si512(odd_row + d);
        _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_storeu_si512(to + d + kTile, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
    return {stacked, dp};
  }

  static TORUS_INLINE void keep_residual(float* tile, int64_t count) {
    for (int64_t i = 0; i < count; i += kTile) {
      const __m512 x = _mm512_loadu_ps(tile + i);
      _mm512_storeu_ps(tile + i, residual_of(x, _mm512_cvtneps_pbh(x)));
    }
  }

  static TORUS_INLINE Left left(const TokenRows<BFloat16>& rows) { return {rows.data, rows.stride}; }
  // tile [n, ld = 32] of float -> [n, 32].
  static TORUS_INLINE Left by_key(const float* tile, int64_t n, int64_t ld, BFloat16* probs) {
    for (int64_t r = 0; r < n; ++r)
      _mm512_storeu_si512(probs + r * ld, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
                                              _mm512_loadu_ps(tile + r * ld + kTile), _mm512_loadu_ps(tile + r * ld))));
    return {probs, ld};
  }
  // tile [n, ld = 32] of float -> [32, n].
  static TORUS_INLINE Left by_query(const float* tile, int64_t n, int64_t ld, BFloat16* probs) {
    for (int64_t r = 0; r < n; r += 2 * kTile)
      for (int64_t q = 0; q < ld; q += kTile) {
        float units[kTile * kTile];  // [pairs of keys, queries]
        for (int64_t i = 0; i < kTile; ++i) {
          const float* even = tile + (r + 2 * i) * ld + q;
          _mm512_storeu_si512(units + i * kTile, pair_units(load(even), load(even + ld)));
        }
        transpose_block<Unit>([&](int64_t i) { return units + i * kTile; }, reinterpret_cast<Unit*>(probs + q * n + r),
                              n / 2);
      }
    return {probs, n};
  }

  // c [rows, cols] (+)= sum over terms i of a_i [rows, depth] b_i [depth, cols]: rows, cols and depth are multiples of
  // 32, a_i lies i * a_term behind a, and right(i) is where b_i begins.
  template <class Right>
  static TORUS_INLINE void multiply_sum(int64_t rows, int64_t cols, int64_t depth, int64_t terms, const Left& a,
                                        int64_t a_term, Right right, int64_t ldb, float* c, int64_t ldc,
                                        bool accumulate) {
    // GCC's tile loads do not say that they read memory: what was stored before must be there.
    asm volatile("" ::: "memory");
    const int64_t a_bytes = a.stride * 2, b_bytes = ldb * 4, c_bytes = ldc * 4;
    for (int64_t i = 0; i < rows; i += 2 * kTile)
      for (int64_t j = 0; j < cols; j += 2 * kTile) {
        float* const c0 = c + i * ldc + j;
        float* const c1 = c0 + kTile * ldc;
        if (accumulate) {
          TORUS_TILE_LOAD(0, c0, c_bytes);
          TORUS_TILE_LOAD(1, c0 + kTile, c_bytes);
          TORUS_TILE_LOAD(2, c1, c_bytes);
          TORUS_TILE_LOAD(3, c1 + kTile, c_bytes);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t term = 0; term < terms; ++term) {
          const BFloat16* upper = a.data + term * a_term + i * a.stride;
          const Unit* b = right(term) + j;
          for (int64_t k = 0; k < depth; k += 2 * kTile) {
            TORUS_TILE_LOAD(4, upper, a_bytes);
            TORUS_TILE_LOAD(6, b, b_bytes);
            TORUS_TILE_LOAD(7, b + kTile, b_bytes);
            TORUS_TILE_LOAD(5, upper + kTile * a.stride, a_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            upper += 2 * kTile;
            b += kTile * ldb;
          }
        }
        TORUS_TILE_STORE(0, c0, c_bytes);
        TORUS_TILE_STORE(1, c0 + kTile, c_bytes);
        TORUS_TILE_STORE(2, c1, c_bytes);
        TORUS_TILE_STORE(3, c1 + kTile, c_bytes);
      }
  }
  static void multiply(int64_t rows, int64_t cols, int64_t depth, const Left& a, const Unit* b, int64_t ldb, float* c,
                       int64_t ldc, bool accumulate) {
    multiply_sum(rows, cols, depth, 1, a, 0, [b](int64_t) { return b; }, ldb, c, ldc, accumulate);
  }
};

}  // namespace torus::TORUS_ISA
