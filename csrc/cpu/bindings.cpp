// Registers the CPU kernels with PyTorch through its stable ABI, so that one binary serves torch 2.11 and newer.
//
// Schemas are stated in Python (torus_kernels/backends/cpu.py); callers there have checked every argument, made last
// dimensions contiguous and allocated all outputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string>

#if TORUS_X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../arguments.h"
#include "kernels.h"
#include "sanitize.h"

namespace torus {
namespace {

using torch::headeronly::ScalarType;

#if TORUS_X86
// Linux lets a process use the matrix tiles once it has asked for room to save them in.
bool may_use_tiles() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx, ebx1, ecx1, edx1;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool bfloat16_tiles = edx >> 22 & 1, tiles = edx >> 24 & 1;
  if (!__get_cpuid_count(7, 1, &eax, &ebx1, &ecx1, &edx1)) return false;
  const bool bfloat16_vectors = eax >> 5 & 1;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return bfloat16_tiles && tiles && bfloat16_vectors && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// In ascending order. Code of an instruction set runs only where the machine has it, and `kernels` is such code.
struct InstructionSet {
  const char* name;
  const Kernels* (*kernels)();
};
constexpr InstructionSet kInstructionSets[] = {
    {"baseline", kernels_baseline},
#if TORUS_X86
    {"avx2", kernels_avx2},
    {"avx512", kernels_avx512},
    {"amx", kernels_amx},
#endif
};

// The widest of this machine.
int best_instruction_set() {
#if TORUS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  return may_use_tiles() ? 3 : 2;
#else
  return 0;
#endif
}

// The widest of this machine, or the narrower one that TORUS_CPU_ISA names.
int choose_instruction_set() {
  const int best = best_instruction_set();
  const char* wanted = std::getenv("TORUS_CPU_ISA");
  if (wanted == nullptr || *wanted == 0) return best;
  for (int i = 0; i <= best; ++i)
    if (kInstructionSets[i].name == std::string(wanted)) return i;
  STD_TORCH_CHECK(false, "TORUS_CPU_ISA is '", wanted, "', but this machine runs up to '", kInstructionSets[best].name,
                  "' (baseline, avx2, avx512 and amx are the names)");
  return 0;
}

// The one in use: 0 baseline, 1 AVX2, 2 AVX-512, 3 AMX.
int64_t instruction_set() {
  static const int chosen = choose_instruction_set();
  return chosen;
}

const Kernels& kernels() {
  static const Kernels* table = kInstructionSets[instruction_set()].kernels();
  return *table;
}

// Scratch lives in tensors of bytes: PyTorch's allocator counts it, and its debugging fill reaches it.
class Workspace {
 public:
  Runtime runtime() {
    return {[](int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
              torch::stable::parallel_for(begin, end, grain,
                                          [&](int64_t first, int64_t last) { body(context, first, last); });
            },
            [](int64_t bytes, void* owner) { return static_cast<Workspace*>(owner)->allocate(bytes); }, this,
            static_cast<int64_t>(torch::stable::get_num_threads())};
  }

