// Backward of one family of lines, or of the cross flows, by chunks of sixteen others; which, and where they lie, is
// what a Sweep knows: of lines in line_walk.h, of patches in patch_walk.h. One stream is worked off after another.
//
// By queries: delta, d_q and the rows' parts of d_decay, in two sweeps of a stream. By keys: d_k and d_v, in one sweep
// of a stream and of every query head of the group. Scores are transposed there: own rows are keys, so that what
// belongs to a query belongs to a column.
//
// kInPairs: chunks are taken in twos as far as they go. Not where first_key hides keys from some rows.
#pragma once

#include "chunk_gradients.h"
#include "line_walk.h"
#include "patch_walk.h"

namespace torus::cuda {

template <class Plan>
struct ChunkBackwardArguments {
  BackwardArguments backward;
  Plan plan;
};

template <class E, int D, class Sweep, bool kInPairs>
struct ChunkQueryGradientsKernel {
  using Plan = typename Sweep::Plan;
  using Table = typename Sweep::Table;
  using Arguments = ChunkBackwardArguments<Plan>;
  using Rows = PaddedTile<E, D>;
  static constexpr const char* kName = "attention_backward_queries_by_chunks";
  static constexpr int kMaxWarps = cuda::kMaxWarps;
  static constexpr int kMinBlocks = kChunkBlocks<D>;
  static constexpr int kChunkBytes = 2 * Rows::bytes(kChunkRows);
  static constexpr int kOwnBytes = Tile<E, D>::bytes(kOwnRows);

  static TORUS_INLINE constexpr int own_at(const Plan& plan) {
    return 2 * Rows::bytes(plan.rows()) + 2 * plan.table_size * static_cast<int>(sizeof(FloatPair));
  }
  static TORUS_INLINE constexpr int tokens_at(const Plan& plan) { return own_at(plan) + kMaxWarps * kOwnBytes; }
  static TORUS_INLINE constexpr int shared_bytes(const Plan& plan) {
    return tokens_at(plan) + kMaxWarps * OwnTokens::kBytes;
  }

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const BackwardArguments& backward = arguments.backward;
    const Operands& in = backward.in;
    const Plan& plan = arguments.plan;
    const Head head = query_head(in, warp.block_y());
    const Sweep sweep(warp, in, plan);
    const OwnTokens own(warp, tokens_at(plan), sweep.own.token);

    const int bytes = Rows::bytes(plan.rows()), elements = plan.rows() * Rows::kPitch;
    const int table_bytes = plan.table_size * static_cast<int>(sizeof(FloatPair));
    const Rows keys{warp.template shared<E>(0, elements)}, values{warp.template shared<E>(bytes, elements)};
    const auto biases = warp.template shared<FloatPair>(2 * bytes, plan.table_size);
    const auto squared = warp.template shared<FloatPair>(2 * bytes + table_bytes, plan.table_size);

    const RowFragments<E, D> query(in, rows_of<const E>(in.q, head.batch, head.query), in.q.token,
                                   sweep.own.token);
    const SharedFragments<E, D> d_out{
        {warp.template shared<E>(own_at(plan) + warp.index() * kOwnBytes, kOwnRows * D)}, {}};
    copy_own_rows(in, warp, sweep.own.token, rows_of<const E>(in.d_out, head.batch, head.query), in.d_out.token,
                  d_out.tile);
    QueryGradients<E, D> sums(query, d_out, keys, values, ScoreScale(in));
    const auto bring = [&](const Lane<int>& others, int row0, int rows) {
      bring_keys<E, D>(in, head, others, {keys, values}, row0, rows);
    };

    for (int k = 0; k < in.schedule.num_streams; ++k) {
      const int stream = in.schedule.stream[k];
      sums.begin_stream(backward, head, own.load().token, stream);
      warp.barrier();
      const PutPairs put_bias{biases, Bias{bias_slope(in, head, stream)}};
      const PutPairs put_squared{squared, SquaredDistance{}};
      sweep.fill_table(k, [&](const auto& at, const auto& distances, const auto& where) {
        put_bias(at, distances, where);
        put_squared(at, distances, where);
      });
      sweep.template run<kInPairs>(
          k, head, k == 0 || !sweep.keeps_rows(), bring,
          [&](const Lane<int>& first, int chunk, const auto& slots, auto hide) {
            sums.add_delta(Table{biases, first}, chunk, slots, hide);
          });
      sums.finish_delta(backward, head, own.load().token, stream);
      sweep.template run<kInPairs>(
          k, head, !sweep.keeps_rows(), bring, [&](const Lane<int>& first, int chunk, const auto& slots, auto hide) {
            sums.add_gradients(Table{biases, first}, Table{squared, first}, chunk, slots, hide);
          });
      sums.finish_decay(backward, head, own.load().token, stream);
    }
    write_gradient<E, D>(in, backward.d_q + head.local * in.tokens(),
                         rows_of<E>(backward.d_q_out, head.batch, head.query), backward.d_q_out.token,
                         own.load().token, sums.d_q, in.scale);
  }
};

template <class E, int D, class Sweep, bool kInPairs>
struct ChunkKeyGradientsKernel {
  using Plan = typename Sweep::Plan;
  using Table = typename Sweep::Table;
  using Arguments = ChunkBackwardArguments<Plan>;
  using Rows = PaddedTile<E, D>;
  static constexpr const char* kName = "attention_backward_keys_by_chunks";
  static constexpr int kMaxWarps = cuda::kMaxWarps;
  static constexpr int kChunkBytes = 2 * Rows::bytes(kChunkRows) + QueryNumbers::bytes(kChunkRows);
  static constexpr int kOwnBytes = Tile<E, D>::bytes(kOwnRows);

