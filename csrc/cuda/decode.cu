// Decoding: the newest token against the ring of cached keys, a pass over parts of the keys and one that joins them.
//
// The keys of a family of streams (the arcs of a loop, a spiral, the cross flows) are cut into parts, so that even one
// sequence keeps a GPU busy. A block owns a part and a key/value head, its warps the query heads of the group, which find
// the part's rows in the cache. A warp walks over them several rows at a time, and each leaves its streams' maximum,
// normaliser and weighted values; all are joined in a fixed order.
#include "rows.h"

namespace torus::cuda {

namespace {

constexpr float kNegativeInfinity = -__builtin_huge_valf();
constexpr double kLog2e = 1.4426950408889634;
constexpr int kNumDecoded = kNumFamilies + 1;  // families of lines, and the cross flows
constexpr int kMaxStreams = 2;                 // of a family
constexpr int64_t kKeysPerPart = 32;
constexpr int64_t kMaxParts = 64;  // of a family

// A key as a place in a family's list says it: how far back, and for each stream the squared distance, negative where
// it does not see the key.
struct Key {
  int64_t lag;
  float squared[kMaxStreams];
};

struct DecodedFamily {
  bool is_cross;
  LineFamily lines;
  CrossWindow window;
  int num_streams;
  int stream[kMaxStreams];
  int64_t places;             // keys, visible or not
  int64_t first_part, parts;  // of all families together
  int64_t part_length;

  TORUS_INLINE constexpr Key key(int64_t place, int64_t max_lag) const {
    Key key{-1, {-1.0f, -1.0f}};
    if (place >= places) return key;
    if (!is_cross) {
      key.lag = place * lines.stride;
      for (int s = 0; s < kMaxStreams; ++s)
        if (s < num_streams && key.lag <= max_lag && lines.visible(stream[s], place))
          key.squared[s] = static_cast<float>(lines.rho_squared(place));
      return key;
    }
    const int64_t width = window.b_hi - window.b_lo + 1;
    const int64_t a = window.a_lo + place / width, b = window.b_lo + place % width;
    key.lag = a * window.lattice.n_minor + b;
    for (int s = 0; s < kMaxStreams; ++s)
      if (s < num_streams && key.lag <= max_lag && window.visible(stream[s], a, b))
        key.squared[s] = static_cast<float>(window.rho_squared(stream[s], a, b));
    return key;
  }
};

// Softmaxes of a lane's rows that are still being summed: maximum, normaliser and values weighted by the exponentials.
struct Softmax {
  Lane<float> maximum, total;
  Elements values;

  TORUS_DEVICE Softmax() : maximum(kNegativeInfinity), total(0.0f) {
TORUS_UNROLL
    for (int i = 0; i < kElements; ++i) values[i] = 0.0f;
  }

  // Where `there`, with another: one key has its score for a maximum, and 1 for a normaliser.
  TORUS_DEVICE void join(const Lane<float>& other, const Lane<float>& other_total, const Elements& other_values,
                         const Lane<bool>& there) {
    const Lane<float> highest = select(there, max_of_floats(maximum, other), maximum);
    const Lane<float> from = select(highest == Lane<float>(kNegativeInfinity), Lane<float>(0.0f), highest);
    const Lane<float> kept = exp2_of(maximum - from), added = exp2_of(other - from);
    maximum = highest;
    total = total * kept + select(there, other_total * added, 0.0f);
TORUS_UNROLL
    for (int i = 0; i < kElements; ++i)
      values[i] = values[i] * kept + select(there, other_values[i] * added, 0.0f);
  }

  // Of all rows that lie side by side in the warp.
  TORUS_DEVICE void join_rows(const RowLanes& lanes) {
    for (int mask = lanes.lanes(); mask < kWarpLanes; mask *= 2) {
      Elements others;
TORUS_UNROLL
      for (int i = 0; i < kElements; ++i) others[i] = shuffle_xor(values[i], mask);
      join(shuffle_xor(maximum, mask), shuffle_xor(total, mask), others, true);
    }
  }
};

struct DecodeArguments {
  DecodedFamily families[kNumDecoded];
  int num_families;
  int64_t parts;  // of all families
  RowLanes lanes;
  AttentionInputs in;
  Tokens out;
  int64_t written, newest, newest_slot;  // slots that hold a token; the query's position, and where its key is
  float* sums;    // [B, H, parts, kMaxStreams, 2]: maximum in base 2, normaliser
  float* values;  // [B, H, parts, kMaxStreams, D]