 private:
  void* allocate(int64_t bytes) {
    constexpr int64_t alignment = 64;
    const std::vector<int64_t> size = {bytes + alignment};
    buffers_.push_back(torch::stable::empty(size, ScalarType::Byte));
    const auto address = reinterpret_cast<uintptr_t>(buffers_.back().data_ptr());
    void* const aligned = reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
    fence(aligned, bytes, static_cast<int64_t>(address) + size[0] - reinterpret_cast<int64_t>(aligned));
    return aligned;
  }
  std::vector<Tensor> buffers_;
};

void attention_forward(Tensor q, Tensor k, Tensor v, Tensor weights, Tensor decay, Optional state, Optional alpha,
                       Optional first_key, std::vector<int64_t> lattice, double scale, Tensor out, Optional lse,
                       Optional entropy) {
  Workspace workspace;
  kernels().attention_forward({attention_inputs(q, k, v, weights, decay, state, alpha, first_key, lattice, scale),
                               tokens_of(out), pointer(lse), pointer(entropy)},
                              workspace.runtime());
}

void attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor weights, Tensor decay, Optional state,
                        Optional alpha, Optional first_key, std::vector<int64_t> lattice, double scale, Tensor d_q,
                        Tensor d_k, Tensor d_v, Tensor d_weights, Tensor d_decay, Optional d_state, Optional d_alpha) {
  Workspace workspace;
  kernels().attention_backward({attention_inputs(q, k, v, weights, decay, state, alpha, first_key, lattice, scale),
                                tokens_of(d_out), tokens_of(d_q), tokens_of(d_k), tokens_of(d_v), tokens_of(d_state),
                                d_weights.data_ptr(), d_decay.data_ptr(), pointer(d_alpha)},
                               workspace.runtime());
}

void attention_decode(Tensor q, Tensor keys, Tensor values, Tensor weights, Tensor decay, Optional state,
                      Optional alpha, Optional first_key, std::vector<int64_t> lattice, double scale, int64_t length,
                      Tensor out) {
  Workspace workspace;
  kernels().attention_decode(
      {attention_inputs(q, keys, values, weights, decay, state, alpha, first_key, lattice, scale), length,
       tokens_of(out)},
      workspace.runtime());
}

void ema_compound(Tensor x, Tensor state, Tensor alpha, Optional beta, Optional velocity, Tensor out,
                  Optional new_velocity) {
  Workspace workspace;
  Compound p = compound_of(x, state, alpha, beta, velocity);
  p.out = tokens_of(out), p.new_velocity = tokens_of(new_velocity);
  kernels().ema_compound(p, workspace.runtime());
}

void ema_compound_backward(Tensor d_out, Optional d_new_velocity, Tensor x, Tensor state, Tensor alpha, Optional beta,
                           Optional velocity, Tensor d_x, Tensor d_state, Tensor d_alpha, Optional d_beta,
                           Optional d_velocity) {
  Workspace workspace;
  kernels().ema_compound_backward(
      {compound_of(x, state, alpha, beta, velocity), tokens_of(d_out), tokens_of(d_new_velocity), tokens_of(d_x),
       tokens_of(d_state), tokens_of(d_velocity), d_alpha.data_ptr(), pointer(d_beta)},
      workspace.runtime());
}

void ema_multiscale(Tensor x, Tensor states, Tensor alphas, Tensor scale_weights, Tensor mixed, Tensor new_states) {
  Workspace workspace;
  Multiscale p = multiscale_of(x, states, alphas, scale_weights);
  p.mixed = tokens_of(mixed), p.new_states = states_of(new_states), p.new_states_scale = new_states.stride(0);
  kernels().ema_multiscale(p, workspace.runtime());
}

void ema_multiscale_backward(Tensor d_mixed, Tensor d_new_states, Tensor x, Tensor states, Tensor alphas,
                             Tensor scale_weights, Tensor d_x, Tensor d_states, Tensor d_alphas,
                             Tensor d_scale_weights) {
  Workspace workspace;
  kernels().ema_multiscale_backward(
      {multiscale_of(x, states, alphas, scale_weights), tokens_of(d_mixed), states_of(d_new_states), tokens_of(d_x),
       states_of(d_states), d_new_states.stride(0), d_states.stride(0), d_alphas.data_ptr(),
       d_scale_weights.data_ptr()},
      workspace.runtime());
}

void rope(Tensor x, std::vector<int64_t> lattice, int64_t offset, bool inverse, Tensor out) {
  Workspace workspace;
  kernels().rope({lattice_from_spec(lattice.data()), dtype_of(x), x.size(0), x.size(1), x.size(2), x.size(3),
                  tokens_of(x), tokens_of(out), offset, inverse},
                 workspace.runtime());
}

}  // namespace
}  // namespace torus

STABLE_TORCH_LIBRARY_IMPL(torus_kernels, CPU, library) {
  library.impl("cpu_attention_forward", TORCH_BOX(&torus::attention_forward));
  library.impl("cpu_attention_backward", TORCH_BOX(&torus::attention_backward));
  library.impl("cpu_attention_decode", TORCH_BOX(&torus::attention_decode));
  library.impl("cpu_ema_compound", TORCH_BOX(&torus::ema_compound));
  library.impl("cpu_ema_compound_backward", TORCH_BOX(&torus::ema_compound_backward));
  library.impl("cpu_ema_multiscale", TORCH_BOX(&torus::ema_multiscale));
  library.impl("cpu_ema_multiscale_backward", TORCH_BOX(&torus::ema_multiscale_backward));
  library.impl("cpu_rope", TORCH_BOX(&torus::rope));
}

STABLE_TORCH_LIBRARY_IMPL(torus_kernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&torus::instruction_set));
}
