// Decoding: the newest token of a causal sequence against a ring of cached keys.
//
// Which lags are visible is a property of the lattice alone. They are listed once a call, for all heads: every lag
// once, in ascending order, with the streams that see it. A key that several streams see is scored once, and whatever
// bounds the age of keys (the start of the sequence, first_key) keeps a prefix of the list.
#pragma once

#include "softmax.h"
#include "team.h"

namespace torus::TORUS_ISA {

// The lags of a family of lines, in ascending order.
struct LineLags {
  LineFamily lines;
  int64_t step;

  LineLags(const Lattice& lattice, Family family, int64_t seq_len)
      : lines(line_family(lattice, family, seq_len)), step(0) {}
  bool done() const { return !lines.present() || step > lines.max_step; }
  int64_t lag() const { return step * lines.stride; }
  void advance() { ++step; }
};

// The lags of the cross flows, in ascending order: row by row of their window.
struct CrossLags {
  CrossWindow window;
  int64_t seq_len;
  int64_t a, b, b_end;

  CrossLags(const Lattice& lattice, int64_t seq_len)
      : window(cross_window(lattice, seq_len)), seq_len(seq_len), a(window.a_lo - 1), b(0), b_end(0) {
    advance();
  }
  bool done() const { return a > window.a_hi; }
  int64_t lag() const { return a * window.lattice.n_minor + b; }
  void advance() {
    ++b;
    while (b >= b_end && a <= window.a_hi) {
      ++a;
      const int64_t half = window.half_width(a), row = a * window.lattice.n_minor;
      b = max_of(max_of(window.b_lo, -half), -row);                       // lag >= 0
      b_end = min_of(min_of(window.b_hi, half), seq_len - 1 - row) + 1;  // lag < T
    }
  }
};

// The keys that a stream sees: their places in the list of lags, ascending.
template <class T>
struct StreamKeys {
  int32_t* place;
  T* rho_squared;
  int64_t count;
};

template <class T>
struct VisibleLags {
  int64_t* lags;
  int64_t count;
  int64_t longest;  // stream
  StreamKeys<T> streams[kNumStreams];

  VisibleLags(const Lattice& lattice, int64_t seq_len, Arena& arena) : count(0), longest(0), streams{} {
    int64_t room = 0, cross_room = 0;
    for (CrossLags cross(lattice, seq_len); !cross.done(); cross.advance()) ++cross_room;
    for (int s = 0; s < kNumStreams; ++s) {
      int64_t size = cross_room;
      for (int f = 0; f < kNumFamilies; ++f) {
        const LineFamily lines = line_family(lattice, static_cast<Family>(f), seq_len);
        if (s >= lines.first_stream && s < lines.first_stream + lines.num_streams) size = lines.max_step + 1;
      }
      if (!lattice.has(s)) size = 0;
      streams[s].place = arena.take<int32_t>(size);
      streams[s].rho_squared = arena.take<T>(size);
      room += size;
    }
    lags = arena.take<int64_t>(room);
  }

  // Merges the families' lags.
  void fill(const Lattice& lattice, int64_t seq_len) {
    LineLags families[kNumFamilies] = {
        {lattice, kMajor, seq_len}, {lattice, kMinor, seq_len}, {lattice, kClockwise, seq_len},
        {lattice, kCounterClockwise, seq_len}};
    CrossLags cross(lattice, seq_len);
    for (;;) {
      int64_t next = seq_len;
      for (const LineLags& family : families)
        if (!family.done()) next = min_of(next, family.lag());
      if (!cross.done()) next = min_of(next, cross.lag());
      if (next == seq_len) return;
      lags[count] = next;
      bool seen = false;
      for (LineLags& family : families) {
        if (family.done() || family.lag() != next) continue;
        const LineFamily& lines = family.lines;
        for (int s = lines.first_stream; s < lines.first_stream + lines.num_streams; ++s)
          if (lattice.has(s) && lines.visible(s, family.step)) {
            see(s, lines.rho_squared(family.step));
            seen = true;
          }
        family.advance();
      }
      if (!cross.done() && cross.lag() == next) {
        for (int s = kCrossUToV; s <= kCrossVToU; ++s)
          if (lattice.has(s) && cross.window.visible(s, cross.a, cross.b)) {
            see(s, cross.window.rho_squared(s, cross.a, cross.b));
            seen = true;
          }
        cross.advance();
      }
      count += seen;
    }
  }

