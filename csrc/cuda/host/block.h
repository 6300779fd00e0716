// An emulated block: its warps are fibers on one thread, which change over at barriers only.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace torus::cuda {

struct Index3 {
  int x, y, z;
};

class HostBlock {
 public:
  HostBlock(int warps, int shared_bytes) : shared(shared_bytes), fibers_(warps) {
    for (Fiber& fiber : fibers_) fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  }

  // Runs body(warp) for every warp to its end, as the block at `where` of the grid; shared memory is unwritten.
  void run(Index3 where, const std::function<void(int)>& body) {
    index = where;
    shared.clear();
    body_ = &body;
    for (int w = 0; w < warps(); ++w) start(w);
    while (true) {
      for (current_ = 0; current_ < warps(); ++current_)
        if (!fibers_[current_].finished) swapcontext(&scheduler_, &fibers_[current_].context);
      if (failure_ != nullptr) std::rethrow_exception(failure_);
      int finished = 0;
      for (const Fiber& fiber : fibers_) finished += fiber.finished;
      if (finished == warps()) return;
      if (finished > 0) throw std::runtime_error("a warp waits at a barrier that another has left out");
      ++epoch_;
    }
  }

  int warps() const { return static_cast<int>(fibers_.size()); }
  int64_t epoch() const { return epoch_; }

  // Of the running warp.
  void barrier() {
    swapcontext(&fibers_[current_].context, &scheduler_);
    if (failure_ != nullptr) throw Abandoned{};
  }
  void sync_warp(int warp) { ++fibers_[warp].sync; }
  Actor actor(int warp, int lane) const { return {warp, lane, epoch_, fibers_[warp].sync}; }

  // cp.async: 16 bytes from `from`, or zeros where it is null.
  void begin_copy(int warp, int lane, int offset, const void* from) {
    shared.begin_copy(offset, kCopyBytes, actor(warp, lane));
    fibers_[warp].copies.push_back({offset, lane, fibers_[warp].groups, from});
  }
  void commit_copies(int warp) { ++fibers_[warp].groups; }
  // Waits for all groups but the newest `pending`.
  void wait_copies(int warp, int pending) {
    Fiber& fiber = fibers_[warp];
    std::vector<Copy> left;
    for (const Copy& copy : fiber.copies) {
      if (copy.group < fiber.groups - pending) {
        shared.finish_copy(copy.offset, kCopyBytes, copy.from, actor(warp, copy.lane));
      } else {
        left.push_back(copy);
      }
    }
    fiber.copies = std::move(left);
  }

  Index3 index{};
  SharedMemory shared;

 private:
  static constexpr int kStackBytes = 1 << 20;
  static constexpr int kCopyBytes = 16;
  struct Abandoned {};
  struct Copy {
    int offset, lane;
    int64_t group;
    const void* from;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool finished = false;
    int64_t sync = 0;
    int64_t groups = 0;  // of copies that were committed
    std::vector<Copy> copies;
  };

  void start(int w) {
    Fiber& fiber = fibers_[w];
    fiber.finished = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&HostBlock::enter), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
  }
  static void enter(unsigned high, unsigned low) {
    HostBlock& block = *reinterpret_cast<HostBlock*>(static_cast<uintptr_t>(high) << 32 | low);
    const int warp = block.current_;
    try {
      (*block.body_)(warp);
      if (!block.fibers_[warp].copies.empty())
        throw std::runtime_error("a warp ends before its cp.async are waited for");
    } catch (const Abandoned&) {
    } catch (...) {
      if (block.failure_ == nullptr) block.failure_ = std::current_exception();
    }
    block.fibers_[warp].finished = true;
  }

  ucontext_t scheduler_;
  std::vector<Fiber> fibers_;
  const std::function<void(int)>* body_ = nullptr;
  std::exception_ptr failure_;
  int current_ = 0;
  int64_t epoch_ = 0;
};

}  // namespace torus::cuda
