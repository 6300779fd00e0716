// Who meets whom: the cut of a family of lines, or of the lattice under the cross flows, into blocks of own rows and
// the tiles of other rows that each block walks over. Own rows are queries and the others keys, or the other way round
// where the schedule is mirrored. Positions are 32-bit: no sequence has more than kMaxTokens tokens.
//
// Both kinds of streams have one form. A row lies at a position of a track: of a line, or, for the cross flows, at a
// column of a lattice row. What a stream thinks of a pair is a function of two displacements, of track and of position,
// which `squared_distance` says. Between sixteen own rows, one after another, and a tile of others the displacement of
// tracks is one number, and that of positions a difference of indices.
#pragma once

#include "../lattice.h"
#include "divisor.h"
#include "kernels.h"

namespace torus::cuda {

constexpr int kOwnRows = 16;    // of a warp
constexpr int kOtherRows = 32;  // of a tile
constexpr int kMaxWarps = 4;
constexpr int kMaxStreams = 2;
constexpr int kNoToken = -1;

// Own rows of a block: warp w has kOwnRows from `position` + w * position_step of track `track` + w * track_step.
struct OwnPlace {
  int track, position;
  int line;  // of a family; 0 for the cross flows
};

// A tile of others.
struct OtherPlace {
  int track, position, count;
};

// Where the table has the displacements of sixteen own rows from a tile: of own row r and other row c it is column
// first + sign * (r - c) of `row`; there is nothing beyond its columns.
struct TablePlace {
  int row, first;
};

struct Schedule {
  bool is_cross, mirrored;
  Topology topology;
  int seq_len, n_major, n_minor, winding;  // axes no longer than matters
  Family family;
  int loop, stride;
  int num_tracks;                // lines, or lattice rows
  int track_length;              // of the longest line, or columns of a lattice row
  int row_lo, row_hi;            // displacements of tracks; 0 for lines
  int col_lo, col_hi;            // displacements of positions
  int half_width_radii[kMaxStreams][2];  // of the cross flows that take part, (u, v)
  int num_streams;
  int stream[kMaxStreams];       // that take part
  int warps;                     // of a block
  int blocks_per_line;           // or blocks across the lattice
  int num_blocks;
  Divisor by_major, by_minor, by_loop, by_blocks;  // n_major, n_minor, loop, blocks_per_line

  TORUS_INLINE constexpr int sign() const { return mirrored ? -1 : 1; }
  TORUS_INLINE constexpr int table_columns() const { return col_hi - col_lo + 1; }
  TORUS_INLINE constexpr int table_rows() const { return row_hi - row_lo + 1; }
  TORUS_INLINE constexpr int64_t table_size() const { return int64_t{1} * table_rows() * table_columns(); }

  TORUS_INLINE constexpr OwnPlace own(int block) const {
    const int line = by_blocks.quotient(block), part = block - line * blocks_per_line;
    if (is_cross) return {line * warps, part * kOwnRows, 0};
    return {0, part * warps * kOwnRows, line};
  }
  TORUS_INLINE constexpr int own_track(const OwnPlace& own, int warp) const {
    return is_cross ? own.track + warp : own.track;
  }
  TORUS_INLINE constexpr int own_position(const OwnPlace& own, int warp) const {
    return is_cross ? own.position : own.position + warp * kOwnRows;
  }

  TORUS_INLINE constexpr int line_length(int line) const {
    return topology == kCausal ? (seq_len - line + stride - 1) / stride : loop;
  }

  // Token at a position of a track, or kNoToken. The cross flows' tracks and positions wrap where the lattice does.
  TORUS_INLINE constexpr int token(const OwnPlace& own, int track, int position) const {
    return is_cross ? site(track, position) : line_token(own.line, position);
  }
  // The same for an own row, which no wrapping reaches twice.
  TORUS_INLINE constexpr int own_token(const OwnPlace& own, int track, int position) const {
    if (is_cross && (track >= num_tracks || position >= track_length)) return kNoToken;
    return token(own, track, position);
  }

  TORUS_INLINE constexpr int line_token(int line, int i) const {
    if (i < 0 || i >= line_length(line)) return kNoToken;
    if (topology == kCausal) return line + i * stride;
    switch (family) {
      case kMajor: return i * n_minor + line;
      case kMinor: return line * n_minor + i;
      case kClockwise: return i * n_minor + by_minor.remainder(line + winding * i);
      default: return i * n_minor + by_minor.modulo(line - winding * i);
    }
  }