 private:
  // The stream sees the lag that is being listed.
  TORUS_INLINE void see(int stream, double rho_squared) {
    StreamKeys<T>& keys = streams[stream];
    keys.place[keys.count] = static_cast<int32_t>(count);
    keys.rho_squared[keys.count] = static_cast<T>(rho_squared);
    longest = max_of(longest, ++keys.count);
  }
};

// How many of `count` ascending numbers are below `bound`.
template <class Int>
TORUS_INLINE int64_t count_below(const Int* ascending, int64_t count, int64_t bound) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = (low + count) / 2;
    if (ascending[middle] < bound)
      low = middle + 1;
    else
      count = middle;
  }
  return low;
}

template <class T>
TORUS_INLINE const T* parameter_at(const Parameter& p, int64_t batch, int64_t head) {
  return static_cast<const T*>(p.data) + batch * p.batch + head * p.head;
}

constexpr int kKeysPerBlock = 4;
constexpr int64_t kRowsAhead = 16;  // rows to fetch before their turn: half of them begin a page of their own

// The ring of one key/value head, read by lag.
template <class Source>
struct Ring {
  const Source* data;
  int64_t stride, slots, newest;  // newest: the slot of lag 0

  TORUS_INLINE const Source* at(int64_t lag) const { return data + wrap_once(newest - lag, slots) * stride; }

  // Rows of a block of lags, the last one repeated where the list ends; rows that are due soon are fetched.
  TORUS_INLINE void rows(const int64_t* lags, int64_t first, int64_t count, int64_t head_dim,
                         const Source* (&block)[kKeysPerBlock]) const {
    for (int i = 0; i < kKeysPerBlock; ++i) {
      block[i] = at(lags[min_of(first + i, count - 1)]);
      const char* due = reinterpret_cast<const char*>(at(lags[min_of(first + i + kRowsAhead, count - 1)]));
      for (int64_t byte = 0; byte < head_dim * static_cast<int64_t>(sizeof(Source)); byte += 64)
        __builtin_prefetch(due + byte);
    }
  }
};

