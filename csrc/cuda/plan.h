// What one call of attention shares among its launches: schedules, tables, and the chunks of heads that it is worked
// off in. Streams of a head run family by family into one sum, in a fixed order, so that results repeat to the bit.
#pragma once

#include <cmath>
#include <limits>

#include "operands.h"
#include "tables.h"

namespace torus::cuda {

struct Plan {
  static constexpr int kMaxLaunches = kNumFamilies + 1;
  Schedule schedules[kMaxLaunches];
  const float* tables[kMaxLaunches];
  int count = 0;

  // Families with a stream that takes part, then the cross flows.
  Plan(const AttentionInputs& in, bool mirrored) {
    for (int f = 0; f < kNumFamilies; ++f)
      take(line_schedule(in.lattice, static_cast<Family>(f), in.seq_len, mirrored));
    take(cross_schedule(in.lattice, in.seq_len, mirrored));
  }

  // A schedule and its mirror have the same table.
  void fill_tables(const AttentionInputs& in, const Device& device) {
    for (int i = 0; i < count; ++i) {
      float* const table = allocate<float>(device, schedules[i].table_size() * schedules[i].num_streams);
      TableKernel::fill({schedules[i], in.lattice, in.seq_len, table}, device);
      tables[i] = table;
    }
  }

  template <class T>
  static T* allocate(const Device& device, int64_t count) {
    return static_cast<T*>(device.allocate(max_of(1, count) * static_cast<int64_t>(sizeof(T)), device.owner));
  }

 private:
  void take(const Schedule& schedule) {
    if (schedule.num_streams > 0) schedules[count++] = schedule;
  }
};

inline Operands operands_of(const AttentionInputs& in) {
  Operands operands{};
  operands.heads = Heads::of(in.heads, in.kv_heads);
  operands.seq_len = static_cast<int>(in.seq_len);
  operands.head_dim = static_cast<int>(in.head_dim);
  operands.scale = static_cast<float>(in.scale);
  operands.scale2 = static_cast<float>(in.scale * static_cast<double>(kLog2e));
  // Products with the score of a hidden pair must be -inf.
  if (operands.scale2 == 0.0f) operands.scale2 = std::numeric_limits<float>::min();
  operands.inverse2 = 1.0f / operands.scale2;
  operands.q = in.q, operands.k = in.k, operands.v = in.v, operands.state = in.state;
  operands.weights = in.weights, operands.decay = in.decay, operands.alpha = in.alpha;
  operands.first_key = in.first_key;
  return operands;
}

inline void check_supported(const AttentionInputs& in) {
  const bool low = in.dtype == DType::kFloat16 || in.dtype == DType::kBFloat16;
  if (!low || in.head_dim > kMaxHeadDim || in.head_dim % 8 != 0 || in.seq_len > kMaxTokens)
    throw std::runtime_error(
        "the CUDA kernels take float16 and bfloat16, head dimensions that are multiples of 8 up to " +
        std::to_string(kMaxHeadDim) + " and up to 2^30 tokens");
}

// Whether kernels by chunks take the scores: they shift exponents in units of q . k, and what a score may come to, with
// its bias, must neither overflow nor lose digits when it is divided by the scale.
inline bool shifts_products(const Operands& in) {
  return std::abs(in.scale2) > 0x1p-40f && std::abs(in.scale2) < 0x1p40f;
}

// Heads that a chunk has where each needs so many bytes of workspace: as many as half the cache holds, and a grid's
// second dimension, where each has `group` blocks of it.
inline int64_t heads_of_chunk(int64_t heads, int64_t group, int64_t bytes_per_head, const Device& device) {
  constexpr int64_t kMaxGrid = 65535;
  const int64_t cached = device.cache_bytes / 2 / max_of(1, bytes_per_head);
  return max_of(1, min_of(heads, min_of(cached, kMaxGrid / group)));
}

// Of the general kernels, which are compiled for fewer.
constexpr int general_dim(int dim) { return dim < 64 ? 64 : dim; }

// body(element, integral_constant<int, D>) for the element type and the smallest D that has room for head_dim.
template <class Body>
void dispatch(const AttentionInputs& in, Body body) {
  const auto with_dim = [&](auto element) {
    if (in.head_dim <= 32) {
      body(element, std::integral_constant<int, 32>{});
    } else if (in.head_dim <= 64) {
      body(element, std::integral_constant<int, 64>{});
    } else {
      body(element, std::integral_constant<int, 128>{});
    }
  };
  if (in.dtype == DType::kBFloat16) {
    with_dim(BFloat16{});
  } else {
    with_dim(Float16{});
  }
}

}  // namespace torus::cuda
