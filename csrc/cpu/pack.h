// Rows of tokens between memory (any supported dtype, any strides) and tiles (compute type, rows padded with zeros to
// whole vectors).
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "sanitize.h"
#include "vec.h"

namespace torus::TORUS_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#if !defined(__F16C__)
TORUS_INLINE float to_compute(Half x) {
  // Exponents are rebiased by a product, which turns subnormal halves into normal floats; Inf and NaN keep theirs.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  y *= 5.192296858534828e33f;  // 2^112
  std::memcpy(&bits, &y, sizeof(y));
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
  bits |= sign;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

// Round to nearest, ties to even.
TORUS_INLINE void from_compute(float x, Half& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u) {  // at least 2^16, or not a number
    y.bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
  } else if (magnitude < 0x38800000u) {  // below the smallest normal half: adding 1/2 aligns and rounds
    float value;
    std::memcpy(&value, &magnitude, sizeof(value));
    value += 0.5f;
    uint32_t aligned;
    std::memcpy(&aligned, &value, sizeof(value));
    y.bits = static_cast<uint16_t>(sign | (aligned - 0x3f000000u));
  } else {
    const uint32_t rebased = magnitude - 0x38000000u;
    y.bits = static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
  }
}
#endif  // !defined(__F16C__)

// Rows are converted eight numbers at a time: attention's head dimensions are multiples of eight.
constexpr int kChunk = 8;

template <class Source, class T>
TORUS_INLINE Vec<T, kChunk> load_chunk(const Source* from) {
  if constexpr (__is_same(Source, T)) {
    return load<kChunk>(from);
  } else if constexpr (__is_same(Source, BFloat16)) {
    typedef uint16_t Bits __attribute__((vector_size(16), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(32)));
    const Wide wide = __builtin_convertvector(*reinterpret_cast<const Bits*>(from), Wide) << 16;
    return reinterpret_cast<Vec<T, kChunk>>(wide);
  } else {
#if defined(__F16C__)
    return reinterpret_cast<Vec<T, kChunk>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Vec<T, kChunk> x;
    for (int i = 0; i < kChunk; ++i) x[i] = to_compute(from[i]);
    return x;
#endif
  }
}

template <class Source, class T>
TORUS_INLINE void store_chunk(Vec<T, kChunk> x, Source* to) {
  if constexpr (__is_same(Source, T)) {
    store(to, x);
  } else if constexpr (__is_same(Source, BFloat16)) {
    typedef uint16_t Bits __attribute__((vector_size(16), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(32)));
    const Wide bits = reinterpret_cast<Wide>(x);
    const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Wide quiet_nan = Wide{} + 0x7fc0u;
    *reinterpret_cast<Bits*>(to) = __builtin_convertvector(x == x ? rounded : quiet_nan, Bits);
  } else {
#if defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kChunk; ++i) from_compute(x[i], to[i]);
#endif
  }
}

template <class Source, class T>
void load_row(const void* source, T* row, int64_t head_dim) {
  const Source* from = static_cast<const Source*>(source);
  int64_t d = 0;
  for (; d + kChunk <= head_dim; d += kChunk) store(row + d, load_chunk<Source, T>(from + d));
  if (d == head_dim) return;
  Source rest[kChunk] = {};
  std::memcpy(rest, from + d, static_cast<size_t>(head_dim - d) * sizeof(Source));
  const Vec<T, kChunk> x = load_chunk<Source, T>(rest);
  std::memcpy(row + d, &x, static_cast<size_t>(head_dim - d) * sizeof(T));
}

template <class Source, class T>
void store_row(const T* row, void* target, int64_t head_dim) {
  Source* to = static_cast<Source*>(target);
  int64_t d = 0;
  for (; d + kChunk <= head_dim; d += kChunk) store_chunk<Source, T>(load<kChunk>(row + d), to + d);
  if (d == head_dim) return;
  Vec<T, kChunk> x = {};
  std::memcpy(&x, row + d, static_cast<size_t>(head_dim - d) * sizeof(T));
  Source rest[kChunk];
  store_chunk<Source, T>(x, rest);
  std::memcpy(to + d, rest, static_cast<size_t>(head_dim - d) * sizeof(Source));
}

template <class T>
void copy_numbers(const void* source, T* row, int64_t head_dim) {
  std::memcpy(row, source, static_cast<size_t>(head_dim) * sizeof(T));
}

// The rows of one (batch, head) of a tensor of tokens, in memory.
template <class T>
struct Rows {
  char* data;
  int64_t stride;  // bytes from one token to the next
  int64_t head_dim, padded_dim;
  void (*load)(const void*, T*, int64_t);
  void (*save)(const T*, void*, int64_t);

