// Every kernel on std::threads, for ThreadSanitizer: PyTorch's own pool is not compiled with it, and what it synchronises
// would be reported as races. Results must be the same bytes whatever the number of threads.
//
// Usage: threads [sample | plant]. `sample` leaves out most dtypes and numbers of heads; with `plant` two calls write one
// output at once, which ThreadSanitizer has to report.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace torus {

// Built with some instruction sets only, the others are null.
[[gnu::weak]] const Kernels* kernels_baseline();
[[gnu::weak]] const Kernels* kernels_avx2();
[[gnu::weak]] const Kernels* kernels_avx512();
[[gnu::weak]] const Kernels* kernels_amx();

namespace {

// As at::parallel_for: at most as many shares as threads, each on a thread of its own, all joined at the end.
thread_local int64_t allowed_threads = 1;

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t shares = std::min(allowed_threads, ceil_div(end - begin, grain));
  if (shares <= 1) {
    if (begin < end) body(context, begin, end);
    return;
  }
  const int64_t size = ceil_div(end - begin, shares);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += size)
    threads.emplace_back([=] { body(context, first, std::min(end, first + size)); });
  for (std::thread& thread : threads) thread.join();
}

class Workspace {
 public:
  explicit Workspace(int64_t threads) : threads_(threads) { allowed_threads = threads; }
  ~Workspace() {
    for (void* block : blocks_) std::free(block);
  }
  Workspace(const Workspace&) = delete;
  Runtime runtime() {
    return {parallel_for,
            [](int64_t bytes, void* owner) {
              auto& blocks = static_cast<Workspace*>(owner)->blocks_;
              blocks.push_back(std::aligned_alloc(64, static_cast<size_t>(round_up(std::max<int64_t>(bytes, 1), 64))));
              return blocks.back();
            },
            this, threads_};
  }

