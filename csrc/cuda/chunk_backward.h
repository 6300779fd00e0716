// Backward of one family of lines, or of the cross flows, by chunks of sixteen others; which, and where they lie, is
// what a Sweep knows: of lines in line_walk.h, of patches in patch_walk.h. One stream is worked off after another.
//
// By queries: delta, d_q and the rows' parts of d_decay, in two sweeps of a stream. By keys: d_k and d_v, in one sweep
// of a stream and of every query head of the group. Scores are transposed there: own rows are keys, so that what
// belongs to a query belongs to a column.
//
// kInPairs: chunks are taken in twos as far as they go. Not where first_key hides keys from some rows.
#pragma once

#include "backward.h"
#include "line_walk.h"
#include "patch_walk.h"

namespace torus::cuda {

template <class Plan>
struct ChunkBackwardArguments {
  BackwardArguments backward;
  Plan plan;
};

// Of the two operands that own rows are, 168 registers have room for one.
template <class E, int D>
using SharedFragments = OwnFragments<E, D, false>;

// Sums of sixteen queries beside chunks of keys and values.
template <class E, int D>
struct QueryGradients : QuerySums {
  using Rows = PaddedTile<E, D>;
  const RowFragments<E, D>& query;
  const SharedFragments<E, D>& d_out;
  const Rows keys, values;
  const float scale2;
  Sum d_q[D / kColumns];

  TORUS_DEVICE QueryGradients(const RowFragments<E, D>& query, const SharedFragments<E, D>& d_out, const Rows& keys,
                              const Rows& values, float scale2)
      : query(query), d_out(d_out), keys(keys), values(values), scale2(scale2) {
    zero_sums(d_q);
  }

  // Adds chunks to what `finish_delta` takes.
  template <int kChunks, class Table, class Hide>
  TORUS_DEVICE void add_delta(const Table& biases, int chunk, const ChunkSlots<kChunks>& slots, Hide hide) {
    for_each_chunk(biases, chunk, slots, hide, [&](int, const Chunk& probs, const Chunk& d_probs) {
      TORUS_UNROLL
      for (int t = 0; t < kChunkTiles; ++t)
        TORUS_UNROLL
        for (int i = 0; i < 4; ++i) {
          total[i / 2] = total[i / 2] + probs[t].value[i];
          products[i / 2] = products[i / 2] + probs[t].value[i] * d_probs[t].value[i];
        }
    });
  }

  // Adds them to d_q and d_decay, once delta is there.
  template <int kChunks, class Table, class Hide>
  TORUS_DEVICE void add_gradients(const Table& biases, const Table& squared, int chunk,
                                  const ChunkSlots<kChunks>& slots, Hide hide) {
    for_each_chunk(biases, chunk, slots, hide, [&](int c, const Chunk& probs, const Chunk& d_probs) {
      const ChunkNumbers<kChunkTiles> distances(squared, chunk + c);
      Chunk d_scores;
      TORUS_UNROLL
      for (int t = 0; t < kChunkTiles; ++t)
        TORUS_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2;
          d_scores[t].value[i] = probs[t].value[i] * (gate[half] * d_probs[t].value[i] - gated_delta[half]);
          decay[half] = decay[half] + distances.at(t, half, i % 2) * d_scores[t].value[i];
        }
      multiply_gradients<E, D>(d_q, d_scores, keys, slots.at[c] * kChunkRows);
    });
  }

 private:
  using Chunk = Sum[kChunkTiles];

  // visit(c, P, dP), before P is divided by its sum.
  template <int kChunks, class Table, class Hide, class Visit>
  TORUS_DEVICE void for_each_chunk(const Table& table, int chunk, const ChunkSlots<kChunks>& slots, Hide hide,
                                   Visit visit) {
    TORUS_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const ChunkNumbers<kChunkTiles> biases(table, chunk + c);
      Chunk probs, d_probs;
      multiply_rows(probs, query, keys, slots.at[c] * kChunkRows);
      multiply_rows(d_probs, d_out, values, slots.at[c] * kChunkRows);
      hide(probs);
      TORUS_UNROLL
      for (int t = 0; t < kChunkTiles; ++t)
        TORUS_UNROLL
        for (int i = 0; i < 4; ++i)
          probs[t].value[i] = exp2_of(probs[t].value[i] * scale2 + biases.at(t, i / 2, i % 2) -
                                      lse2[i / 2]);
      visit(c, probs, d_probs);
    }
  }
};

// What a stream of a query is to its keys; of no weight where there is no query.
struct alignas(16) QueryNumbers {
  float lse2, gate, delta;
  int oldest;  // key that it sees
};

