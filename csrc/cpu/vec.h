// Vectors of the instruction set that this translation unit is compiled for, and the mathematics on them.
//
// GCC's vector extensions carry the arithmetic, so the same source serves AVX-512, AVX2, plain SSE2 and ARM. A NaN
// goes through every function here: comparisons are written so that it fails them and is kept.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../lattice.h"

namespace torus::TORUS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <class T, int LANES>
struct VectorOf {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
  // The same vector at any address.
  // Not even aligned as T: rows of 16-bit numbers are moved in pairs, as 32-bit numbers, from wherever they begin.
  typedef T unaligned __attribute__((vector_size(LANES * sizeof(T)), aligned(1), may_alias));
};

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Tiles are multiples of half a vector wide, so that a window of 8 columns costs 8.
template <class T>
constexpr int kHalfLanes = kLanes<T> / 2;

template <class T, int LANES = kLanes<T>>
using Vec = typename VectorOf<T, LANES>::type;

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <int LANES, class T>
TORUS_INLINE Vec<T, LANES> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T, LANES>::unaligned*>(p);
}
template <class T>
TORUS_INLINE Vec<T> load(const T* p) {
  return load<kLanes<T>>(p);
}
template <class V, class T>
TORUS_INLINE void store(T* p, V x) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  *reinterpret_cast<typename VectorOf<T, lanes>::unaligned*>(p) = x;
}
// x - 0 is x for every x, -0 and NaN included, so this is a bare broadcast.
template <class V, class T>
TORUS_INLINE V splat(T x) {
  return x - V{};
}

// The larger of two; NaN in `x` is kept.
template <class V>
TORUS_INLINE V max_keep(V floor, V x) {
  return floor > x ? floor : x;
}

// The low or the high half of a vector. By shuffle: taking a vector's address would keep it in memory.
template <class T, int LANES, bool HIGH, int... I>
TORUS_INLINE Vec<T, LANES / 2> half_of(Vec<T, LANES> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I + (HIGH ? LANES / 2 : 0))...);
}

template <class T, int LANES = kLanes<T>>
TORUS_INLINE T sum(Vec<T, LANES> x) {
  if constexpr (LANES == 2) {
    return x[0] + x[1];
  } else {
    constexpr std::make_integer_sequence<int, LANES / 2> half;
    return sum<T, LANES / 2>(half_of<T, LANES, false>(x, half) + half_of<T, LANES, true>(x, half));
  }
}
template <class T, int LANES = kLanes<T>>
TORUS_INLINE T max_of_lanes(Vec<T, LANES> x) {
  if constexpr (LANES == 2) {
    return x[0] > x[1] ? x[0] : x[1];
  } else {
    constexpr std::make_integer_sequence<int, LANES / 2> half;
    return max_of_lanes<T, LANES / 2>(max_keep(half_of<T, LANES, false>(x, half), half_of<T, LANES, true>(x, half)));
  }
}

template <class T>
struct Exp2;

// 2^f on [-1/2, 1/2] to 1 ulp of float (coefficients of Cephes' exp2f).
template <>
struct Exp2<float> {
  static constexpr int bits = 23, bias = 127;
  static constexpr float smallest = -126.0f, magic = 12582912.0f;  // 1.5 * 2^23 rounds to an integer when added
  static constexpr float coefficients[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                                           5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f};
};

// Taylor's coefficients ln(2)^n / n!, n = 13 ... 0: the remainder is below 1e-17 on [-1/2, 1/2].
template <>
struct Exp2<double> {
  static constexpr int bits = 52, bias = 1023;
  static constexpr double smallest = -1022.0, magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double coefficients[] = {
      1.3691488853904128e-12, 2.5678435993488206e-11, 4.4455382718708115e-10, 7.0549116208011233e-9,
      1.0178086009239699e-7,  1.3215486790144309e-6,  1.5252733804059841e-5,  1.5403530393381609e-4,
      1.3333558146428443e-3,  9.6181291076284772e-3,  5.5504108664821580e-2,  2.4022650695910072e-1,
      6.9314718055994531e-1,  1.0};
};

// 2^x for x <= 0 (scores less their maximum). Exactly zero below the smallest normal number and for -inf.
template <class T, int LANES = kLanes<T>>
TORUS_INLINE Vec<T, LANES> exp2(Vec<T, LANES> x) {
  using C = Exp2<T>;
  using Int = typename IntOf<T>::type;
  using VecInt = typename VectorOf<Int, LANES>::type;
  const Vec<T, LANES> zero = {};
  const VecInt underflow = x < C::smallest;
  const Vec<T, LANES> shifted = x + C::magic;
  const Vec<T, LANES> f = x - (shifted - C::magic);
  Vec<T, LANES> p = zero + C::coefficients[0];
#pragma GCC unroll 16
  for (unsigned i = 1; i < sizeof(C::coefficients) / sizeof(T); ++i) p = p * f + C::coefficients[i];
  // The low bits of `shifted` hold round(x) in two's complement.
  const VecInt exponent = (reinterpret_cast<VecInt>(shifted) + C::bias) << C::bits;
  return underflow ? zero : p * reinterpret_cast<Vec<T, LANES>>(exponent);
}

// log2(x) of positive x, to an ulp or two of float (coefficients of Cephes' logf); lane by lane in double. Infinity and
// NaN stay what they are.
TORUS_INLINE Vec<double> log2_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log2(x[i]);
  return x;
}
TORUS_INLINE Vec<float> log2_of(Vec<float> x) {
  using V = Vec<float>;
  using Bits = typename VectorOf<int32_t, kLanes<float>>::type;
  constexpr int32_t sqrt_half = 0x3f3504f3;
  constexpr float coefficients[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                    -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                    2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)).
  const Bits bits = reinterpret_cast<Bits>(x) - sqrt_half;
  const V exponent = __builtin_convertvector(bits >> 23, V);
  const V f = reinterpret_cast<V>((bits & 0x7fffff) + sqrt_half) - 1.0f;
  V p = V{} + coefficients[0];
#pragma GCC unroll 8
  for (int i = 1; i < 9; ++i) p = p * f + coefficients[i];
  // ln(m) = f - f^2/2 + f^3 p; what log2(e) has beyond 1 is added apart, to keep the digits of f.
  constexpr float log2e_less_1 = 0.44269504088896340736f;
  const V rest = f * f * (f * p - 0.5f);
  const V log2_m = f * log2e_less_1 + (rest * log2e_less_1 + rest) + f;
  return x < __builtin_inff() ? log2_m + exponent : x;
}

// Two vectors interleaved: the low halves, or the high halves.
template <class V, int LANES, bool HIGH, int... I>
TORUS_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int from = HIGH ? LANES / 2 : 0;
  return __builtin_shufflevector(a, b, (from + I / 2 + (I % 2 ? LANES : 0))...);
}

// A LANES x LANES block turned: row(i) of the source becomes column i of dst (stride dst_row).
template <class T, class Row>
TORUS_INLINE void transpose_block(Row row, T* dst, int64_t dst_row) {
  constexpr int n = kLanes<T>;
  using V = Vec<T>;
  using Sequence = std::make_integer_sequence<int, n>;
  V rows[n], next[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) rows[i] = load(row(i));
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<V, n, false>(rows[i], rows[i + n / 2], Sequence{});
      next[2 * i + 1] = interleave<V, n, true>(rows[i], rows[i + n / 2], Sequence{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store(dst + i * dst_row, rows[i]);
}

}  // namespace torus::TORUS_ISA
