// Kernels for machines with matrix tiles: attention in bfloat16. All else is what AVX-512 does.
#include "attention_backward.h"
#include "attention_forward.h"
#include "cross_tiles.h"

namespace torus {
namespace TORUS_ISA {

static void run_attention_forward(const AttentionForward& problem, const Runtime& runtime) {
  if (problem.in.dtype == DType::kBFloat16) return attention_forward<TileProducts>(problem, runtime);
  kernels_avx512()->attention_forward(problem, runtime);
}

static void run_attention_backward(const AttentionBackward& problem, const Runtime& runtime) {
  if (problem.in.dtype == DType::kBFloat16) return attention_backward<TileProducts>(problem, runtime);
  kernels_avx512()->attention_backward(problem, runtime);
}

}  // namespace TORUS_ISA

const Kernels* kernels_amx() {
  static const Kernels table = [] {
    Kernels kernels = *kernels_avx512();
    kernels.attention_forward = TORUS_ISA::run_attention_forward;
    kernels.attention_backward = TORUS_ISA::run_attention_backward;
    return kernels;
  }();
  return &table;
}

}  // namespace torus
