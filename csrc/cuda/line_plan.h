// How the kernels of lines walk: which chunks of sixteen other rows sixteen own rows see, and in which stretches a
// block brings them into shared memory. Own rows are queries and the others keys, or the other way round where the
// schedule is mirrored.
//
// Chunks are counted along the line from the block's first one, below zero what lies before it; on a closed line they
// go on around the loop. What a chunk shows of a stream depends only on how far it is from the own one: that is the
// lattice's translation invariance, and one table of biases serves all warps of all blocks.
#pragma once

#include "schedule.h"

namespace torus::cuda {

constexpr int kLineChunk = kOwnRows;  // other rows, and own rows of a warp
constexpr int kStretchChunks = 8;     // at most, of a line that is not resident
static_assert(kStretchChunks >= kMaxWarps, "the own chunks of a block are in one stretch");
constexpr int kMaxTablePairs = 2048;  // of a stream
constexpr int kResidentBytes = 80 << 10;  // of a whole line: two blocks a multiprocessor from sm_80 on

// Chunks first ... last; none where last < first.
struct Chunks {
  int first, last;

  TORUS_INLINE constexpr bool has(int chunk) const { return chunk >= first && chunk <= last; }
  TORUS_INLINE constexpr Chunks within(const Chunks& other) const {
    return {first > other.first ? first : other.first, last < other.last ? last : other.last};
  }
  TORUS_INLINE constexpr Chunks shifted(int by) const { return {first + by, last + by}; }
  TORUS_INLINE constexpr bool empty() const { return last < first; }
};

// What sixteen own rows see of a stream: chunks counted from their own one, and the steps from a key to its query that
// are visible where a chunk holds others too.
struct Reach {
  Chunks near;  // around the own one
  Chunks far;   // apart from those: before them where the own rows are queries, after where they are keys
  Chunks all;   // from the first to the last
  int min_step, max_step;
  int sign;     // a displacement, own row less other row, is so many steps: 1 for queries, -1 for keys

  static constexpr int kParts = 4;

  // Chunks that the warp `own` sees, in the order in which the forward goes through them: its own one first, which
  // every stream sees something of.
  TORUS_INLINE constexpr Chunks part(int which, int own) const {
    switch (which) {
      case 0: return {own, own};
      case 1: return {own + near.first, own - 1};
      case 2: return {own + 1, own + near.last};
      default: return far.shifted(own);
    }
  }
  // The tables of numbers have the displacements from min_displacement() on.
  TORUS_INLINE constexpr int min_displacement() const { return -kLineChunk * (all.last + 1); }
  TORUS_INLINE constexpr int table_size() const { return kLineChunk * (all.last - all.first + 2); }
};

struct LinePlan {
  bool fits;      // whether the kernel takes the family
  bool resident;  // a stretch is a whole closed line
  bool closed;
  int chunks;     // of a stretch
  int table_size;
  Reach reach[kMaxStreams];  // of the schedule's streams

  TORUS_INLINE constexpr int rows() const { return chunks * kLineChunk; }
};

// Stretches of a block in order: window z has chunks z * size ... (z + 1) * size - 1, and the own ones are in window 0.
// It keeps no more than z: registers are short.
struct StretchWalk {
  const LinePlan& plan;
  const Reach& reach;
  const Schedule& schedule;
  const OwnPlace& own;
  int z;

  TORUS_INLINE constexpr StretchWalk(const LinePlan& plan, const Schedule& schedule, const OwnPlace& own, int stream)
      : plan(plan), reach(plan.reach[stream]), schedule(schedule), own(own), z(0) {}