  TORUS_INLINE constexpr int site(int u, int v) const {
    if (topology == kCausal) {
      const int64_t token = int64_t{u} * n_minor + v;
      return token >= 0 && token < seq_len ? static_cast<int>(token) : kNoToken;
    }
    if (topology == kCylinder && (u < 0 || u >= n_major)) return kNoToken;
    return by_major.modulo(u) * n_minor + by_minor.modulo(v);
  }

  // Columns of the table that streams have in a row of it: [-half_width, half_width] at most, -1 where none.
  TORUS_INLINE constexpr int half_width(int row) const {
    int widest = -1;
    for (int s = 0; s < num_streams; ++s)
      if ((row < 0 ? -row : row) <= half_width_radii[s][0])
        widest = widest > half_width_radii[s][1] ? widest : half_width_radii[s][1];
    return widest;
  }

  TORUS_INLINE constexpr TablePlace table_place(const OwnPlace& own, int warp, const OtherPlace& other) const {
    return {sign() * (own_track(own, warp) - other.track) - row_lo,
            sign() * (own_position(own, warp) - other.position) - col_lo};
  }
  // Whether own rows of a warp may see anything of a tile.
  TORUS_INLINE constexpr bool meets(const TablePlace& at, const OtherPlace& other) const {
    if (at.row < 0 || at.row >= table_rows()) return false;
    const int a = at.first - (other.count - 1), b = at.first + kOwnRows - 1;
    const int c = at.first - (kOwnRows - 1), d = at.first + other.count - 1;
    const int lowest = mirrored ? c : a, highest = mirrored ? d : b;
    return highest >= 0 && lowest < table_columns();
  }
};

// Visits the tiles of a block in order.
struct OtherWalk {
  const Schedule& schedule;
  const OwnPlace own;
  int track, last_track;
  int position, end;  // of the current track

  TORUS_INLINE constexpr OtherWalk(const Schedule& schedule, const OwnPlace& own)
      : schedule(schedule), own(own), track(0), last_track(0), position(0), end(0) {
    const Schedule& s = schedule;
    if (s.is_cross) {
      // Behind a query lie keys at displacements row_lo ... row_hi; before a key queries.
      track = own.track + (s.mirrored ? s.row_lo : -s.row_hi);
      last_track = own.track + s.warps - 1 + (s.mirrored ? s.row_hi : -s.row_lo);
      enter_track();
    } else {
      const int length = s.line_length(own.line);
      const int first = own.position, last = minimum(length, own.position + s.warps * kOwnRows) - 1;
      position = maximum(0, s.mirrored ? first + s.col_lo : first - s.col_hi);
      end = first > last ? position : minimum(length, 1 + (s.mirrored ? last + s.col_hi : last - s.col_lo));
    }
  }

  // The next tile; false where there is none.
  TORUS_INLINE constexpr bool next(OtherPlace& tile) {
    while (position >= end) {
      if (track >= last_track) return false;
      ++track;
      enter_track();
    }
    tile = {track, position, minimum(kOtherRows, end - position)};
    position += kOtherRows;
    return true;
  }

 private:
  static TORUS_INLINE constexpr int minimum(int a, int b) { return a < b ? a : b; }
  static TORUS_INLINE constexpr int maximum(int a, int b) { return a > b ? a : b; }

