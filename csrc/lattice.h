// The torus lattice and its eight streams: the one C++ statement of who sees whom, and how far away it is.
//
// A key is related to a query through a displacement alone. Line streams are stated as families of lines: after a
// change of coordinates every query attends along its own line, and the displacement is a signed number of steps.
// Cross flows are stated as a window of displacements (a, b).
#pragma once

#include <cstdint>

// Always inlined: a shared out-of-line copy could be compiled for an instruction set that the machine lacks.
#if defined(__CUDACC__)
#define TORUS_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define TORUS_INLINE inline __attribute__((always_inline))
#endif

namespace torus {

enum Topology : int64_t { kPeriodic = 0, kCausal = 1, kCylinder = 2 };

enum Stream : int {
  kMajorForward = 0,
  kMajorBackward = 1,
  kMinorForward = 2,
  kMinorBackward = 3,
  kSpiralCw = 4,
  kSpiralCcw = 5,
  kCrossUToV = 6,
  kCrossVToU = 7,
  kNumStreams = 8,
};

constexpr double kPi = 3.14159265358979323846;

TORUS_INLINE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
TORUS_INLINE constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
TORUS_INLINE constexpr int64_t abs_of(int64_t a) { return a < 0 ? -a : a; }
TORUS_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TORUS_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
TORUS_INLINE constexpr int64_t floor_mod(int64_t a, int64_t n) { return (a % n + n) % n; }

// As floor_mod, without a division, for a within one turn of [0, n).
TORUS_INLINE constexpr int64_t wrap_once(int64_t a, int64_t n) { return a < 0 ? a + n : a >= n ? a - n : a; }

struct Lattice {
  Topology topology;
  int64_t n_major, n_minor;  // M, m
  int64_t winding;           // w
  int64_t narrow, broad;     // radii of the cross flows
  int64_t streams;           // bit s is set where stream s takes part

  TORUS_INLINE constexpr bool has(int stream) const { return streams >> stream & 1; }
  TORUS_INLINE constexpr bool causal() const { return topology == kCausal; }
  TORUS_INLINE constexpr int64_t num_sites() const { return n_major * n_minor; }
};

// The lattice as it travels through an operator schema: TorusLattice.spec.
TORUS_INLINE constexpr Lattice lattice_from_spec(const int64_t* spec) {
  return {static_cast<Topology>(spec[0]), spec[1], spec[2], spec[3], spec[4], spec[5], spec[6]};
}

// Four families of lines; the loops have two streams each (their arcs), a spiral has one.
enum Family : int { kMajor = 0, kMinor = 1, kClockwise = 2, kCounterClockwise = 3, kNumFamilies = 4 };

struct LineFamily {
  Lattice lattice;
  Family family;
  int64_t seq_len;       // T
  int64_t loop;          // L, steps once around
  int64_t stride;        // causal: tokens per step
  int64_t num_lines;
  int64_t min_step;      // displacements of visible keys, in steps behind the query,
  int64_t max_step;      // lie in [min_step, max_step]
  int first_stream;
  int num_streams;
  bool closed;           // steps count modulo the loop

  // Whether any of the family's streams takes part.
  TORUS_INLINE constexpr bool present() const {
    return lattice.has(first_stream) || (num_streams == 2 && lattice.has(first_stream + 1));
  }

  TORUS_INLINE constexpr int64_t length(int64_t line) const {
    return lattice.causal() ? ceil_div(seq_len - line, stride) : loop;
  }

  // Token at position i of a line.
  TORUS_INLINE constexpr int64_t token(int64_t line, int64_t i) const {
    if (lattice.causal()) return line + i * stride;
    const int64_t m = lattice.n_minor;
    switch (family) {
      case kMajor: return i * m + line;
      case kMinor: return line * m + i;
      case kClockwise: return i * m + (line + lattice.winding * i) % m;
      default: return i * m + floor_mod(line - lattice.winding * i, m);
    }
  }

  // Whether a key `step` steps behind the query is visible to a stream of this family.
  TORUS_INLINE constexpr bool visible(int stream, int64_t step) const {
    if (step < min_step || step > max_step) return false;
    const bool forward = stream % 2 == 0;
    if (closed) {
      const int64_t k = floor_mod(step, loop);
      if (num_streams == 1) return true;
      return forward ? k <= loop / 2 : k == 0 || loop - k <= loop / 2;
    }
    if (num_streams == 1) return true;
    if (lattice.causal()) return forward ? step <= loop / 2 : step == 0 || loop - step <= loop / 2;
    return forward ? step >= 0 : step <= 0;
  }

