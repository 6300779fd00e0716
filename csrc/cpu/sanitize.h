// What sanitizers cannot find out by themselves: where one piece of scratch ends and the next begins, and which memory
// tile instructions touch. In a build without them nothing of this is left.
#pragma once

#include "../lattice.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
extern "C" void __asan_loadN(void*, uintptr_t);
extern "C" void __asan_storeN(void*, uintptr_t);
#elif defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void*, uintptr_t);
extern "C" void __tsan_write_range(void*, uintptr_t);
#endif

namespace torus {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kRedZone = 64;  // bytes behind every piece of scratch, which nothing may touch
#else
constexpr int64_t kRedZone = 0;
#endif

// Of `room` bytes at p, the first `bytes` may be touched.
TORUS_INLINE void fence([[maybe_unused]] const void* p, [[maybe_unused]] int64_t bytes,
                        [[maybe_unused]] int64_t room) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, static_cast<size_t>(bytes));
  __asan_poison_memory_region(static_cast<const char*>(p) + bytes, static_cast<size_t>(room - bytes));
#endif
}

// A matrix tile of 16 rows of 64 bytes is about to be read from memory, or written.
TORUS_INLINE void touch_tile([[maybe_unused]] const void* rows, [[maybe_unused]] int64_t stride,
                             [[maybe_unused]] bool write) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  char* row = static_cast<char*>(const_cast<void*>(rows));
  for (int r = 0; r < 16; ++r, row += stride) {
#if defined(__SANITIZE_ADDRESS__)
    write ? __asan_storeN(row, 64) : __asan_loadN(row, 64);
#else
    write ? __tsan_write_range(row, 64) : __tsan_read_range(row, 64);
#endif
  }
#endif
}

}  // namespace torus