  // Chunks of the line that exist; on a closed one they all do.
  TORUS_INLINE constexpr Chunks there() const {
    constexpr int kEndless = 1 << 30;
    if (plan.closed) return {-kEndless, kEndless};
    const int first = own.position / kLineChunk;
    return {-first, (schedule.line_length(own.line) - 1) / kLineChunk - first};
  }
  // What the block has of the current window.
  TORUS_INLINE constexpr Chunks window() const {
    return plan.resident ? there() : Chunks{z * plan.chunks, (z + 1) * plan.chunks - 1}.within(there());
  }
  // Whether any of its warps sees a chunk.
  TORUS_INLINE constexpr bool needs(int chunk) const {
    return plan.resident || Chunks{reach.near.first, reach.near.last + schedule.warps - 1}.has(chunk) ||
           (!reach.far.empty() && Chunks{reach.far.first, reach.far.last + schedule.warps - 1}.has(chunk));
  }
  // The next window; false where there is none.
  TORUS_INLINE constexpr bool next() {
    if (plan.resident) return false;
    const Chunks all = Chunks{reach.all.first, reach.all.last + schedule.warps - 1}.within(there());
    const int lowest = all.first < 0 ? -((-all.first + plan.chunks - 1) / plan.chunks) : 0;
    z = z > 0 ? z + 1 : z > lowest ? z - 1 : 1;
    return z * plan.chunks <= all.last;
  }
};

TORUS_INLINE constexpr int floor_of_chunk(int64_t position) {
  return static_cast<int>((position - floor_mod(position, kLineChunk)) / kLineChunk);
}

TORUS_INLINE constexpr Reach reach_of(const LineFamily& lines, int stream, bool mirrored) {
  const int64_t half = lines.loop / 2;
  const bool forward = stream % 2 == 0;
  // Visible are the steps lo ... hi and, in time, the far ones up to max_step.
  int64_t lo = 0, hi = lines.max_step, far = lines.max_step + 1;
  if (lines.num_streams == 1) {
    if (!lines.closed) lo = lines.min_step;
  } else if (lines.closed) {
    lo = forward ? 0 : -half, hi = forward ? half : 0;
  } else if (lines.lattice.causal()) {
    hi = forward ? min_of(half, hi) : 0;
    if (!forward) far = max_of(1, lines.loop - half);
  } else {
    lo = forward ? 0 : lines.min_step, hi = forward ? hi : 0;
  }
  const auto chunks_of = [&](int64_t first, int64_t last) {
    if (mirrored) return Chunks{floor_of_chunk(first), floor_of_chunk(kLineChunk - 1 + last)};
    return Chunks{floor_of_chunk(-last), floor_of_chunk(kLineChunk - 1 - first)};
  };
  Reach reach{};
  reach.sign = mirrored ? -1 : 1;
  reach.near = chunks_of(lo, hi);
  reach.far = {0, -1};
  if (far <= lines.max_step) {
    reach.far = chunks_of(far, lines.max_step);
    if (mirrored) {
      reach.far.first = static_cast<int>(max_of(reach.far.first, reach.near.last + 1));
    } else {
      reach.far.last = static_cast<int>(min_of(reach.far.last, reach.near.first - 1));
    }
  }
  reach.min_step = static_cast<int>(lo);
  reach.max_step = static_cast<int>(far <= lines.max_step ? lines.max_step : hi);
  if (lines.closed && lines.num_streams == 1 && lines.loop % kLineChunk == 0) {
    // Once around in whole chunks shows every other row once, with nothing to hide.
    const int chunks = static_cast<int>(lines.loop / kLineChunk);
    reach.near = mirrored ? Chunks{0, chunks - 1} : Chunks{1 - chunks, 0};
    reach.min_step = 1 - kLineChunk;
  }
  reach.all = reach.near;
  if (!reach.far.empty() && mirrored) reach.all.last = reach.far.last;
  if (!reach.far.empty() && !mirrored) reach.all.first = reach.far.first;
  return reach;
}

// For a family whose chunks take so many bytes of shared memory.
TORUS_INLINE constexpr LinePlan line_plan(const Lattice& lattice, const Schedule& s, int64_t seq_len, int chunk_bytes) {
  const LineFamily lines = line_family(lattice, s.family, seq_len);
  LinePlan plan{};
  plan.closed = lines.closed;
  const bool whole = lines.loop % kLineChunk == 0;
  plan.resident = lines.closed && whole && lines.loop / kLineChunk * chunk_bytes <= kResidentBytes;
  // Keys beyond an open line's end are not hidden from queries that see both ways; queries there weigh nothing.
  plan.fits = lines.closed || lattice.causal() || whole || s.mirrored;
  int64_t chunks = s.warps;  // on either side of the own ones
  for (int k = 0; k < s.num_streams; ++k) {
    const Reach& reach = plan.reach[k] = reach_of(lines, s.stream[k], s.mirrored);
    plan.table_size = static_cast<int>(max_of(plan.table_size, reach.table_size()));
    chunks = max_of(chunks, max_of(-reach.all.first, reach.all.last));
  }
  plan.chunks = static_cast<int>(plan.resident ? lines.loop / kLineChunk : min_of(chunks, kStretchChunks));
  plan.fits = plan.fits && plan.table_size <= kMaxTablePairs;
  return plan;
}

}  // namespace torus::cuda