// scores [HEADS, ld] of a block of keys, from queries [HEADS, dp].
template <int HEADS, class Source, class T>
TORUS_INLINE void score_block(const Source* const (&keys)[kKeysPerBlock], const T* queries, int64_t head_dim,
                              int64_t dp, T* scores, int64_t ld) {
  Vec<T, kChunk> dots[HEADS][kKeysPerBlock] = {};
  for (int64_t d = 0; d < head_dim; d += kChunk) {
    Vec<T, kChunk> key[kKeysPerBlock];
    for (int i = 0; i < kKeysPerBlock; ++i) key[i] = load_chunk<Source, T>(keys[i] + d);
    for (int h = 0; h < HEADS; ++h) {
      const Vec<T, kChunk> query = load<kChunk>(queries + h * dp + d);
      for (int i = 0; i < kKeysPerBlock; ++i) dots[h][i] += query * key[i];
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int i = 0; i < kKeysPerBlock; ++i) scores[h * ld + i] = sum<T, kChunk>(dots[h][i]);
}

// sums [HEADS, dp] += weights [HEADS, ld] times a block of values.
template <int HEADS, class Source, class T>
TORUS_INLINE void add_block(const Source* const (&values)[kKeysPerBlock], const T* weights, int64_t ld,
                            int64_t head_dim, int64_t dp, T* sums) {
  for (int64_t d = 0; d < head_dim; d += kChunk) {
    Vec<T, kChunk> value[kKeysPerBlock];
    for (int i = 0; i < kKeysPerBlock; ++i) value[i] = load_chunk<Source, T>(values[i] + d);
    for (int h = 0; h < HEADS; ++h) {
      Vec<T, kChunk> total = load<kChunk>(sums + h * dp + d);
      for (int i = 0; i < kKeysPerBlock; ++i) total += weights[h * ld + i] * value[i];
      store(sums + h * dp + d, total);
    }
  }
}

// mixed [..] += weight * softmax of the first `count` keys that a stream sees.
template <class T>
void add_stream(const StreamKeys<T>& keys, int64_t count, const T* scores, T scale2, T bias2, T weight, T* logits,
                T* mixed) {
  constexpr int lanes = kLanes<T>;
  const int64_t padded = round_up(count, lanes);
  for (int64_t j = 0; j < count; ++j) logits[j] = scores[keys.place[j]] * scale2 + keys.rho_squared[j] * bias2;
  for (int64_t j = count; j < padded; ++j) logits[j] = kNegativeInfinity<T>;
  Vec<T> top = splat<Vec<T>>(kNegativeInfinity<T>), total = {};
  for (int64_t j = 0; j < padded; j += lanes) top = max_keep(top, load(logits + j));
  const Vec<T> shift = splat<Vec<T>>(max_of_lanes<T>(top));
  for (int64_t j = 0; j < padded; j += lanes) {
    const Vec<T> p = exp2<T>(load(logits + j) - shift);
    store(logits + j, p);
    total += p;
  }
  const T factor = weight / sum<T>(total);
  for (int64_t j = 0; j < count; ++j) mixed[keys.place[j]] += logits[j] * factor;
}

template <class T>
struct DecodeScratch {
  T *queries, *sums;   // [heads, Dp]
  T* state;            // [Dp]
  T *scores, *mixed;   // [heads, ld]
  T* logits;           // of one stream

  DecodeScratch(int64_t heads, int64_t dp, int64_t ld, int64_t longest, Arena& arena) {
    queries = arena.take<T>(heads * dp);
    sums = arena.take<T>(heads * dp);
    state = arena.take<T>(dp);
    scores = arena.take<T>(heads * ld);
    mixed = arena.take<T>(heads * ld);
    logits = arena.take<T>(round_up(longest, kLanes<T>));
  }
};

// Query heads [head, head + heads), which share a key/value head.
template <class T, class Source>
void decode_heads(const AttentionDecode& p, const VisibleLags<T>& visible, int64_t batch, int64_t head, int64_t heads,
                  int64_t ld, Arena arena) {
  const AttentionInputs& in = p.in;
  const int64_t dim = in.head_dim, dp = round_up(dim, kLanes<T>), newest = p.length - 1, slots = in.lattice.num_sites();
  const DecodeScratch<T> w(heads, dp, ld, visible.longest, arena);
  const int64_t oldest = in.first_key == nullptr ? 0 : max_of(0, min_of(in.first_key[batch], newest));
  const int64_t count = count_below(visible.lags, visible.count, newest - oldest + 1);
  const int64_t kv_head = head / (in.heads / in.kv_heads);
  const auto ring = [&](const Tokens& tokens) {
    const Source* data = static_cast<const Source*>(tokens.data) + batch * tokens.batch + kv_head * tokens.head;
    return Ring<Source>{data, tokens.token, slots, newest % slots};
  };
  const Ring<Source> keys = ring(in.k), values = ring(in.v);
  const Source* block[kKeysPerBlock];

  for (int64_t h = 0; h < heads; ++h) rows_of<T>(in.q, in.dtype, batch, head + h, dim).read(0, w.queries + h * dp);
  for (int64_t i = 0; i < count; i += kKeysPerBlock) {
    keys.rows(visible.lags, i, count, dim, block);
    int64_t h = 0;
    for (; h + 2 <= heads; h += 2) score_block<2>(block, w.queries + h * dp, dim, dp, w.scores + h * ld + i, ld);
    if (h < heads) score_block<1>(block, w.queries + h * dp, dim, dp, w.scores + h * ld + i, ld);
  }

  zero(w.mixed, heads * ld);
  const T scale2 = static_cast<T>(in.scale * kLog2e);
  for (int64_t h = 0; h < heads; ++h) {
    const T* const weights = parameter_at<T>(in.weights, batch, head + h);
    const T* const decay = parameter_at<T>(in.decay, 0, head + h);
    for (int s = 0; s < kNumStreams; ++s) {
      if (!in.lattice.has(s)) continue;
      const StreamKeys<T>& stream = visible.streams[s];
      add_stream(stream, count_below(stream.place, stream.count, count), w.scores + h * ld, scale2,
                 static_cast<T>(-0.5 * kLog2e) * decay[s], weights[s], w.logits, w.mixed + h * ld);
    }
  }

  zero(w.sums, heads * dp);
  for (int64_t i = 0; i < count; i += kKeysPerBlock) {
    values.rows(visible.lags, i, count, dim, block);
    int64_t h = 0;
    for (; h + 2 <= heads; h += 2) add_block<2>(block, w.mixed + h * ld + i, ld, dim, dp, w.sums + h * dp);
    if (h < heads) add_block<1>(block, w.mixed + h * ld + i, ld, dim, dp, w.sums + h * dp);
  }

  for (int64_t h = 0; h < heads; ++h) {
    T* const y = w.sums + h * dp;
    if (in.alpha.data != nullptr) {
      const T alpha = *parameter_at<T>(in.alpha, batch, head + h);
      rows_of<T>(in.state, in.dtype, batch, head + h, dim).read(0, w.state);
      for (int64_t d = 0; d < dp; ++d) y[d] = w.state[d] + alpha * (y[d] - w.state[d]);
    }
    rows_of<T>(p.out, in.dtype, batch, head + h, dim).write(0, y);
  }
}

// Multiply-adds below which waking other threads costs more than they save.
constexpr int64_t kWorthThreads = 1 << 17;

template <class T, class Source>
void decode(const AttentionDecode& p, const Runtime& runtime) {
  const AttentionInputs& in = p.in;
  const int64_t seq_len = min_of(p.length, in.lattice.num_sites());
  Arena measure;
  VisibleLags<T>(in.lattice, seq_len, measure);
  Arena arena{reinterpret_cast<uintptr_t>(runtime.allocate(measure.used, runtime.owner))};
  VisibleLags<T> visible(in.lattice, seq_len, arena);
  visible.fill(in.lattice, seq_len);

  // One unit is a key/value head with its query heads; where those are too few for the threads, a part of them.
  const int64_t group = in.heads / in.kv_heads;
  const int64_t parts = min_of(group, ceil_div(runtime.num_threads, in.batch * in.kv_heads));
  const int64_t part = ceil_div(group, parts);
  const int64_t dp = round_up(in.head_dim, kLanes<T>);
  const int64_t ld = round_up(visible.count, 64 / static_cast<int64_t>(sizeof(T)));
  Arena scratch;
  DecodeScratch<T>(part, dp, ld, visible.longest, scratch);
  const int64_t bytes = round_up(scratch.used, 4096);
  const bool alone = in.batch * in.heads * visible.count * in.head_dim < kWorthThreads;
  const uintptr_t base =
      reinterpret_cast<uintptr_t>(runtime.allocate((alone ? 1 : runtime.num_threads) * bytes, runtime.owner));
  const auto unit = [&](int64_t i, Arena mine) {
    const int64_t first = i % parts * part, kv_head = i / parts % in.kv_heads;
    if (first < group)
      decode_heads<T, Source>(p, visible, i / parts / in.kv_heads, kv_head * group + first,
                              min_of(part, group - first), ld, mine);
  };
  const int64_t units = in.batch * in.kv_heads * parts;
  if (alone)
    Solo{base}.run(units, unit);
  else
    Team{runtime, base, bytes}.run(units, unit);
}

template <class T>
void attention_decode(const AttentionDecode& p, const Runtime& runtime) {
  if constexpr (sizeof(T) == 8) {
    decode<T, T>(p, runtime);
  } else {
    switch (p.in.dtype) {
      case DType::kFloat16: return decode<T, Half>(p, runtime);
      case DType::kBFloat16: return decode<T, BFloat16>(p, runtime);
      default: return decode<T, T>(p, runtime);
    }
  }
}

}  // namespace torus::TORUS_ISA
