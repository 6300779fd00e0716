// A block's stretches of a line in shared memory, and what its warps go through there.
#pragma once

#include "chunks.h"
#include "line_plan.h"

namespace torus::cuda {

using LineTable = DisplacementTable<kColumns>;

// put(x, squared distances, where), by the whole block, of displacement min_displacement() + x and of the one before;
// -1 where one of the schedule's streams sees nothing.
template <class Put>
TORUS_DEVICE void fill_line_table(const Operands& in, const Warp& warp, const Reach& reach, int stream, Put put) {
  const float* const squared = in.squared + int64_t{1} * stream * in.schedule.table_columns();
  const auto at_displacement = [&](const Lane<int>& displacement) {
    const Lane<int> step = displacement * reach.sign;
    const Lane<bool> there = step >= reach.min_step && step <= reach.max_step;
    return load(squared, cast<int64_t>(step - in.schedule.col_lo), there, -1.0f);
  };
  const int size = reach.table_size();
  for (int first = warp.index() * kWarpLanes; first < size; first += in.schedule.warps * kWarpLanes) {
    const Lane<int> at = lane_index() + first;
    const Lane<float> two[2] = {at_displacement(at + reach.min_displacement()),
                                at_displacement(at + (reach.min_displacement() - 1))};
    put(at, two, at < size);
  }
}

// That of the first sum of a warp's own chunk.
TORUS_DEVICE Lane<int> first_place(const Reach& reach) {
  return fragment_group() - fragment_member() * 2 - reach.min_displacement();
}

// Where a chunk lies in shared memory: in the window, or in the whole line.
TORUS_DEVICE int slot_of(const StretchWalk& walk, int chunk) {
  const LinePlan& plan = walk.plan;
  const int at = chunk + (plan.resident ? walk.own.position / kLineChunk : -walk.z * plan.chunks);
  return at < 0 ? at + plan.chunks : at >= plan.chunks ? at - plan.chunks : at;
}
// The last chunk up to `last` that lies beside one in slot `at`: on a closed line the first lies before the last.
TORUS_DEVICE int last_beside(const StretchWalk& walk, int chunk, int at, int last) {
  const int end = chunk + (walk.plan.chunks - 1 - at);
  return end < last ? end : last;
}

// bring(token, row0, rows) begins to bring up to 32 rows of the current stretch, of the tokens in its lanes, to row0
// and on; two chunks a warp at a time. They are there on return for the warp's own part.
template <class Bring>
TORUS_DEVICE void stage_stretch(const Warp& warp, const StretchWalk& walk, Bring bring) {
  const Schedule& schedule = walk.schedule;
  const LinePlan& plan = walk.plan;
  const Chunks window = plan.resident ? Chunks{0, plan.chunks - 1} : walk.window();
  const int origin = plan.resident ? 0 : walk.own.position;
  for (int chunk = window.first + 2 * warp.index(); chunk <= window.last; chunk += 2 * walk.schedule.warps) {
    if (!walk.needs(chunk) && !walk.needs(chunk + 1)) continue;
    const int position = origin + chunk * kLineChunk;
    const auto token = [&](int row) {
      const bool wraps = plan.closed && !plan.resident;
      const int at = wraps ? schedule.by_loop.modulo(position + row) : position + row;
      return schedule.line_token(walk.own.line, at);
    };
    bring(map(token, lane_index()), (chunk - (plan.resident ? 0 : walk.z * plan.chunks)) * kLineChunk,
          chunk < window.last ? 2 * kLineChunk : kLineChunk);
  }
  warp.commit_copies();
  warp.template wait_copies<0>();
}

// Hides what first_key says, which there is on lines in time only, in a chunk whose first key is at a position.
TORUS_DEVICE void hide_on_line(Sum (&scores)[kChunkTiles], const Operands& in, const OwnPlace& own, int position,
                               const Lane<int> (&oldest)[2]) {
  const int first = own.line + position * in.schedule.stride, stride = in.schedule.stride;
  hide_older(scores, in.scale2, oldest, [&](const Lane<int>& column) { return column * stride + first; });
}

// The backward's way over a line.
struct LineSweep {
  using Plan = LinePlan;
  using Table = LineTable;
  const Warp& warp;
  const Operands& in;
  const Plan& plan;
  OwnRows own;

  TORUS_DEVICE LineSweep(const Warp& warp, const Operands& in, const Plan& plan)
      : warp(warp), in(in), plan(plan), own(in.schedule, warp) {}

  // Whether the rows that a sweep has brought are those of every other one, too.
  TORUS_DEVICE bool keeps_rows() const { return plan.resident; }

  template <class Put>
  TORUS_DEVICE void fill_table(int k, Put put) const {
    fill_line_table(in, warp, plan.reach[k], k, put);
  }

  // visit(first, chunk, slots, hide) for one or two chunks at a time of what own rows see of the schedule's stream k:
  // `first` of a table, chunks counted from the own one, and hide(scores) for keys that a table does not hide from
  // queries. Chunks come one by one where first_key may hide some.
  template <bool kInPairs, class Bring, class Visit>
  TORUS_DEVICE void run(int k, const Head& head, bool brings, Bring bring, Visit visit) const {
    StretchWalk walk(plan, in.schedule, own.place, k);
    const Lane<int> first = first_place(walk.reach);
    const int own_chunk = warp.index();
    do {
      if (brings) {
        warp.barrier();
        stage_stretch(warp, walk, bring);
      }
      warp.barrier();
      for (int part = 0; own.any && part < 2; ++part) {
        const Chunks seen = (part == 0 ? walk.reach.near : walk.reach.far).shifted(own_chunk).within(walk.window());
        const auto hide_in = [&](int chunk) {
          return [&, chunk](Sum (&scores)[kChunkTiles]) {
            if constexpr (!kInPairs) {
              const Lane<int> oldest[2] = {oldest_key(in, head.batch, own.token[0]),
                                           oldest_key(in, head.batch, own.token[1])};
              hide_on_line(scores, in, own.place, own.place.position + chunk * kLineChunk, oldest);
            }
          };
        };
        int chunk = seen.first, at = slot_of(walk, chunk);
        while (chunk <= seen.last) {
          const int last = last_beside(walk, chunk, at, seen.last);
          for (; kInPairs && chunk < last; chunk += 2, at += 2)
            visit(first, chunk - own_chunk, ChunkSlots<2>{at}, HidesNothing{});
          for (; chunk <= last; ++chunk, ++at)
            visit(first, chunk - own_chunk, ChunkSlots<1>{at}, hide_in(chunk));
          at = 0;
        }
      }
    } while (walk.next());
  }
};

}  // namespace torus::cuda
