// The CUDA kernels' primitives: matrix fragments against the tables of the PTX ISA ("Matrix Fragments for
// mma.m16n8k16 with floating point type") and of CUTLASS (mma_traits_sm80.hpp, SM80_16x8x16), and, where the
// kernels are emulated, the faults that shared memory reports. Compiled by a C++ compiler, or by nvcc for the GPU
// at hand.
//
// Prints a line for every check; the first that fails ends the program with status 1.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/fragment.h"
#include "cuda/launch.h"

namespace torus::cuda {
namespace {

void require(bool holds, const std::string& what) {
  std::printf("%s: %s\n", holds ? "holds" : "FAILS", what.c_str());
  if (!holds) std::exit(1);
}

template <class T>
T* allocate(int count) {
#if defined(__CUDACC__)
  void* data = nullptr;
  require(cudaMallocManaged(&data, count * sizeof(T)) == cudaSuccess, "managed memory");
  return static_cast<T*>(data);
#else
  return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
#endif
}
void wait() {
#if defined(__CUDACC__)
  require(cudaDeviceSynchronize() == cudaSuccess, "the kernel has run");
#endif
}

constexpr int kTileRows = 32;
enum Fragment { kLeft, kOfRows, kOfDepth, kFragments };

// Copies a tile [32, D] into shared memory, and writes out every fragment whose corner is (row0, col0), register by
// register, then left * (two fragments of rows) and left * (two of depth), value by value. Left fragments are those of
// a Tile, right ones of T.
template <class T>
struct FragmentKernel {
  using E = typename T::Element;
  static constexpr int D = T::kWidth;
  struct Arguments {
    const E* tile;
    int row0, col0;
    uint32_t* registers;  // [kFragments, 4, 32]
    float* products;      // [2, 2, 4, 32]
  };
  static constexpr const char* kName = "fragments";
  static constexpr int kMaxWarps = 1;

  static TORUS_DEVICE void run(const Warp& warp, const Arguments& a) {
    using Plain = Tile<E, D>;
    const T tile{warp.template shared<E>(0, T::bytes(kTileRows) / static_cast<int>(sizeof(E)))};
    const Plain plain{warp.template shared<E>(T::bytes(kTileRows), kTileRows * D)};
    for (int item = 0; item < kTileRows * T::kChunks; item += kWarpLanes) {
      const Lane<int> at = lane_index() + item, row = at / T::kChunks, chunk = at % T::kChunks;
      const Lane<const E*> from = map([&](int element) { return a.tile + element; }, at * T::kChunk);
      copy_async(tile.data, T::at(row, chunk), from, true);
      copy_async(plain.data, Plain::at(row, chunk), from, true);
    }
    warp.commit_copies();
    warp.template wait_copies<0>();
    warp.barrier();

    const Left<E> left = plain.left(a.row0, a.col0);
    Right<E> of_rows[2], of_depth[2];
    tile.right_of_rows(a.row0, a.col0, of_rows);
    tile.right_of_depth(a.row0, a.col0, of_depth);
    for (int r = 0; r < 4; ++r) {
      write(a.registers, kLeft * 4 + r, left.reg[r]);
      write(a.registers, kOfRows * 4 + r, of_rows[r / 2].reg[r % 2]);
      write(a.registers, kOfDepth * 4 + r, of_depth[r / 2].reg[r % 2]);
    }
    for (int column = 0; column < 2; ++column) {
      Sum sums[2] = {zero_sum()};
      multiply(sums[0], left, of_rows[column]);
      multiply(sums[1], left, of_depth[column], sums[0]);
      for (int i = 0; i < 4; ++i)
        for (int s = 0; s < 2; ++s) write(a.products, (s * 2 + column) * 4 + i, sums[s].value[i]);
    }
  }
  template <class Value>
  static TORUS_DEVICE void write(Value* to, int row, const Lane<Value>& value) {
    store(to, cast<int64_t>(lane_index() + row * kWarpLanes), value, true);
  }
};

// Row and column of element i (two in a register) of a lane, as the PTX ISA states them.
struct Place {
  int row, column;
  bool operator==(const Place&) const = default;
};
Place ptx_a(int lane, int i) { return {lane / 4 + (i % 4 < 2 ? 0 : 8), lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8)}; }
Place ptx_b(int lane, int i) { return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane / 4}; }
Place ptx_c(int lane, int i) { return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1)}; }