// Sums of sixteen keys beside chunks of queries. Two gradients of 128 channels leave no registers for own rows.
template <class E, int D>
struct KeyGradients {
  using Rows = PaddedTile<E, D>;
  using Own = OwnFragments<E, D, D <= 64>;
  const Own& key;
  const Own& value;
  const Rows queries, d_out;
  const Shared<QueryNumbers> numbers;
  const float scale2;
  Sum d_k[D / kColumns], d_v[D / kColumns];

  TORUS_DEVICE KeyGradients(const Own& key, const Own& value, const Rows& queries, const Rows& d_out,
                            const Shared<QueryNumbers>& numbers, float scale2)
      : key(key), value(value), queries(queries), d_out(d_out), numbers(numbers), scale2(scale2) {
    zero_sums(d_k);
    zero_sums(d_v);
  }

  // hide(scores, row0): of queries from row0 on, those that do not see the keys.
  template <int kChunks, class Table, class Hide>
  TORUS_DEVICE void add(const Table& table, int chunk, const ChunkSlots<kChunks>& slots, Hide hide) {
    if constexpr (kChunks == 2 && D > 64) {
      for (int c = 0; c < kChunks; ++c)
        add(table, chunk + c, ChunkSlots<1>{{c == 0 ? slots.at[0] : slots.at[1]}}, hide);
      return;
    }
    TORUS_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const ChunkNumbers<kChunkTiles> biases(table, chunk + c);
      const int row0 = slots.at[c] * kChunkRows;
      Sum mixed[kChunkTiles], d_scores[kChunkTiles];
      multiply_rows(mixed, key, queries, row0);
      multiply_rows(d_scores, value, d_out, row0);
      hide(mixed, row0);
      TORUS_UNROLL
      for (int t = 0; t < kChunkTiles; ++t)
        TORUS_UNROLL
        for (int i = 0; i < 2; ++i) {
          const auto of_query = numbers.load(fragment_member() * 2 + (row0 + t * kColumns + i));
          const Lane<float> lse2 = map([](QueryNumbers x) { return x.lse2; }, of_query);
          const Lane<float> gate = map([](QueryNumbers x) { return x.gate; }, of_query);
          const Lane<float> delta = map([](QueryNumbers x) { return x.delta; }, of_query);
          TORUS_UNROLL
          for (int at = i; at < 4; at += 2) {
            const Lane<float> bias = biases.at(t, at / 2, i);
            mixed[t].value[at] = exp2_of(mixed[t].value[at] * scale2 + bias - lse2) * gate;
            d_scores[t].value[at] = mixed[t].value[at] * (d_scores[t].value[at] - delta);
          }
        }
      multiply_depth<E, D>(d_v, left_of<E>(mixed[0], mixed[1]), d_out, row0);
      multiply_depth<E, D>(d_k, left_of<E>(d_scores[0], d_scores[1]), queries, row0);
    }
  }
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
  static TORUS_INLINE constexpr int shared_bytes(const Plan& plan) { return own_at(plan) + kMaxWarps * kOwnBytes; }

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& arguments) {
    const BackwardArguments& backward = arguments.backward;
    const Operands& in = backward.in;
    const Plan& plan = arguments.plan;
    const Head head = query_head(in, warp.block_y());
    const Sweep sweep(warp, in, plan);
    const Lane<int>(&token)[2] = sweep.own.token;

    const int bytes = Rows::bytes(plan.rows()), elements = plan.rows() * Rows::kPitch;
    const int table_bytes = plan.table_size * static_cast<int>(sizeof(FloatPair));
    const Rows keys{warp.template shared<E>(0, elements)}, values{warp.template shared<E>(bytes, elements)};
    const auto biases = warp.template shared<FloatPair>(2 * bytes, plan.table_size);
    const auto squared = warp.template shared<FloatPair>(2 * bytes + table_bytes, plan.table_size);

    const RowFragments<E, D> query(in, rows_of<const E>(in.q, head.batch, head.query), in.q.token, token);
    const SharedFragments<E, D> d_out{
        {warp.template shared<E>(own_at(plan) + warp.index() * kOwnBytes, kOwnRows * D)}, {}};
    copy_own_rows(in, warp, token, rows_of<const E>(in.d_out, head.batch, head.query), in.d_out.token, d_out.tile);
    QueryGradients<E, D> sums(query, d_out, keys, values, in.scale2);
    const auto bring = [&](const Lane<int>& others, int row0, int rows) {
      copy_rows<2 * kChunkRows, 2, Rows>(in, others,
                                         {rows_of<const E>(in.k, head.batch, head.key_value),
                                          rows_of<const E>(in.v, head.batch, head.key_value)},
                                         {in.k.token, in.v.token}, {keys, values}, lane_index(), kWarpLanes, row0,
                                         rows);
    };

    for (int k = 0; k < in.schedule.num_streams; ++k) {
      const int stream = in.schedule.stream[k];
      sums.begin(backward, head, token, stream);
      warp.barrier();
      sweep.fill_table(biases, k, Bias{bias_slope(in, head, stream)});
      sweep.fill_table(squared, k, SquaredDistance{});
      sweep.template run<kInPairs>(k, head, k == 0 || !sweep.keeps_rows(), bring,
                [&](const Lane<int>& first, int chunk, const auto& slots, auto hide) {
                  sums.add_delta(Table{biases, first}, chunk, slots, hide);
                });
      sums.finish_delta(backward, head, token, stream);
      sweep.template run<kInPairs>(k, head, !sweep.keeps_rows(), bring, [&](const Lane<int>& first, int chunk, const auto& slots, auto hide) {
        sums.add_gradients(Table{biases, first}, Table{squared, first}, chunk, slots, hide);
      });
      sums.finish_decay(backward, head, token, stream);
    }
    write_gradient<E, D>(in, backward.d_q + head.local * in.tokens(),
                         rows_of<E>(backward.d_q_out, head.batch, head.query), backward.d_q_out.token, token, sums.d_q,
                         in.scale);
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
  static constexpr int kNumberBytes = static_cast<int>(sizeof(QueryNumbers));
  static constexpr int kChunkBytes = 2 * Rows::bytes(kChunkRows) + kChunkRows * kNumberBytes;

  static constexpr int kOwnBytes = Tile<E, D>::bytes(kOwnRows);

  static TORUS_INLINE constexpr int own_at(const Plan& plan) {
    return 2 * Rows::bytes(plan.rows()) + plan.rows() * kNumberBytes +
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
    const int table_at = 2 * bytes + plan.rows() * kNumberBytes;
    const Rows queries{warp.template shared<E>(0, elements)}, d_out{warp.template shared<E>(bytes, elements)};
    const auto numbers = warp.template shared<QueryNumbers>(2 * bytes, plan.rows());
    const auto biases = warp.template shared<FloatPair>(table_at, plan.table_size);

    const int own_bytes = own_at(plan) + 2 * warp.index() * kOwnBytes;
    typename KeyGradients<E, D>::Own key{{warp.template shared<E>(own_bytes, kOwnRows * D)}, {}};
    typename KeyGradients<E, D>::Own value{{warp.template shared<E>(own_bytes + kOwnBytes, kOwnRows * D)}, {}};
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
        sweep.fill_table(biases, k, Bias{bias_slope(in, head, stream)});
        const bool brings_rows = k == 0 || !sweep.keeps_rows();
        const auto bring = [&](const Lane<int>& others, int row0, int rows) {
          if (brings_rows)
            copy_rows<2 * kChunkRows, 2, Rows>(in, others,
                                               {rows_of<const E>(in.q, head.batch, head.query),
                                                rows_of<const E>(in.d_out, head.batch, head.query)},
                                               {in.q.token, in.d_out.token}, {queries, d_out}, lane_index(),
                                               kWarpLanes, row0, rows);
          bring_numbers(backward, head, stream, others, numbers, row0, rows);
        };
        sweep.template run<kInPairs>(k, head, true, bring, [&](const Lane<int>& first, int chunk, const auto& slots, auto) {
          sums.add(Table{biases, first}, chunk, slots, [&](Sum (&scores)[kChunkTiles], int row0) {
            if constexpr (!kInPairs) hide_younger(scores, in.scale2, token, numbers, row0);
          });
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
                                        const Shared<QueryNumbers>& numbers, int row0) {
    const float hidden = scale2 < 0.0f ? -kNegativeInfinity : kNegativeInfinity;
    TORUS_UNROLL
    for (int t = 0; t < kChunkTiles; ++t)
      TORUS_UNROLL
      for (int i = 0; i < 2; ++i) {
        const auto of_query = numbers.load(fragment_member() * 2 + (row0 + t * kColumns + i));
        const Lane<int> oldest = map([](QueryNumbers x) { return x.oldest; }, of_query);
        TORUS_UNROLL
        for (int half = 0; half < 2; ++half)
          scores[t].value[2 * half + i] = select(key[half] >= oldest, scores[t].value[2 * half + i], hidden);
      }
  }

  static TORUS_DEVICE void bring_numbers(const BackwardArguments& backward, const Head& head, int stream,
                                         const Lane<int>& token, const Shared<QueryNumbers>& numbers, int row0,
                                         int rows) {
    const Lane<int64_t> at = RowSums::at(backward.in, head, token, stream);
    const auto together = [](float lse2, float gate, float delta, int oldest) {
      return QueryNumbers{lse2, gate, delta, oldest};
    };
    const Lane<QueryNumbers> of_query = map(together, load_lse2(backward, head, token, stream),
                                            load(backward.rows.gate, at, token >= 0, 0.0f),
                                            load(backward.rows.delta, at, token >= 0, 0.0f),
                                            oldest_key(backward.in, head.batch, token));
    numbers.store(lane_index() + row0, of_query, lane_index() < rows);
  }
};

}  // namespace torus::cuda
