// The two element types, as pairs in 32-bit registers: the lower half is the element with the lower index.
#pragma once

#include <cstdint>
#include <cstring>

#include "lane.h"

namespace torus::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if defined(__CUDACC__)

template <class E>
TORUS_DEVICE uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<E, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <class E>
TORUS_DEVICE float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
}

#else

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounded to nearest, ties to even; NaN stays NaN.
template <class E>
uint16_t from_float(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
  if constexpr (std::is_same_v<E, BFloat16>) {
    if (magnitude > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16 or more
    if (magnitude < 0x38800000) {
      // Subnormal: adding 0.5 leaves multiples of 2^-24 in the last places, rounded by the addition.
      return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
}

template <class E>
float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    return float_of(static_cast<uint32_t>(bits) << 16);
  } else {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) {
      const float x = static_cast<float>(magnitude) * 0x1p-24f;
      return sign != 0 ? -x : x;
    }
    return float_of(sign | ((magnitude << 13) + 0x38000000));
  }
}

template <class E>
uint32_t pack_pair(float low, float high) {
  return static_cast<uint32_t>(from_float<E>(high)) << 16 | from_float<E>(low);
}

#endif

template <class E>
TORUS_DEVICE float low_of(uint32_t pair) {
  return to_float<E>(static_cast<uint16_t>(pair));
}
template <class E>
TORUS_DEVICE float high_of(uint32_t pair) {
  return to_float<E>(static_cast<uint16_t>(pair >> 16));
}

}  // namespace torus::cuda