  TORUS_INLINE void read(int64_t token, T* row) const {
    load(data + token * stride, row, head_dim);
    zero_padding(row);
  }
  TORUS_INLINE void write(int64_t token, const T* row) const { save(row, data + token * stride, head_dim); }
  TORUS_INLINE void zero_padding(T* row) const {
    for (int64_t d = head_dim; d < padded_dim; ++d) row[d] = T{};
  }
};

template <class T>
constexpr DType dtype_of() {
  return __is_same(T, double) ? DType::kFloat64
         : __is_same(T, float) ? DType::kFloat32
         : __is_same(T, Half)  ? DType::kFloat16
                               : DType::kBFloat16;
}

template <class T>
TORUS_INLINE Rows<T> rows_of(const Tokens& tokens, DType dtype, int64_t batch, int64_t head, int64_t head_dim,
                             int64_t padded_dim) {
  Rows<T> rows{};
  rows.head_dim = head_dim;
  rows.padded_dim = padded_dim;
  int64_t bytes;
  if constexpr (sizeof(T) == 8) {
    bytes = 8, rows.load = load_row<double, T>, rows.save = store_row<double, T>;
  } else if constexpr (sizeof(T) == 2) {
    bytes = 2, rows.load = copy_numbers<T>;
  } else {
    switch (dtype) {
      case DType::kFloat16: bytes = 2, rows.load = load_row<Half, T>, rows.save = store_row<Half, T>; break;
      case DType::kBFloat16: bytes = 2, rows.load = load_row<BFloat16, T>, rows.save = store_row<BFloat16, T>; break;
      default: bytes = 4, rows.load = load_row<float, T>, rows.save = store_row<float, T>; break;
    }
  }
  rows.data = static_cast<char*>(tokens.data) + (batch * tokens.batch + head * tokens.head) * bytes;
  rows.stride = tokens.token * bytes;
  return rows;
}

template <class T>
TORUS_INLINE Rows<T> rows_of(const Tokens& tokens, DType dtype, int64_t batch, int64_t head, int64_t head_dim) {
  return rows_of<T>(tokens, dtype, batch, head, head_dim, round_up(head_dim, kLanes<T>));
}

// src [n, width] -> dst [width, ldd]; n and width are multiples of a vector.
template <class T>
void transpose(const T* src, int64_t n, int64_t width, int64_t lds, T* dst, int64_t ldd) {
  for (int64_t i = 0; i < n; i += kLanes<T>)
    for (int64_t d = 0; d < width; d += kLanes<T>)
      transpose_block<T>([&](int64_t r) { return src + (i + r) * lds + d; }, dst + d * ldd + i, ldd);
}

// Rows of tokens as the kernels read them: padded to whole vectors.
template <class E>
struct TokenRows {
  const E* data;
  int64_t stride;
  TORUS_INLINE const E* at(int64_t token) const { return data + token * stride; }
  TORUS_INLINE TokenRows from(int64_t token) const { return {at(token), stride}; }
};

// Rows of any tokens, the zero row behind the last of them.
template <class E>
struct ScatteredRows {
  TokenRows<E> from;
  const int64_t* tokens;
  int64_t count;
  const E* zeros;
  TORUS_INLINE const E* at(int64_t i) const { return i < count ? from.at(tokens[i]) : zeros; }
};

// Rows of a line lie far apart, where no hardware prefetcher finds them.
constexpr int64_t kPrefetchRows = 8;

template <class E>
TORUS_INLINE void prefetch_row(const E* row, int64_t padded_dim) {
  for (int64_t d = 0; d < padded_dim; d += 64 / static_cast<int64_t>(sizeof(E))) __builtin_prefetch(row + d);
}

template <class E>
TORUS_INLINE void copy_row(const E* from, E* to, int64_t padded_dim) {
  typedef char Bytes __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  for (int64_t d = 0; d < padded_dim; d += kVectorBytes / static_cast<int64_t>(sizeof(E)))
    *reinterpret_cast<Bytes*>(to + d) = *reinterpret_cast<const Bytes*>(from + d);
}

template <class T>
TORUS_INLINE void add_row(T* into, const T* row, int64_t padded_dim) {
  for (int64_t d = 0; d < padded_dim; d += kLanes<T>) store(into + d, load(into + d) + load(row + d));
}

template <class T>
TORUS_INLINE void zero(T* p, int64_t count) {
  std::memset(p, 0, static_cast<size_t>(count) * sizeof(T));
}

// A bump allocator over one thread's scratch; run from address 0 it measures how much is needed.
struct Arena {
  uintptr_t base = 0;
  int64_t used = 0;
  template <class T>
  TORUS_INLINE T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + static_cast<uintptr_t>(used));
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), room = round_up(bytes, 64) + kRedZone;
    if (base != 0) fence(p, bytes, room);
    used += room;
    return p;
  }
};

}  // namespace torus::TORUS_ISA
