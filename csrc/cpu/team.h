// Who runs the units of work: all threads together on the heads at hand, or every thread alone on heads of its own.
#pragma once

#include <atomic>

#include "pack.h"

namespace torus::TORUS_ISA {

// One thread, one scratch.
struct Solo {
  uintptr_t scratch;
  template <class F>
  TORUS_INLINE void run(int64_t count, F&& unit) const {
    for (int64_t i = 0; i < count; ++i) unit(i, Arena{scratch});
  }
};

// All threads; a share of the units takes the next free scratch.
struct Team {
  const Runtime& runtime;
  uintptr_t scratch;
  int64_t scratch_bytes;

  template <class F>
  void run(int64_t count, F&& unit) const {
    struct Context {
      F& unit;
      const Team& team;
      std::atomic<int64_t> shares{0};
    } context{unit, *this};
    runtime.parallel_for(
        0, count, 1,
        [](void* opaque, int64_t first, int64_t last) {
          Context& shared = *static_cast<Context*>(opaque);
          const int64_t share = shared.shares.fetch_add(1);
          const uintptr_t mine = shared.team.scratch + static_cast<uintptr_t>(share * shared.team.scratch_bytes);
          for (int64_t i = first; i < last; ++i) shared.unit(i, Arena{mine});
        },
        &context);
  }
};

// Calls heads(first, last, group, team) for all `count` heads. Alone, a thread keeps one head's data in its cache from
// the first stream to the last and meets no barrier; together, threads share too few heads among them.
template <class F>
void for_heads(const Runtime& runtime, int64_t count, uintptr_t scratch, int64_t scratch_bytes, F&& heads) {
  const int64_t threads = runtime.num_threads;
  if (count >= 4 * threads || count % threads == 0) {
    Team{runtime, scratch, scratch_bytes}.run(
        count, [&](int64_t i, Arena arena) {
          const int64_t slot = static_cast<int64_t>(arena.base - scratch) / max_of(1, scratch_bytes);
          heads(i, i + 1, slot, Solo{arena.base});
        });
  } else {
    for (int64_t first = 0; first < count; first += threads)
      heads(first, min_of(count, first + threads), int64_t{0}, Team{runtime, scratch, scratch_bytes});
  }
}

}  // namespace torus::TORUS_ISA
