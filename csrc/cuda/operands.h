// What every attention kernel is handed, and how a warp reads its part of it.
#pragma once

#include "fragment.h"
#include "schedule.h"

namespace torus::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Heads of a launch: block_y counts from the first, over the query heads of the whole batch or its key/value heads.
struct Heads {
  int query;         // of one batch element
  Divisor by_query, by_group;  // query heads of a batch element, and of a key/value head
  int64_t first_batch;
  int first;         // query head of it

  static constexpr Heads of(int64_t query, int64_t key_value) {
    return {static_cast<int>(query), Divisor::of(query), Divisor::of(query / key_value), 0, 0};
  }
  TORUS_INLINE constexpr int group() const { return by_group.value; }
  // Query head `head` of the whole batch is the first; so kernels divide 32-bit numbers only.
  TORUS_INLINE constexpr void begin_at(int64_t head) {
    first_batch = head / query;
    first = static_cast<int>(head % query);
  }
};

struct Operands {
  Schedule schedule;
  Heads heads;
  int seq_len, head_dim;
  float scale, scale2;          // of scores; the second in base 2, and not 0
  float inverse2;               // 1 / scale2
  Tokens q, k, v, state, d_out; // of E
  Parameter weights, decay, alpha;
  const int64_t* first_key;     // [B, T] or null
  const float* squared;         // [num_streams, table_rows, table_columns] of the schedule
  bool begins, ends;            // the first, the last to add to its sums

  TORUS_INLINE constexpr int64_t tokens() const { return int64_t{1} * seq_len * head_dim; }
};

// One query head, or one key/value head with a query head of its group.
struct Head {
  int64_t batch;
  int query, key_value;
  int local;  // in the launch's workspaces of query heads
};

TORUS_DEVICE Head query_head(const Operands& in, int local) {
  const int head = in.heads.first + local;
  const int batch = in.heads.by_query.quotient(head), h = head - batch * in.heads.query;
  return {in.heads.first_batch + batch, h, in.heads.by_group.quotient(h), local};
}

// Of all query heads of the whole batch; known without the head's division, so that nobody has to remember it.
TORUS_DEVICE int64_t place_in_batch(const Operands& in, const Head& head) {
  return in.heads.first_batch * in.heads.query + (in.heads.first + head.local);
}

// Of the launch's key/value head `local`, member of its group.
TORUS_DEVICE Head member_head(const Operands& in, int local, int member) {
  return query_head(in, local * in.heads.group() + member);
}

template <class E>
TORUS_DEVICE E* rows_of(const Tokens& tokens, int64_t batch, int head) {
  return static_cast<E*>(tokens.data) + batch * tokens.batch + head * tokens.head;
}

// A token as an index; of rows that do not exist it is of no use.
TORUS_DEVICE Lane<int64_t> index_of(const Lane<int>& token) { return cast<int64_t>(cast<uint32_t>(token)); }

// A parameter at rows of a head; per head its stride of tokens is 0.
TORUS_DEVICE Lane<float> load_parameter(const Parameter& parameter, const Head& head, const Lane<int>& token,
                                        int column) {
  const float* const base = static_cast<const float*>(parameter.data) + head.batch * parameter.batch +
                            head.query * parameter.head + column;
  return load(base, index_of(token) * parameter.token, token >= 0, 0.0f);
}

// The oldest key that a query sees; no key is as old as it where there is no query.
TORUS_DEVICE Lane<int> oldest_key(const Operands& in, int64_t batch, const Lane<int>& token) {
  constexpr int kNothingSeen = 0x7fffffff;
  if (in.first_key == nullptr) return select(token >= 0, Lane<int>(0), kNothingSeen);
  const int64_t* const keys = in.first_key + batch * in.seq_len;
  const Lane<int64_t> first = load(keys, index_of(token), token >= 0, int64_t{0});
  const auto clip = [](int64_t key, int t) {
    return static_cast<int>(t < 0 ? kNothingSeen : key < 0 ? 0 : key > t ? t : key);
  };
  return map(clip, first, token);
}

// The bias of distances: a score in base 2 has slope * rho^2 added.
TORUS_DEVICE float bias_slope(const Operands& in, const Head& head, int stream) {
  return -0.5f * kLog2e * static_cast<const float*>(in.decay.data)[head.query * in.decay.head + stream];
}

// A warp's own rows: two in every lane, group and group + 8.
struct OwnRows {
  OwnPlace place;
  Lane<int> token[2];
  bool any;

  TORUS_DEVICE OwnRows(const Schedule& schedule, const Warp& warp) : place(schedule.own(warp.block_x())) {
    const int track = schedule.own_track(place, warp.index()), first = schedule.own_position(place, warp.index());
    for (int half = 0; half < 2; ++half)
      token[half] =
          map([&](int row) { return schedule.own_token(place, track, row); }, fragment_group() + first + 8 * half);
    any = cuda::any(token[0] >= 0 || token[1] >= 0);
  }
};

