// Small kernels that prepare a call: tables of squared distances, and statistics of streams that take no part.
#pragma once

#include "launch.h"
#include "schedule.h"

namespace torus::cuda {

// table [num_streams, table_rows, table_columns]; negative where nothing is seen.
struct TableKernel {
  struct Arguments {
    Schedule schedule;
    Lattice lattice;
    int64_t seq_len;
    float* table;
  };
  static constexpr const char* kName = "squared_distances";
  static constexpr int kMaxWarps = 4;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const int64_t columns = a.schedule.table_columns(), size = a.schedule.table_size();
    const Lane<int64_t> at =
        cast<int64_t>(lane_index()) + (int64_t{1} * warp.block_x() * warp.count() + warp.index()) * int64_t{kWarpLanes};
    const auto squared = [&](int64_t i) {
      if (i >= size * a.schedule.num_streams) return 0.0f;
      const int stream = a.schedule.stream[i / size];
      const int64_t row = i % size / columns, column = i % columns;
      return static_cast<float>(squared_distance(a.lattice, a.seq_len, a.schedule, stream, row, column));
    };
    store(a.table, at, map(squared, at), at < size * a.schedule.num_streams);
  }

  static void fill(const Arguments& arguments, const Device& device) {
    const int64_t count = arguments.schedule.table_size() * arguments.schedule.num_streams;
    launch<TableKernel>({ceil_div(count, kMaxWarps * kWarpLanes)}, kMaxWarps, 0, device, arguments);
  }
};

struct FillKernel {
  struct Arguments {
    float* data;
    int64_t count;
    float value;
  };
  static constexpr const char* kName = "fill";
  static constexpr int kMaxWarps = 4;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const Lane<int64_t> at =
        cast<int64_t>(lane_index()) + (int64_t{1} * warp.block_x() * warp.count() + warp.index()) * int64_t{kWarpLanes};
    store(a.data, at, a.value, at < a.count);
  }

  static void fill(float* data, int64_t count, float value, const Device& device) {
    launch<FillKernel>({ceil_div(count, kMaxWarps * kWarpLanes)}, kMaxWarps, 0, device, {data, count, value});
  }
};

}  // namespace torus::cuda
