// The shared memory of an emulated block, which knows of every word who wrote and who read it last. A lane may use
// what another lane did only when a barrier (of the block, or of the warp between lanes of one warp) lies in
// between. What it may not use is a std::runtime_error, as is memory that is out of bounds, was never written or is
// being copied to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace torus::cuda {

// Who touches memory, and when: barriers of the block and of the warp so far.
struct Actor {
  static constexpr int kMany = -1;
  int warp, lane;
  int64_t epoch;  // barriers of the block
  int64_t sync;   // barriers of the warp

  // Whether what `earlier` did is ordered before what this one does.
  bool comes_after(const Actor& earlier) const {
    if (earlier.epoch < epoch) return true;
    if (earlier.warp != warp) return false;
    return earlier.sync < sync || (earlier.lane == lane && lane != kMany);
  }
};

class SharedMemory {
 public:
  static constexpr int kWordBytes = 4;

  explicit SharedMemory(int bytes) : bytes_(bytes), words_((bytes + kWordBytes - 1) / kWordBytes) {}

  // As a block finds it.
  void clear() { std::fill(words_.begin(), words_.end(), Word{}); }

  void read(int offset, int size, void* to, const Actor& reader) {
    check_bounds(offset, size, "read");
    for (int word = offset / kWordBytes; word <= (offset + size - 1) / kWordBytes; ++word) {
      Word& w = words_[word];
      if (w.copying) fail("read before its cp.async was waited for", word, reader);
      if (!w.written) fail("read and never written", word, reader);
      if (!reader.comes_after(w.write)) fail("read, and no barrier since the write", word, reader);
      note_read(w, reader);
    }
    std::memcpy(to, bytes_.data() + offset, size);
  }

  void write(int offset, int size, const void* from, const Actor& writer) {
    for_each_written(offset, size, writer, [&](Word& w) { w.write = writer, w.written = true; });
    std::memcpy(bytes_.data() + offset, from, size);
  }

  // A copy that has begun: nobody may touch the words until `finish_copy`.
  void begin_copy(int offset, int size, const Actor& writer) {
    for_each_written(offset, size, writer, [](Word& w) { w.copying = true; });
  }
  // The copy's data, or zeros where `from` is null, are visible to the lane that started it.
  void finish_copy(int offset, int size, const void* from, const Actor& writer) {
    for (int word = offset / kWordBytes; word <= (offset + size - 1) / kWordBytes; ++word)
      words_[word].copying = false, words_[word].written = true, words_[word].write = writer;
    if (from != nullptr) {
      std::memcpy(bytes_.data() + offset, from, size);
    } else {
      std::memset(bytes_.data() + offset, 0, size);
    }
  }

 private:
  struct Word {
    bool written = false, was_read = false, copying = false;
    Actor write{}, read{};
  };

  static void note_read(Word& w, const Actor& reader) {
    if (w.was_read && w.read.epoch == reader.epoch) {
      if (w.read.warp != reader.warp) {
        w.read.warp = Actor::kMany;
      } else if (w.read.sync != reader.sync) {
        w.read = reader;
      } else if (w.read.lane != reader.lane) {
        w.read.lane = Actor::kMany;
      }
    } else {
      w.read = reader;
    }
    w.was_read = true;
  }

  template <class Action>
  void for_each_written(int offset, int size, const Actor& writer, Action action) {
    check_bounds(offset, size, "write");
    for (int word = offset / kWordBytes; word <= (offset + size - 1) / kWordBytes; ++word) {
      Word& w = words_[word];
      if (w.copying) fail("written while a cp.async to it is under way", word, writer);
      if (w.written && !writer.comes_after(w.write)) fail("written twice without a barrier", word, writer);
      if (w.was_read && !writer.comes_after(w.read)) fail("written, and no barrier since it was read", word, writer);
      action(w);
    }
  }

  void check_bounds(int offset, int size, const char* what) const {
    if (offset >= 0 && offset + size <= static_cast<int>(bytes_.size()) && offset % size == 0) return;
    throw std::runtime_error("shared memory: " + std::string(what) + " of " + std::to_string(size) + " bytes at " +
                             std::to_string(offset) + ", which must be aligned and within " +
                             std::to_string(bytes_.size()));
  }
  [[noreturn]] static void fail(const char* what, int word, const Actor& actor) {
    throw std::runtime_error("shared memory: the word at byte " + std::to_string(word * kWordBytes) + " is " + what +
                             " (warp " + std::to_string(actor.warp) + ", lane " + std::to_string(actor.lane) + ")");
  }

  std::vector<unsigned char> bytes_;
  std::vector<Word> words_;
};

}  // namespace torus::cuda