  TORUS_INLINE constexpr int64_t place(int64_t batch, int64_t head, int64_t part, int stream) const {
    return ((batch * in.heads + head) * parts + part) * kMaxStreams + stream;
  }
};

template <class T>
TORUS_INLINE constexpr const T* row_of(const Tokens& x, int64_t batch, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head;
}
TORUS_INLINE constexpr const float* parameter_of(const Parameter& p, int64_t batch, int64_t head) {
  return static_cast<const float*>(p.data) + batch * p.batch + head * p.head;
}

template <class E>
struct DecodeKernel {
  using Arguments = DecodeArguments;
  static constexpr const char* kName = "attention_decode";
  static constexpr int kMaxWarps = 8;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const AttentionInputs& in = a.in;
    const int64_t part = warp.block_x() % a.parts, batch = warp.block_x() / a.parts / in.kv_heads;
    const int64_t kv_head = warp.block_x() / a.parts % in.kv_heads, group = in.heads / in.kv_heads;
    int f = 0;
    while (f + 1 < a.num_families && part >= a.families[f + 1].first_part) ++f;
    const DecodedFamily& family = a.families[f];
    const int64_t first = (part - family.first_part) * family.part_length;
    const int64_t end = min_of(first + family.part_length, family.places);
    int64_t max_lag = a.written - 1;
    if (in.first_key != nullptr) max_lag = min_of(max_lag, a.newest - max_of(0, min_of(in.first_key[batch], a.newest)));
    for (int64_t member = warp.index(); member < group; member += warp.count())
      decode_part(a, family, batch, kv_head * group + member, kv_head, first, end, part, max_lag);
  }

 private:
  static TORUS_DEVICE void decode_part(const Arguments& a, const DecodedFamily& family, int64_t batch, int64_t head,
                                       int64_t kv_head, int64_t first, int64_t end, int64_t part, int64_t max_lag) {
    const AttentionInputs& in = a.in;
    const RowLanes& lanes = a.lanes;
    const Lane<int64_t> column = cast<int64_t>(lanes.column());
    const float scale2 = static_cast<float>(in.scale * kLog2e);
    Elements query = load_elements(row_of<E>(in.q, batch, head), column, lanes.in_row());
TORUS_UNROLL
    for (int i = 0; i < kElements; ++i) query[i] = query[i] * scale2;
    float slope[kMaxStreams];
    for (int s = 0; s < kMaxStreams; ++s)
      slope[s] = static_cast<float>(-0.5 * kLog2e) * parameter_of(in.decay, 0, head)[family.stream[s]];

    Softmax softmax[kMaxStreams];
    for (int64_t place = first; place < end; place += lanes.rows()) {
      const Lane<int64_t> places = cast<int64_t>(lanes.row()) + place;
      const Lane<Key> key = map([&](int64_t at) { return family.key(at < end ? at : family.places, max_lag); }, places);
      const Lane<bool> seen = map([](const Key& k) { return k.squared[0] >= 0.0f || k.squared[1] >= 0.0f; }, key);
      const Lane<int64_t> slot = map(
          [&](const Key& k) { return a.newest_slot - k.lag + (k.lag <= a.newest_slot ? 0 : in.lattice.num_sites()); },
          key);
      const Lane<bool> there = seen && lanes.in_row();
      const Elements keys =
          load_elements(row_of<E>(in.k, batch, kv_head), slot * Lane<int64_t>(in.k.token) + column, there);
      const Elements values =
          load_elements(row_of<E>(in.v, batch, kv_head), slot * Lane<int64_t>(in.v.token) + column, there);
      Lane<float> score = 0.0f;
TORUS_UNROLL
      for (int i = 0; i < kElements; ++i) score = score + query[i] * keys[i];
      score = lanes.sum(score);
TORUS_UNROLL
      for (int s = 0; s < kMaxStreams; ++s) {
        const Lane<float> squared = map([s](const Key& k) { return k.squared[s]; }, key);
        softmax[s].join(score + squared * slope[s], 1.0f, values, squared >= Lane<float>(0.0f));
      }
    }
TORUS_UNROLL
    for (int s = 0; s < kMaxStreams; ++s) {
      if (s >= family.num_streams) continue;
      softmax[s].join_rows(lanes);
      const int64_t place = a.place(batch, head, part, s);
      store(a.sums, Lane<int64_t>(2 * place), softmax[s].maximum, lane_index() == 0);
      store(a.sums, Lane<int64_t>(2 * place + 1), softmax[s].total, lane_index() == 0);
      store_elements(a.values, place * in.head_dim + column, softmax[s].values, lanes.row() == 0 && lanes.in_row());
    }
  }
};

// A warp for each query head: the parts of all streams, their mixing and compounding.
template <class E>
struct JoinKernel {
  using Arguments = DecodeArguments;
  static constexpr const char* kName = "attention_decode_join";
  static constexpr int kMaxWarps = 1;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    const AttentionInputs& in = a.in;
    const RowLanes& lanes = a.lanes;
    const int64_t batch = warp.block_x() / in.heads, head = warp.block_x() % in.heads;
    const Lane<int64_t> column = cast<int64_t>(lanes.column());
    const Lane<bool> first_row = lanes.row() == 0 && lanes.in_row();
    Elements y;
    for (int i = 0; i < kElements; ++i) y[i] = 0.0f;
    for (int f = 0; f < a.num_families; ++f) {
      const DecodedFamily& family = a.families[f];
      for (int s = 0; s < family.num_streams; ++s) {
        Softmax softmax;
        for (int64_t part = 0; part < family.parts; part += lanes.rows()) {
          const Lane<int64_t> parts = cast<int64_t>(lanes.row()) + part;
          const Lane<bool> exists = parts < Lane<int64_t>(family.parts);
          const Lane<int64_t> place = parts * int64_t{kMaxStreams} + a.place(batch, head, family.first_part, s);
          const Lane<float> maximum = load(a.sums, place * int64_t{2}, exists, kNegativeInfinity);
          const Lane<float> total = load(a.sums, place * int64_t{2} + int64_t{1}, exists, 0.0f);
          softmax.join(maximum, total,
                       load_elements(a.values, place * Lane<int64_t>(in.head_dim) + column, exists && lanes.in_row()),
                       exists);
        }
        softmax.join_rows(lanes);
        const float weight = parameter_of(in.weights, batch, head)[family.stream[s]];
TORUS_UNROLL
        for (int i = 0; i < kElements; ++i) y[i] = y[i] + softmax.values[i] / softmax.total * weight;
      }
    }
    if (in.state.data != nullptr) {
      const float alpha = *parameter_of(in.alpha, batch, head);
      const Elements state = load_elements(row_of<E>(in.state, batch, head), column, first_row);
TORUS_UNROLL
      for (int i = 0; i < kElements; ++i) y[i] = state[i] + alpha * (y[i] - state[i]);
    }
    E* const out = static_cast<E*>(a.out.data) + batch * a.out.batch + head * a.out.head;
    store_elements(out, column, y, first_row);
  }
};