// As CUTLASS's layouts state them: offsets of the lane, (4, 8), and of the value, binary digit by digit, in a matrix
// that is stored by columns: A [16, 16] as (m, k), B [8, 16] as (n, k), C [16, 8] as (m, n).
Place cutlass(int lane, int i, int outer, int inner, std::vector<int> of_value, int rows) {
  int offset = lane % 4 * outer + lane / 4 * inner;
  for (size_t digit = 0; digit < of_value.size(); ++digit) offset += (i >> digit & 1) * of_value[digit];
  return {offset % rows, offset / rows};
}
void check_tables() {
  bool agree = true;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int i = 0; i < 8; ++i) agree &= ptx_a(lane, i) == cutlass(lane, i, 32, 1, {16, 8, 128}, 16);
    for (int i = 0; i < 4; ++i) {
      const Place b = cutlass(lane, i, 16, 1, {8, 64}, 8);
      agree &= ptx_b(lane, i) == Place{b.column, b.row};
      agree &= ptx_c(lane, i) == cutlass(lane, i, 32, 1, {16, 8}, 16);
    }
  }
  require(agree, "the PTX ISA and CUTLASS state the same layouts");
}

// An integer of at most 8 bits in E: exact, and not by the conversion that is under test.
template <class E>
uint16_t bits_of_integer(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::is_same_v<E, BFloat16> || x == 0) return static_cast<uint16_t>(bits >> 16);
  const uint32_t sign = bits >> 16 & 0x8000, exponent = (bits >> 23 & 0xff) - (127 - 15), fraction = bits >> 13 & 0x3ff;
  return static_cast<uint16_t>(sign | exponent << 10 | fraction);
}

template <class T>
void check_fragments(const char* name) {
  using E = typename T::Element;
  constexpr int D = T::kWidth;
  using Kernel = FragmentKernel<T>;
  uint16_t* const tile = allocate<uint16_t>(kTileRows * D);
  // Integers up to 256 are exact in both types, and sums of products below 2^24 in float32.
  const auto value = [](int row, int column) { return static_cast<float>((row * 37 + column * 11) % 257 - 128); };
  for (int row = 0; row < kTileRows; ++row)
    for (int column = 0; column < D; ++column) tile[row * D + column] = bits_of_integer<E>(value(row, column));
  uint32_t* const registers = allocate<uint32_t>(kFragments * 4 * kWarpLanes);
  float* const products = allocate<float>(16 * kWarpLanes);
  bool loads = true, multiplies = true;
  for (int row0 = 0; row0 < kTileRows; row0 += 16)
    for (int col0 = 0; col0 < D; col0 += 16) {
      launch<Kernel>({1}, 1, T::bytes(kTileRows) + Tile<E, D>::bytes(kTileRows), Device{},
                     {reinterpret_cast<const E*>(tile), row0, col0, registers, products});
      wait();
      const auto element = [&](int fragment, int lane, int i) {
        return static_cast<uint16_t>(registers[(fragment * 4 + i / 2) * kWarpLanes + lane] >> 16 * (i % 2));
      };
      const auto stored = [&](int row, int column) { return tile[(row0 + row) * D + col0 + column]; };
      for (int lane = 0; lane < kWarpLanes; ++lane) {
        for (int i = 0; i < 8; ++i) {
          const Place a = ptx_a(lane, i), b = ptx_b(lane, i % 4);
          const int second = i / 4 * 8;  // columns of the second right operand
          loads &= element(kLeft, lane, i) == stored(a.row, a.column);
          loads &= element(kOfRows, lane, i) == stored(second + b.column, b.row);
          loads &= element(kOfDepth, lane, i) == stored(b.row, second + b.column);
        }
        for (int column = 0; column < 2; ++column)
          for (int i = 0; i < 4; ++i) {
            const Place c = ptx_c(lane, i);
            float of_rows = 0, of_depth = 0;
            for (int k = 0; k < 16; ++k) {
              const float left = value(row0 + c.row, col0 + k);
              of_rows += left * value(row0 + 8 * column + c.column, col0 + k);
              of_depth += left * value(row0 + k, col0 + 8 * column + c.column);
            }
            multiplies &= products[column * 4 * kWarpLanes + i * kWarpLanes + lane] == of_rows;
            multiplies &= products[(2 + column) * 4 * kWarpLanes + i * kWarpLanes + lane] == of_rows + of_depth;
          }
      }
    }
  require(loads, std::string("fragments of a tile, ") + name + ", D = " + std::to_string(D));
  require(multiplies, std::string("products of fragments, ") + name + ", D = " + std::to_string(D));
}