  static TORUS_INLINE constexpr int own_at(const Plan& plan) {
    return 2 * Rows::bytes(plan.rows()) + QueryNumbers::bytes(plan.rows()) +
           plan.table_size * static_cast<int>(sizeof(FloatPair));
  }
  static TORUS_INLINE constexpr int shared_bytes(const Plan& plan) { return own_at(plan) + 2 * kMaxWarps * kOwnBytes; }

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const BackwardArguments& backward = arguments.backward;
    const Operands& in = backward.in;
    const Plan& plan = arguments.plan;
    const int local = warp.block_y();
    const Head first_head = member_head(in, local, 0);
    const Sweep sweep(warp, in, plan);
    const Lane<int>(&token)[2] = sweep.own.token;

    const int bytes = Rows::bytes(plan.rows()), elements = plan.rows() * Rows::kPitch;
    const int table_at = 2 * bytes + QueryNumbers::bytes(plan.rows());
    const Rows queries{warp.template shared<E>(0, elements)}, d_out{warp.template shared<E>(bytes, elements)};
    const QueryNumbers numbers(warp, 2 * bytes, plan.rows());
    const auto biases = warp.template shared<FloatPair>(table_at, plan.table_size);

    const int key_at = own_at(plan) + 2 * warp.index() * kOwnBytes;
    typename KeyGradients<E, D>::Own key{{warp.template shared<E>(key_at, kOwnRows * D)}, {}};
    typename KeyGradients<E, D>::Own value{{warp.template shared<E>(key_at + kOwnBytes, kOwnRows * D)}, {}};
    copy_own_rows(in, warp, token, rows_of<const E>(in.k, first_head.batch, first_head.key_value), in.k.token,
                  key.tile);
    copy_own_rows(in, warp, token, rows_of<const E>(in.v, first_head.batch, first_head.key_value), in.v.token,
                  value.tile);
    key.load();
    value.load();
    KeyGradients<E, D> sums(key, value, queries, d_out, numbers, in.scale2);
    for (int member = 0; member < in.heads.group(); ++member) {
      const Head head = member_head(in, local, member);
      for (int k = 0; k < in.schedule.num_streams; ++k) {
        const int stream = in.schedule.stream[k];
        warp.barrier();
        sweep.fill_table(k, PutPairs{biases, Bias{bias_slope(in, head, stream)}});
        const bool brings_rows = k == 0 || !sweep.keeps_rows();
        const auto bring = [&](const Lane<int>& others, int row0, int rows) {
          if (brings_rows)
            copy_rows<2 * kChunkRows, 2, Rows>(in, others,
                                               {rows_of<const E>(in.q, head.batch, head.query),
                                                rows_of<const E>(in.d_out, head.batch, head.query)},
                                               {in.q.token, in.d_out.token}, {queries, d_out}, row0, rows);
          bring_numbers(backward, head, stream, others, numbers, row0, rows);
        };
        const auto hide = [&](Sum (&scores)[kChunkTiles], int row0) {
          if constexpr (!kInPairs) hide_younger(scores, in.scale2, token, numbers, row0);
        };
        sweep.template run<kInPairs>(
            k, head, true, bring, [&](const Lane<int>& first, int chunk, const auto& slots, auto) {
              sums.add(Table{biases, first}, chunk, slots, hide);
            });
      }
    }
    write_gradient<E, D>(in, backward.d_k + local * in.tokens(),
                         rows_of<E>(backward.d_k_out, first_head.batch, first_head.key_value), backward.d_k_out.token,
                         token, sums.d_k, in.scale);
    write_gradient<E, D>(in, backward.d_v + local * in.tokens(),
                         rows_of<E>(backward.d_v_out, first_head.batch, first_head.key_value), backward.d_v_out.token,
                         token, sums.d_v, 1.0f);
  }

 private:
  // Makes scores of queries -inf, once they are scaled, that first_key hides the keys from.
  static TORUS_DEVICE void hide_younger(Sum (&scores)[kChunkTiles], float scale2, const Lane<int> (&key)[2],
                                        const QueryNumbers& numbers, int row0) {
    const float hidden = scale2 < 0.0f ? -kNegativeInfinity : kNegativeInfinity;
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      TORUS_UNROLL
      for (int i = 0; i < 2; ++i) {
        const Lane<int> oldest = numbers.oldest.load(fragment_member() * 2 + (row0 + t * kColumns + i));
        TORUS_UNROLL
        for (int half = 0; half < 2; ++half)
          scores[t].value[2 * half + i] = select(key[half] >= oldest, scores[t].value[2 * half + i], hidden);
      }
  }

  static TORUS_DEVICE void bring_numbers(const BackwardArguments& backward, const Head& head, int stream,
                                         const Lane<int>& token, const QueryNumbers& numbers, int row0,
                                         int rows) {
    const Operands& in = backward.in;
    const Lane<int64_t> at = RowSums::at(in, head, token, stream);
    const Lane<bool> exists = token >= 0;
    // Without a query there is no weight, whatever the bias.
    const Lane<float> lse2 = select(exists, load_lse2(backward, head, token, stream), -kNegativeInfinity);
    numbers.store(row0, rows, lse2 * -in.inverse2, -load(backward.rows.delta, at, exists, 0.0f),
                  load(backward.rows.gate, at, exists, 0.0f), oldest_key(in, head.batch, token));
  }
};

}  // namespace torus::cuda