// Families with a stream that takes part, their places and parts.
void plan(DecodeArguments& a) {
  const Lattice& lattice = a.in.lattice;
  const auto take = [&](DecodedFamily family, int first_stream, int num_streams, int64_t places) {
    for (int s = first_stream; s < first_stream + num_streams; ++s)
      if (lattice.has(s)) family.stream[family.num_streams++] = s;
    if (family.num_streams == 0) return;
    family.places = places;
    family.part_length = max_of(kKeysPerPart, ceil_div(places, kMaxParts));
    family.first_part = a.parts, family.parts = ceil_div(places, family.part_length);
    a.parts += family.parts;
    a.families[a.num_families++] = family;
  };
  for (int f = 0; f < kNumFamilies; ++f) {
    DecodedFamily family{};
    family.lines = line_family(lattice, static_cast<Family>(f), a.written);
    take(family, family.lines.first_stream, family.lines.num_streams, family.lines.max_step + 1);
  }
  DecodedFamily cross{};
  cross.is_cross = true;
  cross.window = cross_window(lattice, a.written);
  take(cross, kCrossUToV, 2,
       (cross.window.a_hi - cross.window.a_lo + 1) * (cross.window.b_hi - cross.window.b_lo + 1));
}

template <class E>
void decode(const DecodeArguments& a, const Device& device) {
  const AttentionInputs& in = a.in;
  const int warps = static_cast<int>(min_of(DecodeKernel<E>::kMaxWarps, in.heads / in.kv_heads));
  launch<DecodeKernel<E>>({in.batch * in.kv_heads * a.parts}, warps, 0, device, a);
  launch<JoinKernel<E>>({in.batch * in.heads}, 1, 0, device, a);
}

}  // namespace

void attention_decode(const AttentionDecode& problem, const Device& device) {
  DecodeArguments a{};
  a.in = problem.in, a.out = problem.out;
  a.lanes = RowLanes::of(a.in.head_dim);
  const int64_t slots = a.in.lattice.num_sites();
  a.written = min_of(problem.length, slots);
  a.newest = problem.length - 1, a.newest_slot = a.newest % slots;
  plan(a);
  const auto allocate = [&](int64_t count) {
    return static_cast<float*>(device.allocate(count * static_cast<int64_t>(sizeof(float)), device.owner));
  };
  const int64_t places = a.place(a.in.batch, 0, 0, 0);
  a.sums = allocate(places * 2), a.values = allocate(places * a.in.head_dim);
  if (a.in.dtype == DType::kBFloat16) {
    decode<BFloat16>(a, device);
  } else if (a.in.dtype == DType::kFloat16) {
    decode<Float16>(a, device);
  } else {
    throw std::runtime_error("the CUDA kernels take float16 and bfloat16");
  }
}

}  // namespace torus::cuda