  // Squared geodesic distance along the line.
  TORUS_INLINE constexpr double rho_squared(int64_t step) const {
    double rho;
    if (closed) {
      const int64_t k = floor_mod(step, loop);
      rho = 2 * kPi * static_cast<double>(min_of(k, loop - k)) / static_cast<double>(loop);
    } else {
      rho = kPi * static_cast<double>(abs_of(step)) / static_cast<double>(loop);
    }
    return rho * rho;
  }
};

TORUS_INLINE constexpr LineFamily line_family(const Lattice& lattice, Family family, int64_t seq_len) {
  LineFamily lines{};
  lines.lattice = lattice;
  lines.family = family;
  lines.seq_len = seq_len;
  const int64_t m = lattice.n_minor;
  lines.loop = family == kMinor ? m : lattice.n_major;
  lines.first_stream = family == kMajor       ? kMajorForward
                       : family == kMinor     ? kMinorForward
                       : family == kClockwise ? kSpiralCw
                                              : kSpiralCcw;
  lines.num_streams = family == kMajor || family == kMinor ? 2 : 1;
  if (lattice.causal()) {
    lines.stride = family == kMajor       ? m
                   : family == kMinor     ? 1
                   : family == kClockwise ? m + lattice.winding
                                          : m - lattice.winding;
    lines.num_lines = min_of(lines.stride, seq_len);
    lines.min_step = 0;
    const int64_t window = (lattice.num_sites() - 1) / lines.stride;  // lag < N
    lines.max_step = min_of(min_of(lines.loop - 1, window), (seq_len - 1) / lines.stride);
    lines.closed = false;
  } else {
    lines.stride = 0;
    lines.num_lines = family == kMinor ? lattice.n_major : m;
    lines.min_step = -(lines.loop - 1);
    lines.max_step = lines.loop - 1;
    lines.closed = lattice.topology == kPeriodic || family == kMinor;
  }
  return lines;
}

// The window of both cross flows: key (u - a, v - b) of query (u, v), with one representative (a, b) per key.
struct CrossWindow {
  Lattice lattice;
  int64_t a_lo, a_hi;
  int64_t b_lo, b_hi;

  TORUS_INLINE constexpr bool present() const { return lattice.has(kCrossUToV) || lattice.has(kCrossVToU); }

  TORUS_INLINE constexpr int64_t radius_u(int stream) const {
    return stream == kCrossUToV ? lattice.narrow : lattice.broad;
  }
  TORUS_INLINE constexpr int64_t radius_v(int stream) const {
    return stream == kCrossUToV ? lattice.broad : lattice.narrow;
  }

  TORUS_INLINE constexpr bool visible(int stream, int64_t a, int64_t b) const {
    if (a < a_lo || a > a_hi || b < b_lo || b > b_hi) return false;
    if (abs_of(a) > radius_u(stream) || abs_of(b) > radius_v(stream)) return false;
    if (!lattice.causal()) return true;
    const int64_t lag = a * lattice.n_minor + b;
    return lag >= 0 && lag < lattice.num_sites();
  }

  TORUS_INLINE constexpr double rho_squared(int stream, int64_t a, int64_t b) const {
    const double u = radius_u(stream) > 0 ? static_cast<double>(a) / static_cast<double>(radius_u(stream)) : 0.0;
    const double v = radius_v(stream) > 0 ? static_cast<double>(b) / static_cast<double>(radius_v(stream)) : 0.0;
    return u * u + v * v;
  }

  // Half-width of the window's row at displacement a: the widest of the streams that take part; -1 where none does.
  TORUS_INLINE constexpr int64_t half_width(int64_t a) const {
    int64_t widest = -1;
    for (int stream = kCrossUToV; stream <= kCrossVToU; ++stream)
      if (lattice.has(stream) && abs_of(a) <= radius_u(stream)) widest = max_of(widest, radius_v(stream));
    return widest;
  }
};

TORUS_INLINE constexpr CrossWindow cross_window(const Lattice& lattice, int64_t seq_len) {
  CrossWindow window{};
  window.lattice = lattice;
  int64_t reach_u = 0, reach_v = 0;
  for (int stream = kCrossUToV; stream <= kCrossVToU; ++stream) {
    if (!lattice.has(stream)) continue;
    reach_u = max_of(reach_u, window.radius_u(stream));
    reach_v = max_of(reach_v, window.radius_v(stream));
  }
  const int64_t M = lattice.n_major, m = lattice.n_minor;
  switch (lattice.topology) {
    case kPeriodic:
      window.a_lo = -min_of(reach_u, (M - 1) / 2);
      window.a_hi = min_of(reach_u, M / 2);
      break;
    case kCylinder:
      window.a_lo = -min_of(reach_u, M - 1);
      window.a_hi = min_of(reach_u, M - 1);
      break;
    case kCausal:
      window.a_lo = 0;
      window.a_hi = min_of(min_of(reach_u, M), ceil_div(seq_len, m));
      break;
  }
  window.b_lo = -min_of(reach_v, (m - 1) / 2);
  window.b_hi = min_of(reach_v, m / 2);
  if (lattice.causal()) {
    // No key is further away than the sequence is long.
    window.b_lo = max_of(window.b_lo, -seq_len);
    window.b_hi = min_of(window.b_hi, seq_len);
  }
  return window;
}

}  // namespace torus
