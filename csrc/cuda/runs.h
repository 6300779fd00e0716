// Tokens of all heads, dealt out to warps: a run of consecutive ones to each.
#pragma once

#include "rows.h"

namespace torus::cuda {

struct Runs {
  RowLanes lanes;
  int64_t batch, heads, seq_len;
  int64_t length, parts;  // tokens of a run; runs of a head

  static constexpr int kWarps = 4;       // of a block
  static constexpr int kMinSteps = 4;    // in which a warp goes through its run
  static constexpr int kMaxParts = 512;  // so that sums over a head's runs stay short

  static constexpr Runs of(int64_t batch, int64_t heads, int64_t seq_len, int64_t head_dim) {
    const RowLanes lanes = RowLanes::of(head_dim);
    const int64_t steps = max_of(kMinSteps, ceil_div(seq_len, int64_t{1} * lanes.rows() * kMaxParts));
    const int64_t length = steps * lanes.rows();
    return {lanes, batch, heads, seq_len, length, ceil_div(seq_len, length)};
  }

  TORUS_INLINE constexpr int64_t count() const { return batch * heads * parts; }
  Grid grid() const { return {ceil_div(count(), kWarps)}; }
};

// The run of a warp.
struct Run {
  int64_t index;  // of all; runs of a head are neighbours
  int64_t batch, head, first, end;
  bool exists;

  TORUS_DEVICE Run(const Runs& runs, const Warp& warp) {
    index = int64_t{1} * warp.block_x() * warp.count() + warp.index();
    exists = index < runs.count();
    batch = index / runs.parts / runs.heads, head = index / runs.parts % runs.heads;
    first = index % runs.parts * runs.length, end = min_of(first + runs.length, runs.seq_len);
  }
};

// The rows that a warp works on at a time: what a lane has of them.
struct RunRows {
  const Runs& runs;
  const Run& run;
  Lane<int64_t> token;
  Lane<bool> exists, there;  // whether the row does, and the lane's elements of it

  TORUS_DEVICE RunRows(const Runs& runs, const Run& run, int64_t first)
      : runs(runs), run(run), token(cast<int64_t>(runs.lanes.row()) + first), exists(token < Lane<int64_t>(run.end)),
        there(exists && runs.lanes.in_row()) {}

  template <class E>
  TORUS_DEVICE E* base(const Tokens& x) const {
    return static_cast<E*>(x.data) + run.batch * x.batch + run.head * x.head;
  }
  TORUS_DEVICE Lane<int64_t> element(const Tokens& x) const {
    return token * Lane<int64_t>(x.token) + cast<int64_t>(runs.lanes.column());
  }
  template <class E>
  TORUS_DEVICE Elements read(const Tokens& x) const {
    return load_elements(base<const E>(x), element(x), there);
  }
  template <class E>
  TORUS_DEVICE void write(const Tokens& x, const Elements& values) const {
    store_elements(base<E>(x), element(x), values, there);
  }
  // A parameter per token or per head.
  TORUS_DEVICE Lane<float> gate(const Parameter& p) const {
    const float* const of_head = static_cast<const float*>(p.data) + run.batch * p.batch + run.head * p.head;
    return load(of_head, token * Lane<int64_t>(p.token), exists, 0.0f);
  }
  // One number a row into [B, H, T].
  TORUS_DEVICE void write_number(float* data, const Lane<float>& x) const {
    store(data + (run.batch * runs.heads + run.head) * runs.seq_len, token, x, exists && runs.lanes.column() == 0);
  }
};

// out[y, x] = sum over `outer` and `inner` of in[y y_stride + x x_stride + outer outer_stride + inner], a warp for each,
// always in the same order.
struct SumKernel {
  struct Arguments {
    const float* in;
    float* out;
    int64_t x_count, y_stride, x_stride, outer_stride, outer, inner;
  };
  static constexpr const char* kName = "sum_of_parts";
  static constexpr int kMaxWarps = 1;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const int64_t y = warp.block_x() / a.x_count, x = warp.block_x() % a.x_count;
    const float* const from = a.in + y * a.y_stride + x * a.x_stride;
    Lane<double> sum = 0.0;
    for (int64_t o = 0; o < a.outer; ++o)
      for (int64_t i = 0; i < a.inner; i += kWarpLanes) {
        const Lane<int64_t> at = cast<int64_t>(lane_index()) + i;
        sum = sum + cast<double>(load(from + o * a.outer_stride, at, at < Lane<int64_t>(a.inner), 0.0f));
      }
    const Lane<float> total = cast<float>(sum_of_lanes(sum));
    store(a.out, Lane<int64_t>(int64_t{1} * warp.block_x()), total, lane_index() == 0);
  }

  static void launch(const Arguments& arguments, int64_t y_count, const Device& device) {
    cuda::launch<SumKernel>({y_count * arguments.x_count}, kMaxWarps, 0, device, arguments);
  }
};

}  // namespace torus::cuda