// Begins to copy rows of some tensors into tiles, from row0 on: row r, of `rows`, is that of the token in lane r, zeros
// where there is none and in columns beyond head_dim. Of the turns, in each of which a lane copies 16 bytes of a row,
// part `part` of `parts`. What is added to addresses from turn to turn is the same in all lanes and known to the
// compiler, but for the token; what does not exist is read from where something does, and not copied.
template <int kCount, int kSources, class T, class E = typename T::Element>
TORUS_DEVICE void copy_rows(const Operands& in, const Lane<int>& token, const E* const (&from)[kSources],
                            const int64_t (&stride)[kSources], const T (&to)[kSources], int row0 = 0,
                            int rows = kCount, int part = 0, int parts = 1) {
  constexpr int kRowsOfTurn = kWarpLanes / T::kChunks;
  static_assert(kCount <= kWarpLanes, "a lane for every row");
  static_assert(kCount % kRowsOfTurn == 0 && kOwnRows % kRowsOfTurn == 0, "every turn copies whole rows");
  const Lane<int> row = lane_index() / T::kChunks, chunk = lane_index() % T::kChunks;
  const Lane<bool> exists = chunk * T::kChunk < in.head_dim;
  const Lane<int> column = select(exists, chunk * T::kChunk, 0);
  Lane<const E*> first_row[kSources];
  TORUS_UNROLL
  for (int s = 0; s < kSources; ++s) first_row[s] = map([&](int c) { return from[s] + c; }, column);
  TORUS_UNROLL_BY(4)  // more would take registers from sums
  for (int turn = 0; turn < kCount / kRowsOfTurn; ++turn) {
    const int first = (turn * parts + part) * kRowsOfTurn;
    if (first >= rows) break;
    const Lane<int> here = shuffle(token, row + first);
    const Lane<bool> there = exists && here >= 0;
    const Lane<int> place = select(here >= 0, here, 0);
    TORUS_UNROLL
    for (int s = 0; s < kSources; ++s) {
      const int64_t stride_bytes = stride[s] * static_cast<int64_t>(sizeof(E));
      const auto address = [stride_bytes](const E* at, int t) {
        const auto* const bytes = reinterpret_cast<const unsigned char*>(at);
        return reinterpret_cast<const E*>(bytes + static_cast<uint32_t>(t) * stride_bytes);
      };
      copy_async(to[s].data, T::at(row + row0 + first, chunk), map(address, first_row[s], place), there);
    }
  }
}

// A warp's own rows into a tile of its own; visible to the warp on return.
template <class E, int D>
TORUS_DEVICE void copy_own_rows(const Operands& in, const Warp& warp, const Lane<int> (&token)[2], const E* from,
                                int64_t stride, const Tile<E, D>& to) {
  const Lane<int> row = lane_index() % kOwnRows, source = row % 8 * 4;
  const Lane<int> token_of_row = select(row < 8, shuffle(token[0], source), shuffle(token[1], source));
  copy_rows<kOwnRows, 1, Tile<E, D>>(in, token_of_row, {from}, {stride}, {to});
  warp.commit_copies();
  warp.template wait_copies<0>();
  warp.sync();
}

// Tokens of a warp's own rows in shared memory, for kernels that need them seldom and their registers more.
struct OwnTokens {
  Shared<int> kept;  // kOwnRows of the warp's own

  static constexpr int kBytes = kOwnRows * static_cast<int>(sizeof(int));

  // At so many bytes of the block's shared memory there are kBytes for every warp.
  TORUS_DEVICE OwnTokens(const Warp& warp, int at, const Lane<int> (&token)[2])
      : kept(warp.template shared<int>(at + warp.index() * kBytes, kOwnRows)) {
    for (int half = 0; half < 2; ++half)
      kept.store(fragment_group() + 8 * half, token[half], fragment_member() == 0);
    warp.sync();
  }
  struct Pair {
    Lane<int> token[2];
  };
  TORUS_DEVICE Pair load() const { return {{kept.load(fragment_group()), kept.load(fragment_group() + 8)}}; }
};

// Token of every row of a tile of others, one in a lane.
TORUS_DEVICE Lane<int> other_tokens(const Schedule& schedule, const OwnPlace& own, const OtherPlace& other) {
  static_assert(kOtherRows == kWarpLanes, "a lane for every row");
  const auto token = [&](int row) {
    return row < other.count ? schedule.token(own, other.track, other.position + row) : kNoToken;
  };
  return map(token, lane_index());
}

// Rows of a tile of others, by the whole block.
template <int kSources, class E, int D>
TORUS_DEVICE void copy_others(const Operands& in, const Warp& warp, const Lane<int>& token,
                              const E* const (&from)[kSources], const int64_t (&stride)[kSources],
                              const Tile<E, D> (&to)[kSources]) {
  copy_rows<kOtherRows, kSources, Tile<E, D>>(in, token, from, stride, to, 0, kOtherRows, warp.index(),
                                              warp.count());
}

// Walks over the block's tiles of others in two buffers: stage(tile, buffer) begins to copy one while
// visit(tile, buffer) works on the other.
template <class Stage, class Visit>
TORUS_DEVICE void for_each_tile(const Warp& warp, const Schedule& schedule, const OwnPlace& own, Stage stage,
                                Visit visit) {
  OtherWalk walk(schedule, own);
  OtherPlace tile{}, next{};
  bool more = walk.next(tile);
  if (more) stage(tile, 0);
  warp.commit_copies();
  for (int buffer = 0; more; buffer ^= 1) {
    const bool another = walk.next(next);
    if (another) stage(next, buffer ^ 1);
    warp.commit_copies();
    warp.template wait_copies<1>();
    warp.barrier();
    visit(tile, buffer);
    warp.barrier();
    tile = next, more = another;
  }
  warp.template wait_copies<0>();
}

}  // namespace torus::cuda
