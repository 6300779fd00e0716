// Forward of one family of lines: y += sum_s g_s O_s for sixteen queries a warp, one stream after another. A block has
// up to kMaxWarps neighbours of one line and brings their keys and values into shared memory in stretches, or once
// where a closed line fits; the inner loop finds there all it needs.
//
// kInPairs: chunks are taken in twos as far as they go. Not where entropy is asked for, or first_key hides keys from
// some rows: there they come one by one, which costs registers, too.
#pragma once

#include "chunk_softmax.h"
#include "line_plan.h"

namespace torus::cuda {

struct LineForwardArguments {
  ForwardArguments forward;
  LinePlan plan;
};

// At place x the biases of step min_table_step() + x and of the step before.
using LineBiases = BiasTable<kColumns>;

// Of one of the schedule's streams, by the whole block.
TORUS_DEVICE void fill_line_biases(const Shared<FloatPair>& pairs, const Operands& in, const Warp& warp,
                                   const Reach& reach, int stream, float slope) {
  const float* const squared = in.squared + int64_t{1} * stream * in.schedule.table_columns();
  const auto bias = [&](const Lane<int>& step) {
    const Lane<bool> there = step >= reach.min_step && step <= reach.max_step;
    const Lane<float> x = load(squared, cast<int64_t>(step - in.schedule.col_lo), there, -1.0f);
    return select(x >= 0.0f, x * slope, kNegativeInfinity);
  };
  const int size = reach.table_size();
  for (int first = warp.index() * kWarpLanes; first < size; first += warp.count() * kWarpLanes) {
    const Lane<int> at = lane_index() + first;
    const Lane<FloatPair> pair = map([](float x, float before) { return FloatPair{x, before}; },
                                     bias(at + reach.min_table_step()), bias(at + (reach.min_table_step() - 1)));
    pairs.store(at, pair, at < size);
  }
}

// Positions of the oldest keys that rows see.
template <bool kAsked>
struct OldestPositions {
  Lane<int> oldest[2];
  float hidden;
  bool any;

  TORUS_DEVICE OldestPositions(const Operands& in, const Head& head, const OwnRows& own) {
    any = in.first_key != nullptr;
    hidden = in.scale2 < 0.0f ? -kNegativeInfinity : kNegativeInfinity;
    const int line = own.place.line, stride = in.schedule.stride;
    const auto position = [&](int key) { return key <= line ? 0 : (key - line + stride - 1) / stride; };
    TORUS_UNROLL
    for (int half = 0; half < 2; ++half)
      if (any) oldest[half] = map(position, oldest_key(in, head.batch, own.token[half]));
  }

  // Makes scores of keys from position `first` on -inf, once they are scaled, where a row does not see them.
  TORUS_DEVICE void hide(Sum (&scores)[kChunkTiles], int first) const {
    if (!any) return;
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      TORUS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Lane<int> position = fragment_member() * 2 + (first + t * kColumns + i % 2);
        scores[t].value[i] = select(position >= oldest[i / 2], scores[t].value[i], hidden);
      }
  }
};

template <>
struct OldestPositions<false> {
  TORUS_DEVICE OldestPositions(const Operands&, const Head&, const OwnRows&) {}
  TORUS_DEVICE void hide(Sum (&)[kChunkTiles], int) const {}
};

template <class E, int D, bool kInPairs>
struct LineForwardKernel {
  using Arguments = LineForwardArguments;
  using Rows = PaddedTile<E, D>;
  static constexpr const char* kName = "attention_forward_lines";
  static constexpr int kMaxWarps = cuda::kMaxWarps;
  static constexpr int kMinBlocks = kChunkBlocks<D>;
  static constexpr int kChunkBytes = 2 * Rows::bytes(kLineChunk);

  static TORUS_INLINE constexpr int shared_bytes(const LinePlan& plan) {
    return plan.chunks * kChunkBytes + plan.table_size * static_cast<int>(sizeof(FloatPair));
  }

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const Operands& in = arguments.forward.in;
    const Schedule& schedule = in.schedule;
    const LinePlan& plan = arguments.plan;
    const Head head = query_head(in, warp.block_y());
    const OwnRows own(schedule, warp);
    const int values_at = plan.chunks * Rows::bytes(kLineChunk), table_at = 2 * values_at;
    const int elements = plan.chunks * kLineChunk * Rows::kPitch;
    const Rows keys{warp.template shared<E>(0, elements)}, values{warp.template shared<E>(values_at, elements)};
    const Shared<FloatPair> pairs = warp.template shared<FloatPair>(table_at, plan.table_size);

    const QueryFragments<E, D> query(in, rows_of<const E>(in.q, head.batch, head.query), own.token);
    const OldestPositions<!kInPairs> oldest(in, head, own);

