// Division of 32-bit numbers by one that is known before the launch: a product and a shift, where a GPU's own division
// takes some twenty instructions.
#pragma once

#include <cstdint>

#include "../lattice.h"

namespace torus::cuda {

// For numbers in [0, 2^31): x / d = x * ceil(2^(31 + l) / d) >> (31 + l), l = ceil(log2 d) (Granlund and Montgomery,
// "Division by invariant integers using multiplication", 1994, theorem 4.2).
struct Divisor {
  int value;
  uint32_t factor;
  int shift;

  static TORUS_INLINE constexpr Divisor of(int64_t value) {
    int log = 0;
    while ((int64_t{1} << log) < value) ++log;
    const auto size = static_cast<uint64_t>(value);
    const uint64_t factor = ((uint64_t{1} << (31 + log)) + size - 1) / size;
    return {static_cast<int>(value), static_cast<uint32_t>(factor), 31 + log};
  }

  TORUS_INLINE constexpr int quotient(int x) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * factor >> shift);
  }
  TORUS_INLINE constexpr int remainder(int x) const { return x - quotient(x) * value; }
  // Of any number, in [0, value).
  TORUS_INLINE constexpr int modulo(int x) const { return x < 0 ? value - 1 - remainder(-1 - x) : remainder(x); }
};

}  // namespace torus::cuda
