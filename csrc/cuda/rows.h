// A warp over rows of tokens, for kernels without matrix products: every lane has eight neighbouring elements of a row,
// so that it reads and writes 16 bytes at once, and a warp as many rows side by side as there is room for.
#pragma once

#include "element.h"
#include "launch.h"

namespace torus::cuda {

constexpr int kElements = 8;  // of a row, in one lane

// Elements of a lane, in float32.
struct Elements {
  Lane<float> value[kElements];

  TORUS_DEVICE Lane<float>& operator[](int i) { return value[i]; }
  TORUS_DEVICE const Lane<float>& operator[](int i) const { return value[i]; }
};

// Lanes of a row are neighbours and a power of two; some may lie beyond its end.
struct RowLanes {
  int head_dim, shift;

  static constexpr RowLanes of(int64_t head_dim) {
    int shift = 0;
    while ((kElements << shift) < head_dim) ++shift;
    return {static_cast<int>(head_dim), shift};
  }

  TORUS_INLINE constexpr int lanes() const { return 1 << shift; }
  TORUS_INLINE constexpr int rows() const { return kWarpLanes >> shift; }
  TORUS_DEVICE Lane<int> row() const { return lane_index() >> Lane<int>(shift); }
  TORUS_DEVICE Lane<int> column() const { return (lane_index() & Lane<int>(lanes() - 1)) * kElements; }
  TORUS_DEVICE Lane<bool> in_row() const { return column() < Lane<int>(head_dim); }

  // Sum over a row, the same in all of its lanes.
  TORUS_DEVICE Lane<float> sum(Lane<float> x) const {
    for (int mask = lanes() / 2; mask > 0; mask /= 2) x = x + shuffle_xor(x, mask);
    return x;
  }
};

// Sixteen bytes of a row: four numbers, or eight elements in pairs.
template <class T>
struct alignas(16) Four {
  T value[4];
};

// The eight elements from `element` on, E being a 16-bit type or float; zeros where not `where`.
template <class E>
TORUS_DEVICE Elements load_elements(const E* base, const Lane<int64_t>& element, const Lane<bool>& where) {
  Elements x;
  if constexpr (std::is_same_v<E, float>) {
    const auto* const from = reinterpret_cast<const Four<float>*>(base);
TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Lane<Four<float>> four = load(from, element / int64_t{4} + int64_t{1} * half, where, Four<float>{});
TORUS_UNROLL
      for (int i = 0; i < 4; ++i) x[4 * half + i] = map([i](const Four<float>& of) { return of.value[i]; }, four);
    }
  } else {
    const auto* const from = reinterpret_cast<const Four<uint32_t>*>(base);
    const Lane<Four<uint32_t>> four = load(from, element / int64_t{8}, where, Four<uint32_t>{});
TORUS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Lane<uint32_t> pair = map([i](const Four<uint32_t>& of) { return of.value[i]; }, four);
      x[2 * i] = map([](uint32_t two) { return low_of<E>(two); }, pair);
      x[2 * i + 1] = map([](uint32_t two) { return high_of<E>(two); }, pair);
    }
  }
  return x;
}

template <class E>
TORUS_DEVICE void store_elements(E* base, const Lane<int64_t>& element, const Elements& x, const Lane<bool>& where) {
  if constexpr (std::is_same_v<E, float>) {
    auto* const to = reinterpret_cast<Four<float>*>(base);
TORUS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = 4 * half;
      const auto four = map([](float a, float b, float c, float d) { return Four<float>{{a, b, c, d}}; }, x[i], x[i + 1],
                            x[i + 2], x[i + 3]);
      store(to, element / int64_t{4} + int64_t{1} * half, four, where);
    }
  } else {
    const auto pair = [&](int i) {
      return map([](float low, float high) { return pack_pair<E>(low, high); }, x[2 * i], x[2 * i + 1]);
    };
    const auto four = map([](uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return Four<uint32_t>{{a, b, c, d}}; },
                          pair(0), pair(1), pair(2), pair(3));
    store(reinterpret_cast<Four<uint32_t>*>(base), element / int64_t{8}, four, where);
  }
}

}  // namespace torus::cuda