// Rounding of pairs of floats to E and back.
template <class E>
struct RoundKernel {
  struct Arguments {
    const float* from;
    uint32_t* to;
  };
  static constexpr const char* kName = "round";
  static constexpr int kMaxWarps = 1;
  static TORUS_DEVICE void run(const Warp&, const Arguments& a) {
    const Lane<int64_t> at = cast<int64_t>(lane_index());
    store(a.to, at, map([](float x, float y) { return pack_pair<E>(x, y); }, load(a.from, at), load(a.from, at)), true);
  }
};

template <class E>
void check_rounding(const char* name, std::vector<std::pair<float, uint16_t>> cases) {
  float* const from = allocate<float>(kWarpLanes);
  uint32_t* const to = allocate<uint32_t>(kWarpLanes);
  for (int i = 0; i < kWarpLanes; ++i) from[i] = cases[i % cases.size()].first;
  launch<RoundKernel<E>>({1}, 1, 0, Device{}, {from, to});
  wait();
  bool right = true;
  for (size_t i = 0; i < cases.size(); ++i) right &= to[i] == (uint32_t{cases[i].second} << 16 | cases[i].second);
  require(right, std::string("rounding to ") + name);
}

#if !defined(__CUDACC__)

struct FaultKernel {
  using Body = void (*)(const Warp&);
  struct Arguments {
    Body body;
  };
  static constexpr const char* kName = "fault";
  static constexpr int kMaxWarps = 2;
  static void run(const Warp& warp, const Arguments& a) { a.body(warp); }
};

void check_fault(FaultKernel::Body body, const char* expected) {
  std::string message = "nothing was reported";
  try {
    launch<FaultKernel>({1}, 2, 256, Device{}, {body});
  } catch (const std::exception& error) {
    message = error.what();
  }
  const char* const where = "kernel fault (grid 1 x 1 x 1, 2 warps a block, 256 bytes of shared memory): ";
  require(message.find(expected) != std::string::npos && message.find(where) == 0,
          std::string("a fault is reported: ") + expected + " [" + message + "]");
}

alignas(16) const float kZeros[4] = {};
Shared<float> words(const Warp& warp) { return warp.shared<float>(0, 64); }
void write_own(const Warp& warp) { words(warp).store(lane_index() + warp.index() * 32, 1.0f, true); }
void read_next(const Warp& warp) { words(warp).load((lane_index() + warp.index() * 32 + 1) % 64); }
void copy_first(const Warp& warp) {
  if (warp.index() == 0) words(warp).copy_async(0, 0, kZeros);
}

