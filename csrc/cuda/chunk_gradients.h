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

}  // namespace torus::cuda