  TORUS_INLINE constexpr void enter_track() {
    const Schedule& s = schedule;
    position = end = 0;
    if (!s.is_cross || (s.topology == kCylinder && (track < 0 || track >= s.n_major))) return;
    int width = -1;
    for (int warp = 0; warp < s.warps; ++warp) {
      const int row = s.sign() * (own.track + warp - track);
      if (own.track + warp < s.num_tracks && row >= s.row_lo && row <= s.row_hi)
        width = maximum(width, s.half_width(row));
    }
    if (width < 0) return;
    const int lo = maximum(s.col_lo, -width), hi = minimum(s.col_hi, width);
    const int last = minimum(own.position + kOwnRows, s.track_length) - 1;
    position = s.mirrored ? own.position + lo : own.position - hi;
    end = 1 + (s.mirrored ? last + hi : last - lo);
    if (s.topology != kCausal) return;
    // Tokens of a track follow one another beyond its ends.
    const int64_t start = int64_t{track} * s.n_minor;
    position = static_cast<int>(max_of(position, -start));
    end = static_cast<int>(min_of(end, s.seq_len - start));
  }
};

// `streams` of a family or of the cross flows that take part, from `first`.
TORUS_INLINE constexpr void take_streams(Schedule& schedule, const Lattice& lattice, int first, int count) {
  schedule.num_streams = 0;
  for (int s = first; s < first + count; ++s)
    if (lattice.has(s)) schedule.stream[schedule.num_streams++] = s;
}

TORUS_INLINE constexpr Schedule schedule_of(const Lattice& lattice, int64_t seq_len, bool mirrored) {
  Schedule s{};
  s.mirrored = mirrored;
  s.topology = lattice.topology;
  s.seq_len = static_cast<int>(seq_len);
  // Beyond the sequence nothing is seen, however long an axis is.
  s.n_major = static_cast<int>(min_of(lattice.n_major, 2 * kMaxTokens - 1));
  s.n_minor = static_cast<int>(min_of(lattice.n_minor, 2 * kMaxTokens - 1));
  s.winding = static_cast<int>(min_of(lattice.winding, 2 * kMaxTokens - 1));
  s.by_major = Divisor::of(s.n_major), s.by_minor = Divisor::of(s.n_minor);
  return s;
}

TORUS_INLINE constexpr Schedule line_schedule(const Lattice& lattice, Family family, int64_t seq_len, bool mirrored) {
  const LineFamily lines = line_family(lattice, family, seq_len);
  Schedule s = schedule_of(lattice, seq_len, mirrored);
  s.family = family;
  take_streams(s, lattice, lines.first_stream, lines.num_streams);
  s.loop = static_cast<int>(min_of(lines.loop, 2 * kMaxTokens - 1));
  s.stride = static_cast<int>(min_of(lines.stride, seq_len));
  s.num_tracks = static_cast<int>(lines.num_lines);
  s.track_length = static_cast<int>(lines.length(0));
  s.col_lo = static_cast<int>(lines.min_step);
  s.col_hi = static_cast<int>(lines.max_step);
  s.warps = static_cast<int>(min_of(kMaxWarps, ceil_div(s.track_length, kOwnRows)));
  s.blocks_per_line = static_cast<int>(ceil_div(s.track_length, s.warps * kOwnRows));
  s.num_blocks = s.num_tracks * s.blocks_per_line;
  s.by_loop = Divisor::of(s.loop), s.by_blocks = Divisor::of(s.blocks_per_line);
  return s;
}

TORUS_INLINE constexpr Schedule cross_schedule(const Lattice& lattice, int64_t seq_len, bool mirrored) {
  const CrossWindow window = cross_window(lattice, seq_len);
  Schedule s = schedule_of(lattice, seq_len, mirrored);
  s.is_cross = true;
  take_streams(s, lattice, kCrossUToV, 2);
  s.row_lo = static_cast<int>(window.a_lo), s.row_hi = static_cast<int>(window.a_hi);
  s.col_lo = static_cast<int>(window.b_lo), s.col_hi = static_cast<int>(window.b_hi);
  for (int k = 0; k < s.num_streams; ++k) {
    s.half_width_radii[k][0] = static_cast<int>(min_of(window.radius_u(s.stream[k]), kMaxTokens));
    s.half_width_radii[k][1] = static_cast<int>(min_of(window.radius_v(s.stream[k]), kMaxTokens));
  }
  const bool causal = lattice.causal();
  s.num_tracks = causal ? static_cast<int>(ceil_div(seq_len, lattice.n_minor)) : s.n_major;
  s.track_length = causal ? static_cast<int>(min_of(lattice.n_minor, seq_len)) : s.n_minor;
  s.warps = static_cast<int>(min_of(kMaxWarps, s.num_tracks));
  s.blocks_per_line = static_cast<int>(ceil_div(s.track_length, kOwnRows));
  s.num_blocks = static_cast<int>(ceil_div(s.num_tracks, s.warps)) * s.blocks_per_line;
  s.by_blocks = Divisor::of(s.blocks_per_line);
  return s;
}

// Squared distance for one of the schedule's streams at a row and column of its table, negative where nothing is seen.
TORUS_INLINE constexpr double squared_distance(const Lattice& lattice, int64_t seq_len, const Schedule& s, int stream,
                                               int64_t row, int64_t column) {
  if (s.is_cross) {
    const CrossWindow window = cross_window(lattice, seq_len);
    const int64_t a = row + s.row_lo, b = column + s.col_lo;
    return window.visible(stream, a, b) ? window.rho_squared(stream, a, b) : -1.0;
  }
  const LineFamily lines = line_family(lattice, s.family, seq_len);
  const int64_t step = column + s.col_lo;
  return lines.visible(stream, step) ? lines.rho_squared(step) : -1.0;
}

}  // namespace torus::cuda