void check_faults() {
  const auto sound = [](const Warp& warp) { write_own(warp), warp.barrier(), read_next(warp); };
  launch<FaultKernel>({1}, 2, 256, Device{}, {sound});
  require(true, "no fault is reported where there is none");
  check_fault([](const Warp& warp) {
    write_own(warp), warp.barrier();
    warp.index() == 0 ? write_own(warp) : read_next(warp);
  }, "read, and no barrier since the write");
  check_fault([](const Warp& warp) {
    words(warp).store(lane_index(), 1.0f, warp.index() == 0);
    if (warp.index() == 0) words(warp).load((lane_index() + 1) % 32);  // another lane's, without a barrier of the warp
  }, "read, and no barrier since the write");
  check_fault([](const Warp& warp) {
    write_own(warp), warp.barrier();
    warp.index() == 0 ? read_next(warp) : write_own(warp);
  }, "written, and no barrier since it was read");
  check_fault([](const Warp& warp) { words(warp).store(lane_index(), 1.0f, true); }, "written twice without a barrier");
  check_fault([](const Warp& warp) { read_next(warp); }, "read and never written");
  check_fault([](const Warp& warp) { words(warp).load(Lane<int>(64)); }, "element 64 of an array of 64");
  check_fault([](const Warp& warp) { warp.shared<float>(240, 64).store(lane_index() + 1, 1.0f, true); }, "within 256");
  check_fault([](const Warp& warp) {
    copy_first(warp), warp.commit_copies(), warp.barrier(), words(warp).load(Lane<int>(0));
  }, "before its cp.async was waited for");
  check_fault([](const Warp& warp) {
    copy_first(warp), warp.commit_copies(), warp.wait_copies<1>(), warp.barrier(), words(warp).load(Lane<int>(0));
  }, "before its cp.async was waited for");
  check_fault([](const Warp& warp) {
    copy_first(warp), warp.commit_copies(), warp.wait_copies<0>();
    if (warp.index() == 1) words(warp).load(Lane<int>(0));
  }, "read, and no barrier since the write");
  check_fault([](const Warp& warp) { copy_first(warp), warp.commit_copies(); }, "ends before its cp.async");
  check_fault([](const Warp& warp) { if (warp.index() == 0) warp.barrier(); }, "a barrier that another has left out");
}

#endif

}  // namespace
}  // namespace torus::cuda

int main() {
  using namespace torus::cuda;
  check_tables();
  check_fragments<Tile<BFloat16, 32>>("bfloat16");
  check_fragments<Tile<BFloat16, 64>>("bfloat16");
  check_fragments<Tile<BFloat16, 128>>("bfloat16");
  check_fragments<Tile<Float16, 64>>("float16");
  check_fragments<PaddedTile<BFloat16, 32>>("bfloat16, padded");
  check_fragments<PaddedTile<Float16, 64>>("float16, padded");
  check_fragments<PaddedTile<BFloat16, 128>>("bfloat16, padded");
  // Ties to even, the largest number, what rounds beyond it, subnormal numbers and infinity.
  check_rounding<BFloat16>("bfloat16",
                           {{1.0f, 0x3f80}, {0x1.01p0f, 0x3f80}, {0x1.03p0f, 0x3f82}, {0x1.feffp127f, 0x7f7f},
                            {0x1.ffp127f, 0x7f80}, {-0x1p-133f, 0x8001}, {-__builtin_huge_valf(), 0xff80}});
  check_rounding<Float16>("float16", {{1.0f, 0x3c00}, {0x1.002p0f, 0x3c00}, {0x1.006p0f, 0x3c02}, {65519.0f, 0x7bff},
                                      {65520.0f, 0x7c00}, {0x1p-24f, 0x0001}, {0x1.8p-24f, 0x0002}, {0x1p-25f, 0x0000},
                                      {-0x1.ff8p-15f, 0x83ff}, {__builtin_huge_valf(), 0x7c00}});
#if !defined(__CUDACC__)
  check_faults();
#endif
  return 0;
}