    Sum y[D / kColumns];
    TORUS_UNROLL
    for (int t = 0; t < D / kColumns; ++t) y[t] = zero_sum();
    for (int k = 0; k < schedule.num_streams; ++k) {
      const Reach& reach = plan.reach[k];
      const LineBiases table{pairs, fragment_group() - fragment_member() * 2 - reach.min_table_step()};
      ChunkSoftmax<E, D> softmax(query, keys, values, in.scale2);
      StretchWalk walk(plan, schedule, own.place, k);
      do {
        warp.barrier();
        if (walk.z == 0) fill_line_biases(pairs, in, warp, reach, k, bias_slope(in, head, schedule.stream[k]));
        if (k == 0 || !plan.resident) stage(warp, in, head, own.place, walk, {keys, values});
        warp.barrier();
        if (own.any) visit(arguments, warp, own, walk, oldest, table, softmax);
      } while (walk.next());
      softmax.finish();
      mix_stream<D>(in, head, own.token, k, softmax, softmax.out, y);
      write_statistics(arguments.forward, head, own.token, k, softmax);
    }
    write_outputs<E, D>(arguments.forward, head, own.token, y);
  }

 private:
  // Slot of a chunk in the window, or of the whole line.
  static TORUS_DEVICE int slot(const StretchWalk& walk, const OwnPlace& own, int chunk) {
    const int at = chunk + (walk.plan.resident ? own.position / kLineChunk : -walk.z * walk.plan.chunks);
    return at < 0 ? at + walk.plan.chunks : at >= walk.plan.chunks ? at - walk.plan.chunks : at;
  }

  // Keys and values of a stretch, two chunks a warp; there on return for the warp's own part.
  static TORUS_DEVICE void stage(const Warp& warp, const Operands& in, const Head& head, const OwnPlace& own,
                                 const StretchWalk& walk, const Rows (&to)[2]) {
    const Schedule& schedule = in.schedule;
    const LinePlan& plan = walk.plan;
    const E* const from[2] = {rows_of<const E>(in.k, head.batch, head.key_value),
                              rows_of<const E>(in.v, head.batch, head.key_value)};
    const int64_t stride[2] = {in.k.token, in.v.token};
    const Chunks window = plan.resident ? Chunks{0, plan.chunks - 1} : walk.window();
    const int origin = plan.resident ? 0 : own.position;
    for (int chunk = window.first + 2 * warp.index(); chunk <= window.last; chunk += 2 * warp.count()) {
      if (!walk.needs(chunk) && !walk.needs(chunk + 1)) continue;
      const int position = origin + chunk * kLineChunk;
      const auto token = [&](int row) {
        const bool wraps = plan.closed && !plan.resident;
        const int at = wraps ? schedule.by_loop.modulo(position + row) : position + row;
        return schedule.line_token(own.line, at);
      };
      const int row0 = (chunk - (plan.resident ? 0 : walk.z * plan.chunks)) * kLineChunk;
      const int rows = chunk < window.last ? 2 * kLineChunk : kLineChunk;
      copy_rows<2 * kLineChunk, 2, Rows>(in, map(token, lane_index()), from, stride, to, lane_index(), kWarpLanes, row0,
                                         rows);
    }
    warp.commit_copies();
    warp.template wait_copies<0>();
  }

  // Adds what a warp sees of a stretch.
  static TORUS_DEVICE void visit(const Arguments& arguments, const Warp& warp, const OwnRows& own,
                                 const StretchWalk& walk, const OldestPositions<!kInPairs>& oldest,
                                 const LineBiases& table, ChunkSoftmax<E, D>& softmax) {
    const bool with_spread = !kInPairs && arguments.forward.entropy != nullptr;
    const int own_chunk = warp.index(), slots = walk.plan.chunks;
    if (kInPairs && walk.z == 0) softmax.begin(table, slot(walk, own.place, own_chunk));
    for (int part = kInPairs ? 1 : 0; part < Reach::kParts; ++part) {
      const Chunks chunks = walk.reach.part(part, own_chunk).within(walk.window());
      const auto next = [slots](int slot) { return slot + 1 == slots ? 0 : slot + 1; };
      int chunk = chunks.first, at = slot(walk, own.place, chunk);
      while (true) {
        while (kInPairs && chunk < chunks.last) {
          const int second = next(at);
          if (!softmax.template add_chunks<2>(table, chunk - own_chunk, {at, second})) break;
          chunk += 2, at = next(second);
        }
        if (chunk > chunks.last) break;
        const auto hide = [&](Sum (&scores)[kChunkTiles]) {
          oldest.hide(scores, own.place.position + chunk * kLineChunk);
        };
        const bool last = kInPairs && chunk == chunks.last;
        if (!last || !softmax.template add_chunks<1>(table, chunk - own_chunk, {at}))
          softmax.add_chunk(table, chunk - own_chunk, at, with_spread, hide);
        ++chunk, at = next(at);
      }
    }
  }
};

}  // namespace torus::cuda
