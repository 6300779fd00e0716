// The host's Lane: the 32 values of a warp. See csrc/cuda/lane.h, whose functions these mirror.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace torus::cuda {

constexpr int kHostLanes = 32;

template <class T>
struct Lane {
  T value[kHostLanes];

  Lane() = default;
  // The same in every lane.
  template <class U, class = std::enable_if_t<std::is_convertible_v<U, T>>>
  Lane(U same) {
    for (T& x : value) x = static_cast<T>(same);
  }

  T& operator[](int lane) { return value[lane]; }
  const T& operator[](int lane) const { return value[lane]; }

#define TORUS_LANE_OPERATOR(op)                                                       \
  friend auto operator op(const Lane& a, const Lane& b) {                             \
    Lane<decltype(std::declval<T>() op std::declval<T>())> result;                    \
    for (int i = 0; i < kHostLanes; ++i) result[i] = a[i] op b[i];                    \
    return result;                                                                    \
  }
  TORUS_LANE_OPERATOR(+)
  TORUS_LANE_OPERATOR(-)
  TORUS_LANE_OPERATOR(*)
  TORUS_LANE_OPERATOR(/)
  TORUS_LANE_OPERATOR(%)
  TORUS_LANE_OPERATOR(&)
  TORUS_LANE_OPERATOR(|)
  TORUS_LANE_OPERATOR(^)
  TORUS_LANE_OPERATOR(<<)
  TORUS_LANE_OPERATOR(>>)
  TORUS_LANE_OPERATOR(<)
  TORUS_LANE_OPERATOR(<=)
  TORUS_LANE_OPERATOR(>)
  TORUS_LANE_OPERATOR(>=)
  TORUS_LANE_OPERATOR(==)
  TORUS_LANE_OPERATOR(!=)
  TORUS_LANE_OPERATOR(&&)
  TORUS_LANE_OPERATOR(||)
#undef TORUS_LANE_OPERATOR

  friend Lane operator-(const Lane& a) { return Lane(T(0)) - a; }
  friend Lane<bool> operator!(const Lane& a) { return a == Lane(T(0)); }
  Lane& operator+=(const Lane& b) { return *this = *this + b; }
  Lane& operator-=(const Lane& b) { return *this = *this - b; }
  Lane& operator*=(const Lane& b) { return *this = *this * b; }
};

inline Lane<int> lane_index() {
  Lane<int> lanes;
  for (int i = 0; i < kHostLanes; ++i) lanes[i] = i;
  return lanes;
}

template <class T>
Lane<T> select(const Lane<bool>& condition, const Lane<T>& chosen, const std::type_identity_t<Lane<T>>& otherwise) {
  Lane<T> result;
  for (int i = 0; i < kHostLanes; ++i) result[i] = condition[i] ? chosen[i] : otherwise[i];
  return result;
}

template <class Function, class... T>
auto map(Function function, const Lane<T>&... x) {
  Lane<decltype(function(x[0]...))> result;
  for (int i = 0; i < kHostLanes; ++i) result[i] = function(x[i]...);
  return result;
}

template <class To, class T>
Lane<To> cast(const Lane<T>& x) {
  return map([](T one) { return static_cast<To>(one); }, x);
}

template <class T>
Lane<T> shuffle_xor(const Lane<T>& x, int mask) {
  Lane<T> result;
  for (int i = 0; i < kHostLanes; ++i) result[i] = x[i ^ mask];
  return result;
}

template <class T>
Lane<T> shuffle(const Lane<T>& x, const Lane<int>& source) {
  return map([&x](int lane) { return x[lane]; }, source);
}

inline bool any(const Lane<bool>& condition) {
  for (bool one : condition.value)
    if (one) return true;
  return false;
}

template <class T>
Lane<T> load(const T* base, const Lane<int64_t>& index) {
  return map([base](int64_t i) { return base[i]; }, index);
}

template <class T>
Lane<T> load(const T* base, const Lane<int64_t>& index, const Lane<bool>& where,
             const std::type_identity_t<Lane<T>>& otherwise) {
  Lane<T> result;
  for (int i = 0; i < kHostLanes; ++i) result[i] = where[i] ? base[index[i]] : otherwise[i];
  return result;
}

template <class T>
void store(T* base, const Lane<int64_t>& index, const std::type_identity_t<Lane<T>>& value, const Lane<bool>& where) {
  for (int i = 0; i < kHostLanes; ++i)
    if (where[i]) base[index[i]] = value[i];
}

inline Lane<float> exp2_of(const Lane<float>& x) {
  return map([](float one) { return std::exp2(one); }, x);
}
inline Lane<float> log2_of(const Lane<float>& x) {
  return map([](float one) { return std::log2(one); }, x);
}
inline Lane<float> reciprocal_of(const Lane<float>& x) {
  return map([](float one) { return 1.0f / one; }, x);
}
inline Lane<float> max_of_floats(const Lane<float>& a, const Lane<float>& b) {
  return map([](float x, float y) { return std::fmax(x, y); }, a, b);
}
inline Lane<float> multiply_add(const Lane<float>& x, const Lane<float>& y, const Lane<float>& z) {
  return map([](float a, float b, float c) { return std::fma(a, b, c); }, x, y, z);
}

}  // namespace torus::cuda
