// Whom the CUDA kernels' schedule makes meet, against the lattice: over all blocks, tiles and rows, every visible pair
// of a stream is met exactly once, with its distance, and nothing else is; by queries and, mirrored, by keys, and both
// again in the plans of the kernels of lines and of the cross flows. Before that, the divisions that they share.
//
// Prints the number of pairs checked; the first difference ends the program with status 1.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <utility>

#include "cuda/cross_plan.h"

namespace torus::cuda {
namespace {

using Pairs = std::map<std::pair<int64_t, int64_t>, double>;  // (query, key) and squared distance

[[noreturn]] void fail(const Lattice& lattice, int64_t seq_len, int stream, const char* what) {
  std::printf("topology %d, %d x %d, winding %d, T %d, stream %d: %s\n", static_cast<int>(lattice.topology),
              static_cast<int>(lattice.n_major), static_cast<int>(lattice.n_minor), static_cast<int>(lattice.winding),
              static_cast<int>(seq_len), stream, what);
  std::exit(1);
}

Pairs visible_on_lines(const LineFamily& lines, int stream) {
  Pairs pairs;
  for (int64_t line = 0; line < lines.num_lines; ++line)
    for (int64_t i = 0; i < lines.length(line); ++i)
      for (int64_t j = 0; j < lines.length(line); ++j)
        if (lines.visible(stream, i - j))
          pairs[{lines.token(line, i), lines.token(line, j)}] = lines.rho_squared(i - j);
  return pairs;
}

Pairs visible_across(const CrossWindow& window, int64_t seq_len, int stream) {
  const Lattice& lattice = window.lattice;
  const int64_t M = lattice.n_major, m = lattice.n_minor;
  Pairs pairs;
  for (int64_t t = 0; t < seq_len; ++t)
    for (int64_t a = window.a_lo; a <= window.a_hi; ++a)
      for (int64_t b = window.b_lo; b <= window.b_hi; ++b) {
        if (!window.visible(stream, a, b)) continue;
        const int64_t u = t / m - a, v = t % m - b;
        const int64_t key = lattice.causal() ? t - a * m - b : floor_mod(u, M) * m + floor_mod(v, m);
        if (key < 0 || key >= seq_len || (lattice.topology == kCylinder && (u < 0 || u >= M))) continue;
        pairs[{t, key}] = window.rho_squared(stream, a, b);
      }
  return pairs;
}

Pairs met(const Lattice& lattice, int64_t seq_len, const Schedule& s, int stream) {
  Pairs pairs;
  for (int block = 0; block < s.num_blocks; ++block) {
    const OwnPlace own = s.own(block);
    OtherWalk walk(s, own);
    OtherPlace other{};
    while (walk.next(other)) {
      for (int warp = 0; warp < s.warps; ++warp) {
        const TablePlace at = s.table_place(own, warp, other);
        if (!s.meets(at, other)) continue;
        for (int r = 0; r < kOwnRows; ++r)
          for (int c = 0; c < other.count; ++c) {
            const int column = at.first + s.sign() * (r - c);
            if (column < 0 || column >= s.table_columns()) continue;
            const double squared = squared_distance(lattice, seq_len, s, stream, at.row, column);
            const int mine = s.own_token(own, s.own_track(own, warp), s.own_position(own, warp) + r);
            const int theirs = s.token(own, other.track, other.position + c);
            if (squared < 0 || mine == kNoToken || theirs == kNoToken) continue;
            const std::pair<int64_t, int64_t> pair(s.mirrored ? theirs : mine, s.mirrored ? mine : theirs);
            if (!pairs.emplace(pair, squared).second) fail(lattice, seq_len, stream, "a pair is met twice");
          }
      }
    }
  }
  return pairs;
}

// With a plan for lines: chunks are met in the block's stretches, and every stretch has what its warps go through.
Pairs met_on_lines(const Lattice& lattice, int64_t seq_len, const Schedule& s, const LinePlan& plan, int k) {
  const int stream = s.stream[k];
  const Reach& reach = plan.reach[k];
  Pairs pairs;
  for (int block = 0; block < s.num_blocks; ++block) {
    const OwnPlace own = s.own(block);
    const auto token_of = [&](int position) {
      return s.line_token(own.line, plan.closed ? s.by_loop.modulo(position) : position);
    };
    const auto meet = [&](int warp, int chunk) {
      for (int r = 0; r < kLineChunk; ++r)
        for (int c = 0; c < kLineChunk; ++c) {
          const int displacement = (warp - chunk) * kLineChunk + r - c, step = reach.sign * displacement;
          const int mine = s.own_token(own, own.line, s.own_position(own, warp) + r);
          const int theirs = token_of(own.position + chunk * kLineChunk + c);
          if (step < reach.min_step || step > reach.max_step || mine == kNoToken) continue;
          const double squared = squared_distance(lattice, seq_len, s, stream, 0, step - s.col_lo);
          if (squared < 0) continue;
          // A visible step to a key that there is not would go unnoticed by the kernel; queries that are not weigh nothing.
          if (theirs == kNoToken && s.mirrored) continue;
          if (theirs == kNoToken) fail(lattice, seq_len, stream, "a key beyond the line is not hidden");
          const int at = displacement - reach.min_displacement();
          if (at < 1 || at >= reach.table_size()) fail(lattice, seq_len, stream, "a displacement beyond the table");
          const std::pair<int64_t, int64_t> pair(s.mirrored ? theirs : mine, s.mirrored ? mine : theirs);
          if (!pairs.emplace(pair, squared).second)
            fail(lattice, seq_len, stream, "a pair is met twice on a line");
        }
    };
    StretchWalk walk(plan, s, own, k);
    bool first = true;
    do {
      const Chunks window = walk.window();
      if (!plan.resident && window.last - window.first >= plan.chunks) fail(lattice, seq_len, stream, "a long window");
      for (int warp = 0; warp < s.warps; ++warp) {
        if (s.own_position(own, warp) >= s.line_length(own.line)) continue;
        for (int part = 0; part < Reach::kParts; ++part) {
          const Chunks chunks = reach.part(part, warp).within(window);
          if (first && part == 0 && chunks.empty()) fail(lattice, seq_len, stream, "the own chunk does not come first");
          for (int chunk = chunks.first; chunk <= chunks.last; ++chunk) {
            if (!walk.needs(chunk)) fail(lattice, seq_len, stream, "a chunk that is not in its stretch");
            meet(warp, chunk);
          }
        }
      }
      first = false;
    } while (walk.next());
  }
  return pairs;
}

// With a plan for patches.
Pairs met_in_patches(const Lattice& lattice, int64_t seq_len, const Schedule& s, const CrossPlan& plan, int k) {
  const int stream = s.stream[k];
  Pairs pairs;
  for (int block = 0; block < plan.num_blocks; ++block) {
    const int own_column = plan.column_of(block), first_row = plan.first_row_of(block);
    for (int column = 0; column <= kMaxPatchReach; column = CrossPlan::next_column(column)) {
      const Chunks strip = plan.strip(first_row, column);
      if (strip.last - strip.first >= kStripPatches) fail(lattice, seq_len, stream, "a long strip");
      const Chunks of_stream = plan.strip(k, first_row, column);
      if (of_stream.empty()) continue;
      if (of_stream.first < strip.first || of_stream.last > strip.last)
        fail(lattice, seq_len, stream, "a strip without what one of its streams sees");
      for (int warp = 0; warp < plan.warps; ++warp) {
        const Chunks rows = plan.reach[k].rows.shifted(warp).within(of_stream);
        for (int row = rows.first; row <= rows.last; ++row)
          for (int r = 0; r < kOwnRows; ++r)
            for (int c = 0; c < kOwnRows; ++c) {
              const int u = (first_row + warp) * kPatch + r / kPatch, v = own_column * kPatch + r % kPatch;
              const int their_u = (first_row + row) * kPatch + c / kPatch;
              const int their_v = (own_column + column) * kPatch + c % kPatch;
              const int a = plan.sign * (u - their_u), b = plan.sign * (v - their_v);
              const bool exists = u < s.num_tracks && v < s.track_length;
              const int mine = exists ? s.site(u, v) : kNoToken, theirs = s.site(their_u, their_v);
              if (mine == kNoToken || a < s.row_lo || a > s.row_hi || b < s.col_lo || b > s.col_hi) continue;
              const double squared = squared_distance(lattice, seq_len, s, stream, a - s.row_lo, b - s.col_lo);
              if (squared < 0) continue;
              if (theirs == kNoToken && s.mirrored) continue;
              const std::pair<int64_t, int64_t> pair(s.mirrored ? theirs : mine, s.mirrored ? mine : theirs);
              if (theirs == kNoToken) {
                // The kernel hides what comes before token 0, where a patch may have that.
                const bool hidden = plan.in_time && first_row + row < plan.first_whole_row(own_column + column);
                if (!hidden) fail(lattice, seq_len, stream, "a key beyond the lattice is not hidden");
              } else if (!pairs.emplace(pair, squared).second) {
                fail(lattice, seq_len, stream, "a pair is met twice in patches");
              }
            }
      }
    }
  }
  return pairs;
}

int64_t check(const Lattice& lattice, int64_t seq_len) {
  int64_t count = 0;
  const auto compare = [&](const Schedule& s, int stream, const Pairs& expected) {
    if (met(lattice, seq_len, s, stream) != expected)
      fail(lattice, seq_len, stream,
           s.mirrored ? "keys meet other queries than see them" : "queries meet other keys than they see");
    count += static_cast<int64_t>(expected.size());
  };
  for (const bool mirrored : {false, true}) {
    for (int f = 0; f < kNumFamilies; ++f) {
      const LineFamily lines = line_family(lattice, static_cast<Family>(f), seq_len);
      const Schedule s = line_schedule(lattice, static_cast<Family>(f), seq_len, mirrored);
      for (int k = 0; k < s.num_streams; ++k) compare(s, s.stream[k], visible_on_lines(lines, s.stream[k]));
    }
    const Schedule s = cross_schedule(lattice, seq_len, mirrored);
    for (int k = 0; k < s.num_streams; ++k)
      compare(s, s.stream[k], visible_across(cross_window(lattice, seq_len), seq_len, s.stream[k]));
  }
  const auto compare_plan = [&](const Pairs& met, const Pairs& expected, int stream) {
    if (met != expected) fail(lattice, seq_len, stream, "others are met by a plan than are seen");
    count += static_cast<int64_t>(expected.size());
  };
  for (const bool mirrored : {false, true}) {
    for (int f = 0; f < kNumFamilies; ++f) {
      const LineFamily lines = line_family(lattice, static_cast<Family>(f), seq_len);
      const Schedule s = line_schedule(lattice, static_cast<Family>(f), seq_len, mirrored);
      for (const int chunk_bytes : {1 << 10, 1 << 30}) {  // closed lines are resident, or are not
        const LinePlan plan = line_plan(lattice, s, seq_len, chunk_bytes);
        for (int k = 0; plan.fits && k < s.num_streams; ++k)
          compare_plan(met_on_lines(lattice, seq_len, s, plan, k), visible_on_lines(lines, s.stream[k]), s.stream[k]);
      }
    }
    const Schedule s = cross_schedule(lattice, seq_len, mirrored);
    const CrossPlan plan = cross_plan(lattice, s, seq_len);
    for (int k = 0; plan.fits && k < s.num_streams; ++k)
      compare_plan(met_in_patches(lattice, seq_len, s, plan, k),
                   visible_across(cross_window(lattice, seq_len), seq_len, s.stream[k]), s.stream[k]);
  }
  return count;
}

// Division by multiplication, at and around multiples of the divisor over the whole range.
void check_divisor(int64_t value) {
  const Divisor divisor = Divisor::of(value);
  constexpr int64_t kEnd = int64_t{1} << 31;
  for (int64_t part = 0; part <= 64; ++part)
    for (int64_t near = -2; near <= 2; ++near) {
      const int64_t x = kEnd / 64 * part / value * value + near;
      if (x < -value || x >= kEnd) continue;
      const int narrow = static_cast<int>(x);
      const bool right = divisor.modulo(narrow) == floor_mod(x, value) &&
                         (x < 0 || (divisor.quotient(narrow) == x / value && divisor.remainder(narrow) == x % value));
      if (right) continue;
      std::printf("%d divided by %d is not %d\n", narrow, divisor.value, divisor.quotient(narrow));
      std::exit(1);
    }
}

}  // namespace
}  // namespace torus::cuda

