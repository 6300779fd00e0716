// Rotary positions on the lattice.
#pragma once

#include "team.h"

namespace torus::TORUS_ISA {

// One loop: `period` positions make a full turn, and harmonics 1 ... harmonics repeat.
struct RopeAxis {
  int64_t period, harmonics;
};

// cos and sin of 2 pi h position / period for the pairs' harmonics h.
template <class T>
TORUS_INLINE void fill_turns(const RopeAxis& axis, int64_t position, bool inverse, int64_t pairs, T* cos, T* sin) {
  const auto angle = [&](int64_t h) {
    const double turned = 2 * kPi * static_cast<double>(position * h % axis.period) / static_cast<double>(axis.period);
    return inverse ? -turned : turned;
  };
  const double c = __builtin_cos(angle(1)), s = __builtin_sin(angle(1));
  double x = c, y = s;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t h = 1 + i % axis.harmonics;
    if constexpr (sizeof(T) == sizeof(double)) {
      x = __builtin_cos(angle(h)), y = __builtin_sin(angle(h));
    } else if (h == 1) {
      x = c, y = s;
    } else {
      // Each harmonic is the one before turned once more: in double, far below a rounding of float.
      const double next = x * c - y * s;
      y = x * s + y * c;
      x = next;
    }
    cos[i] = static_cast<T>(x);
    sin[i] = static_cast<T>(y);
  }
}

template <class T>
struct RopeScratch {
  T *row, *cos, *sin;  // [D], and [D / 2] twice: both halves of a row have D / 4 pairs
  RopeScratch(int64_t head_dim, Arena& arena) {
    row = arena.take<T>(head_dim);
    for (T** turns : {&cos, &sin}) *turns = arena.take<T>(head_dim / 2);
  }
};

template <class T>
void rope(const Rope& p, const Runtime& runtime) {
  const Lattice& lattice = p.lattice;
  const int64_t pairs = p.head_dim / 4, m = lattice.n_minor;
  const bool causal = lattice.causal();
  // On the cylinder the open axis takes half a turn from end to end.
  const RopeAxis major = {causal                           ? lattice.num_sites()
                          : lattice.topology == kCylinder ? 2 * lattice.n_major
                                                          : lattice.n_major,
                          max_of(1, lattice.n_major / 2)};
  const RopeAxis minor = {m, max_of(1, m / 2)};
  Arena measured;
  RopeScratch<T>(p.head_dim, measured);
  const int64_t bytes = measured.used;
  const uintptr_t scratch =
      reinterpret_cast<uintptr_t>(runtime.allocate(runtime.num_threads * bytes, runtime.owner));
  // All heads of a token turn alike, so the angles are found once.
  Team{runtime, scratch, bytes}.run(p.seq_len, [&](int64_t t, Arena arena) {
    const RopeScratch<T> w(p.head_dim, arena);
    T *const row = w.row, *const cos = w.cos, *const sin = w.sin;
    const int64_t at = p.offset % (causal ? lattice.num_sites() : 1) + t;
    fill_turns(major, causal ? at % lattice.num_sites() : t / m, p.inverse, pairs, cos, sin);
    fill_turns(minor, causal ? at % m : t % m, p.inverse, pairs, cos + pairs, sin + pairs);
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t h = 0; h < p.heads; ++h) {
        const Rows<T> x = rows_of<T>(p.x, p.dtype, b, h, p.head_dim);
        const Rows<T> out = rows_of<T>(p.out, p.dtype, b, h, p.head_dim);
        x.load(x.data + t * x.stride, row, p.head_dim);
        for (int64_t half = 0; half < 2; ++half) {
          T *first = row + 2 * half * pairs, *second = first + pairs;
          const T *c = cos + half * pairs, *s = sin + half * pairs;
          for (int64_t i = 0; i < pairs; ++i) {
            const T x1 = first[i], x2 = second[i];
            first[i] = x1 * c[i] - x2 * s[i];
            second[i] = x1 * s[i] + x2 * c[i];
          }
        }
        out.write(t, row);
      }
  });
}

}  // namespace torus::TORUS_ISA