 private:
  int64_t threads_;
  std::vector<void*> blocks_;
};

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Numbers between -1 and 1, in any dtype.
std::vector<char> random_numbers(int64_t count, DType dtype, uint32_t seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<char> data(static_cast<size_t>(count * bytes_of(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    const float x = uniform(generator);
    const double wide = x;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Of a half only the sign and ten digits are kept, between 1 and 2.
    const uint16_t half = static_cast<uint16_t>((bits >> 16 & 0x8000) | 0x3c00 | (bits >> 13 & 0x3ff));
    const uint16_t bfloat16 = static_cast<uint16_t>(bits >> 16);
    const void* from = dtype == DType::kFloat64    ? static_cast<const void*>(&wide)
                       : dtype == DType::kFloat32  ? static_cast<const void*>(&x)
                       : dtype == DType::kBFloat16 ? static_cast<const void*>(&bfloat16)
                                                   : static_cast<const void*>(&half);
    std::memcpy(data.data() + i * bytes_of(dtype), from, static_cast<size_t>(bytes_of(dtype)));
  }
  return data;
}

// Inputs and outputs of one call by name; outputs are what is compared.
struct Buffers {
  DType dtype;
  int64_t batch, heads, kv_heads, seq_len, head_dim;
  std::vector<std::unique_ptr<std::vector<char>>> all;
  std::vector<std::vector<char>*> outputs;

  DType parameters() const { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  void* input(int64_t count, DType as) {
    all.push_back(std::make_unique<std::vector<char>>(random_numbers(count, as, static_cast<uint32_t>(all.size()))));
    return all.back()->data();
  }
  void* output(int64_t count, DType as) {
    all.push_back(std::make_unique<std::vector<char>>(static_cast<size_t>(count * bytes_of(as))));
    outputs.push_back(all.back().get());
    return all.back()->data();
  }
  Tokens tokens(bool is_output, int64_t num_heads, int64_t length, DType as) {
    const int64_t count = batch * num_heads * length * head_dim;
    return {is_output ? output(count, as) : input(count, as), num_heads * length * head_dim, length * head_dim,
            head_dim};
  }
  Tokens in(int64_t num_heads) { return tokens(false, num_heads, seq_len, dtype); }
  Tokens out(int64_t num_heads) { return tokens(true, num_heads, seq_len, dtype); }
  Parameter gate(int64_t numbers) {
    return {input(batch * heads * seq_len * numbers, parameters()), heads * seq_len * numbers, seq_len * numbers,
            numbers};
  }
};

AttentionInputs attention_inputs(Buffers& b, const Lattice& lattice) {
  AttentionInputs in{};
  in.lattice = lattice, in.dtype = b.dtype;
  in.batch = b.batch, in.heads = b.heads, in.kv_heads = b.kv_heads, in.seq_len = b.seq_len, in.head_dim = b.head_dim;
  in.scale = 0.3;
  in.q = b.in(b.heads), in.k = b.in(b.kv_heads), in.v = b.in(b.kv_heads), in.state = b.in(b.heads);
  in.weights = b.gate(kNumStreams), in.alpha = b.gate(1);
  in.decay = {b.input(b.heads * kNumStreams, b.parameters()), 0, kNumStreams, 0};
  return in;
}

// Makes every call of the interface with so many threads; returns all bytes that it wrote.
std::vector<std::vector<char>> run_all(const Kernels& kernels, const Lattice& lattice, int64_t seq_len, DType dtype,
                                       int64_t batch, int64_t heads, int64_t kv_heads, int64_t threads) {
  std::vector<std::vector<char>> written;
  const auto call = [&](auto make_and_run) {
    Buffers b{dtype, batch, heads, kv_heads, seq_len, 24, {}, {}};
    Workspace workspace(threads);
    make_and_run(b, workspace.runtime());
    for (std::vector<char>* output : b.outputs) written.push_back(*output);
  };
  const int64_t rows = batch * heads * seq_len;
  call([&](Buffers& b, const Runtime& runtime) {
    AttentionForward p{attention_inputs(b, lattice), b.out(heads), b.output(rows * kNumStreams, b.parameters()),
                       b.output(rows * kNumStreams, b.parameters())};
    kernels.attention_forward(p, runtime);
  });
  call([&](Buffers& b, const Runtime& runtime) {
    AttentionBackward p{attention_inputs(b, lattice), b.in(heads), b.out(heads), b.out(kv_heads), b.out(kv_heads),
                        b.out(heads), b.output(rows * kNumStreams, b.parameters()),
                        b.output(heads * kNumStreams, b.parameters()), b.output(rows, b.parameters())};
    kernels.attention_backward(p, runtime);
  });
  if (lattice.causal()) call([&](Buffers& b, const Runtime& runtime) {
      b.seq_len = 1;
      AttentionDecode p{attention_inputs(b, lattice), seq_len, b.out(heads)};
      p.in.k = p.in.v = b.tokens(false, kv_heads, lattice.num_sites(), dtype);
      kernels.attention_decode(p, runtime);
    });
  call([&](Buffers& b, const Runtime& runtime) {
    Compound p{dtype, batch, heads, seq_len, b.head_dim, b.in(heads), b.in(heads), b.out(heads), b.gate(1), b.gate(1),
               b.tokens(false, heads, seq_len, b.parameters()), b.tokens(true, heads, seq_len, b.parameters())};
    kernels.ema_compound(p, runtime);
    CompoundBackward g{p, b.in(heads), b.tokens(false, heads, seq_len, b.parameters()), b.out(heads), b.out(heads),
                       b.tokens(true, heads, seq_len, b.parameters()), b.output(rows, b.parameters()),
                       b.output(rows, b.parameters())};
    kernels.ema_compound_backward(g, runtime);
  });
  call([&](Buffers& b, const Runtime& runtime) {
    const Parameter alphas{b.input(heads, b.parameters()), 0, 1, heads}, weights{b.input(1, b.parameters()), 0, 0, 1};
    Multiscale p{dtype, 1, batch, heads, seq_len, b.head_dim, b.in(heads), b.out(heads), b.in(heads), b.out(heads), 0, 0,
                 alphas, weights};
    kernels.ema_multiscale(p, runtime);
    MultiscaleBackward g{p, b.in(heads), b.in(heads), b.out(heads), b.out(heads), 0, 0,
                         b.output(heads, b.parameters()), b.output(1, b.parameters())};
    kernels.ema_multiscale_backward(g, runtime);
  });
  call([&](Buffers& b, const Runtime& runtime) {
    kernels.rope({lattice, dtype, batch, heads, seq_len, b.head_dim, b.in(heads), b.out(heads), 0, false}, runtime);
  });
  return written;
}

// Many rows, so that cross flows fall into several units, an odd number among them; long lines, so that they are cut.
struct Place {
  Lattice lattice;
  int64_t seq_len;
};
const Place kPlaces[] = {
    {{kPeriodic, 70, 4, 2, 1, 3, 255}, 280}, {{kPeriodic, 102, 3, 1, 3, 7, 255}, 306},
    {{kCausal, 9, 8, 3, 1, 3, 255}, 700},    {{kCausal, 40, 3, 2, 2, 1, 255}, 400},
    {{kCylinder, 66, 5, 2, 2, 4, 255}, 330}, {{kPeriodic, 6, 40, 20, 1, 2, 63}, 240},
};

int check(const char* isa, const Kernels& kernels, bool sample) {
  std::vector<DType> dtypes = {DType::kBFloat16, DType::kFloat32, DType::kFloat16, DType::kFloat64};
  std::vector<std::array<int, 3>> head_counts = {{1, 2, 1}, {2, 3, 1}, {1, 8, 4}};
  if (sample) dtypes.resize(1), head_counts.resize(1);
  int wrong = 0;
  for (const Place& place : kPlaces)
    for (const DType dtype : dtypes)
      for (const auto& [batch, heads, kv_heads] : head_counts) {
        const auto run = [&](int64_t threads) {
          return run_all(kernels, place.lattice, place.seq_len, dtype, batch, heads, kv_heads, threads);
        };
        const auto expected = run(1);
        for (const int64_t threads : {2, 5})
          if (run(threads) != expected) ++wrong;
        // Two callers at once, as two Python threads are.
        std::vector<std::vector<char>> other;
        std::thread caller([&] { other = run(2); });
        if (run(2) != expected) ++wrong;
        caller.join();
        if (other != expected) ++wrong;
      }
  std::printf("%s: %s\n", isa, wrong == 0 ? "the same bytes with 1, 2 and 5 threads" : "results differ");
  return wrong;
}

void plant(const Kernels& kernels) {
  Buffers b{DType::kFloat32, 1, 1, 1, 8, 24, {}, {}};
  const Compound p{b.dtype, 1, 1, 8, 24, b.in(1), b.in(1), b.out(1), b.gate(1), {}, {}, {}};
  const auto run = [&] {
    Workspace workspace(1);
    kernels.ema_compound(p, workspace.runtime());
  };
  std::thread other(run);
  run();
  other.join();
}

}  // namespace
}  // namespace torus

int main(int count, char** arguments) {
  using namespace torus;
  const std::string mode = count > 1 ? arguments[1] : "";
#ifdef SYS_arch_prctl
  constexpr long request_permission = 0x1023, tile_data = 18;
  if (kernels_amx != nullptr) syscall(SYS_arch_prctl, request_permission, tile_data);
#endif
  int wrong = 0;
  const std::pair<const char*, const Kernels* (*)()> tables[] = {
      {"baseline", kernels_baseline}, {"avx2", kernels_avx2}, {"avx512", kernels_avx512}, {"amx", kernels_amx}};
  for (const auto& [isa, table] : tables) {
    if (table == nullptr) continue;
    if (mode == "plant")
      plant(*table());
    else
      wrong += check(isa, *table(), mode == "sample");
  }
  return wrong == 0 ? 0 : 1;
}
