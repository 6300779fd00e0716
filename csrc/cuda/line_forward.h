// Forward of one family of lines: y += sum_s g_s O_s for sixteen queries a warp, one stream after another. A block has
// up to kMaxWarps neighbours of one line and brings their keys and values into shared memory in stretches, or once
// where a closed line fits; the inner loop finds there all it needs.
//
// kInPairs: chunks are taken in twos as far as they go. Not where entropy is asked for, or first_key hides keys from
// some rows: there they come one by one, which costs registers, too.
#pragma once

#include "chunk_softmax.h"
#include "line_walk.h"

namespace torus::cuda {

struct LineForwardArguments {
  ForwardArguments forward;
  LinePlan plan;
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

    const RowFragments<E, D> query(in, rows_of<const E>(in.q, head.batch, head.query), in.q.token, own.token);
    Lane<int> oldest[2];
    if constexpr (!kInPairs)
      for (int half = 0; half < 2; ++half) oldest[half] = oldest_key(in, head.batch, own.token[half]);
    const auto bring = [&](const Lane<int>& token, int row0, int rows) {
      bring_keys<E, D>(in, head, token, {keys, values}, row0, rows);
    };

    Sum y[D / kColumns];
    zero_sums(y);
    for (int k = 0; k < schedule.num_streams; ++k) {
      const Reach& reach = plan.reach[k];
      const LineTable table{pairs, first_place(reach)};
      ChunkSoftmax<E, D> softmax(query, keys, values, ScoreScale(in));
      StretchWalk walk(plan, schedule, own.place, k);
      do {
        warp.barrier();
        if (walk.z == 0) {
          const Bias bias{bias_slope(in, head, schedule.stream[k])};
          fill_line_table(in, warp, reach, k, PutPairs{pairs, bias});
        }
        if (k == 0 || !plan.resident) stage_stretch(warp, walk, bring);
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
  // Adds what a warp sees of a stretch.
  static TORUS_DEVICE void visit(const Arguments& arguments, const Warp& warp, const OwnRows& own,
                                 const StretchWalk& walk, const Lane<int> (&oldest)[2],
                                 const LineTable& table, ChunkSoftmax<E, D>& softmax) {
    const Operands& in = arguments.forward.in;
    const bool with_spread = !kInPairs && arguments.forward.entropy != nullptr;
    const int own_chunk = warp.index();
    const auto hide_in = [&](int chunk) {
      return [&, chunk](Sum (&scores)[kChunkTiles]) {
        if (!kInPairs && in.first_key != nullptr)
          hide_on_line(scores, in, own.place, own.place.position + chunk * kLineChunk, oldest);
      };
    };
    if (walk.z == 0) softmax.begin(table, slot_of(walk, own_chunk), with_spread, hide_in(own_chunk));
    for (int part = 1; part < Reach::kParts; ++part) {  // `begin` has taken the first
      const Chunks chunks = walk.reach.part(part, own_chunk).within(walk.window());
      int chunk = chunks.first, at = slot_of(walk, chunk);
      while (chunk <= chunks.last) {
        const int last = last_beside(walk, chunk, at, chunks.last);
        while (chunk <= last) {
          for (; kInPairs && chunk < last; chunk += 2, at += 2)
            if (!softmax.template add_chunks<2>(table, chunk - own_chunk, at)) break;
          if (chunk > last) break;
          if (!kInPairs || chunk < last || !softmax.template add_chunks<1>(table, chunk - own_chunk, at))
            softmax.add_chunk(table, chunk - own_chunk, at, with_spread, hide_in(chunk));
          ++chunk, ++at;
        }
        at = 0;
      }
    }
  }
};

}  // namespace torus::cuda