int main() {
  using namespace torus;
  for (int64_t value = 1; value <= 5000; ++value) cuda::check_divisor(value);
  for (int bit = 13; bit < 31; ++bit)
    for (const int64_t near : {-1, 0, 1}) cuda::check_divisor((int64_t{1} << bit) + near);
  cuda::check_divisor((int64_t{1} << 31) - 1);
  constexpr int64_t kAll = 0xff;
  int64_t count = 0;
  // Lines longer than a block and than a tile, lattices narrower than a warp's rows, windows wider than the lattice.
  count += cuda::check({kPeriodic, 8, 6, 3, 3, 7, kAll}, 48);
  count += cuda::check({kPeriodic, 70, 5, 1, 2, 4, kAll}, 350);
  count += cuda::check({kPeriodic, 5, 40, 8, 3, 20, kAll}, 200);
  count += cuda::check({kPeriodic, 2, 2, 1, 3, 7, kAll}, 4);
  count += cuda::check({kPeriodic, 16, 32, 2, 3, 7, kAll}, 512);
  count += cuda::check({kPeriodic, 48, 16, 1, 3, 7, kAll}, 768);
  count += cuda::check({kPeriodic, 2, 300, 150, 3, 7, kAll}, 600);
  count += cuda::check({kCylinder, 48, 2, 1, 3, 7, kAll}, 96);
  count += cuda::check({kPeriodic, 20, 18, 9, 0, 3, 0b10100110}, 360);
  count += cuda::check({kCylinder, 19, 17, 2, 3, 7, kAll}, 323);
  count += cuda::check({kCylinder, 3, 33, 1, 7, 2, kAll}, 99);
  for (const int64_t seq_len : {1, 7, 50, 333}) count += cuda::check({kCausal, 9, 7, 2, 3, 7, kAll}, seq_len);
  count += cuda::check({kCausal, 3, 90, 1, 3, 50, kAll}, 400);
  count += cuda::check({kCausal, 40, 2, 1, 8, 8, kAll}, 100);
  count += cuda::check({kCylinder, 12, 14, 1, 8, 3, kAll}, 168);
  count += cuda::check({kCausal, 1000000007, 5, 3, 1, 2, kAll}, 120);
  count += cuda::check({kCausal, 4, 1000000007, 3, 1, 2, 0b01111101}, 40);
  std::printf("%lld\n", static_cast<long long>(count));
  return 0;
}
