// What the backward does with chunks of sixteen others: sums of sixteen queries beside keys and values, and of sixteen
// keys beside queries.
#pragma once

#include "backward.h"

namespace torus::cuda {

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
  const ScoreScale scale;
  RowStart level;  // -lse in base 2, in units of q . k
  Sum d_q[D / kColumns];

  TORUS_DEVICE QueryGradients(const RowFragments<E, D>& query, const SharedFragments<E, D>& d_out, const Rows& keys,
                              const Rows& values, const ScoreScale& scale)
      : query(query), d_out(d_out), keys(keys), values(values), scale(scale) {
    zero_sums(d_q);
  }

  TORUS_DEVICE void begin_stream(const BackwardArguments& arguments, const Head& head, const Lane<int> (&token)[2],
                                 int stream) {
    begin(arguments, head, token, stream);
    level = RowStart(lse2[0] * -scale.inverse, lse2[1] * -scale.inverse);
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
      multiply_gradients<E, D>(d_q, d_scores, keys, slots.row0(c));
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
      multiply_rows(probs, query, keys, slots.row0(c), level);
      multiply_rows(d_probs, d_out, values, slots.row0(c));
      hide(probs);
      TORUS_UNROLL
      for (int t = 0; t < kChunkTiles; ++t)
        TORUS_UNROLL
        for (int i = 0; i < 4; ++i)
          probs[t].value[i] = exp2_of(probs[t].value[i] * scale.factor + biases.at(t, i / 2, i % 2));
      visit(c, probs, d_probs);
    }
  }
};

// The four places of a sum that a lane has.
struct alignas(16) SumNumbers {
  float value[4];
};

// What a stream of a query is to its keys, in shared memory. Levels and deltas of two neighbours, which are two columns
// of a sum, lie as they lie in its registers: products begin with them.
struct QueryNumbers {
  Shared<SumNumbers> level, delta;  // -lse and -delta, in units of q . k and of d_out . v
  Shared<FloatPair> gate;
  Shared<int> oldest;               // key that it sees

  // Of a row.
  static constexpr int kSumBytes = sizeof(SumNumbers) / 2, kGateBytes = sizeof(FloatPair) / 2;
  static constexpr int kBytes = 2 * kSumBytes + kGateBytes + static_cast<int>(sizeof(int));
  static TORUS_INLINE constexpr int bytes(int rows) { return rows * kBytes; }

  TORUS_DEVICE QueryNumbers(const Warp& warp, int at, int rows)
      : level(warp.template shared<SumNumbers>(at, rows / 2)),
        delta(warp.template shared<SumNumbers>(at + rows * kSumBytes, rows / 2)),
        gate(warp.template shared<FloatPair>(at + rows * 2 * kSumBytes, rows / 2)),
        oldest(warp.template shared<int>(at + rows * (2 * kSumBytes + kGateBytes), rows)) {}

  // Of `rows` queries from row0 on, one in a lane.
  TORUS_DEVICE void store(int row0, int rows, const Lane<float>& level_of, const Lane<float>& delta_of,
                          const Lane<float>& gate_of, const Lane<int>& oldest_of) const {
    const Lane<int> lane = lane_index(), first = lane * 2 % kWarpLanes, at = lane + row0 / 2;
    const Lane<bool> where = lane < rows / 2;
    const auto twice = [](float a, float b) { return SumNumbers{{a, b, a, b}}; };
    const auto once = [](float a, float b) { return FloatPair{a, b}; };
    level.store(at, map(twice, shuffle(level_of, first), shuffle(level_of, first + 1)), where);
    delta.store(at, map(twice, shuffle(delta_of, first), shuffle(delta_of, first + 1)), where);
    gate.store(at, map(once, shuffle(gate_of, first), shuffle(gate_of, first + 1)), where);
    oldest.store(lane + row0, oldest_of, lane < rows);
  }
  // Of the eight queries from `row` on.
  static TORUS_DEVICE Sum start(const Shared<SumNumbers>& of, int row) {
    const Lane<SumNumbers> four = of.load(fragment_member() + row / 2);
    Sum sum;
    TORUS_UNROLL
    for (int i = 0; i < 4; ++i) sum.value[i] = map([i](const SumNumbers& x) { return x.value[i]; }, four);
    return sum;
  }
};

// Sums of sixteen keys beside chunks of queries. Two gradients of 128 channels leave no registers for own rows.
template <class E, int D>
struct KeyGradients {
  using Rows = PaddedTile<E, D>;
  using Own = OwnFragments<E, D, D <= 64>;
  const Own& key;
  const Own& value;
  const Rows queries, d_out;
  const QueryNumbers& numbers;
  const float scale2;
  Sum d_k[D / kColumns], d_v[D / kColumns];

  TORUS_DEVICE KeyGradients(const Own& key, const Own& value, const Rows& queries, const Rows& d_out,
                            const QueryNumbers& numbers, float scale2)
      : key(key), value(value), queries(queries), d_out(d_out), numbers(numbers), scale2(scale2) {
    zero_sums(d_k);
    zero_sums(d_v);
  }

  // hide(scores, row0): of queries from row0 on, those that do not see the keys.
  template <int kChunks, class Table, class Hide>
  TORUS_DEVICE void add(const Table& table, int chunk, const ChunkSlots<kChunks>& slots, Hide hide) {
    TORUS_UNROLL_BY(D <= 64 ? kChunks : 1)  // of 128 channels one has all registers
    for (int c = 0; c < kChunks; ++c) {
      const ChunkNumbers<kChunkTiles> biases(table, chunk + c);
      const int row0 = slots.row0(c);
      Sum mixed[kChunkTiles], d_scores[kChunkTiles];
      const auto start = [&](const Shared<SumNumbers>& of) {
        return [&, of](int tile) { return QueryNumbers::start(of, row0 + tile * kColumns); };
      };
      multiply_rows(mixed, key, queries, row0, start(numbers.level));
      multiply_rows(d_scores, value, d_out, row0, start(numbers.delta));
      hide(mixed, row0);
      TORUS_UNROLL
      for (int t = 0; t < kChunkTiles; ++t) {
        const Lane<FloatPair> gates = numbers.gate.load(fragment_member() + (row0 + t * kColumns) / 2);
        const Lane<float> gate[2] = {map([](FloatPair x) { return x.low; }, gates),
                                     map([](FloatPair x) { return x.high; }, gates)};
        TORUS_UNROLL
        for (int i = 0; i < 4; ++i) {
          const Lane<float> bias = biases.at(t, i / 2, i % 2);
          mixed[t].value[i] = exp2_of(mixed[t].value[i] * scale2 + bias) * gate[i % 2];
          d_scores[t].value[i] = mixed[t].value[i] * d_scores[t].value[i];
        }
      }
      multiply_depth<E, D>(d_v, left_of<E>(mixed[0], mixed[1]), d_out, row0);
      multiply_depth<E, D>(d_k, left_of<E>(d_scores[0], d_scores[1]), queries, row0);
    }
  }
};

}  // namespace torus::cuda
