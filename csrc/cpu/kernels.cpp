// The kernels for one instruction set: this file is compiled once for each, with TORUS_ISA naming it.
#include <utility>

#include "attention_backward.h"
#include "attention_forward.h"
#include "compounding.h"
#include "decode.h"
#include "rope.h"

namespace torus {
namespace TORUS_ISA {

template <class T>
using Itself = T;

// The compute type is double for float64 tokens and float for all others.
#define TORUS_BY_COMPUTE_TYPE(kernel, Problem, dtype, of)                    \
  static void run_##kernel(const Problem& problem, const Runtime& runtime) { \
    if (dtype == DType::kFloat64)                                            \
      kernel<of<double>>(problem, runtime);                                  \
    else                                                                     \
      kernel<of<float>>(problem, runtime);                                   \
  }

TORUS_BY_COMPUTE_TYPE(attention_forward, AttentionForward, problem.in.dtype, VectorProducts)
TORUS_BY_COMPUTE_TYPE(attention_backward, AttentionBackward, problem.in.dtype, VectorProducts)
TORUS_BY_COMPUTE_TYPE(attention_decode, AttentionDecode, problem.in.dtype, Itself)
TORUS_BY_COMPUTE_TYPE(ema_compound, Compound, problem.dtype, Itself)
TORUS_BY_COMPUTE_TYPE(ema_compound_backward, CompoundBackward, problem.forward.dtype, Itself)
TORUS_BY_COMPUTE_TYPE(ema_multiscale, Multiscale, problem.dtype, Itself)
TORUS_BY_COMPUTE_TYPE(ema_multiscale_backward, MultiscaleBackward, problem.forward.dtype, Itself)
TORUS_BY_COMPUTE_TYPE(rope, Rope, problem.dtype, Itself)

}  // namespace TORUS_ISA

#define TORUS_JOIN_(a, b) a##b
#define TORUS_JOIN(a, b) TORUS_JOIN_(a, b)

const Kernels* TORUS_JOIN(kernels_, TORUS_ISA)() {
  static constexpr Kernels table = {TORUS_ISA::run_attention_forward, TORUS_ISA::run_attention_backward,
                                    TORUS_ISA::run_attention_decode, TORUS_ISA::run_ema_compound,
                                    TORUS_ISA::run_ema_compound_backward, TORUS_ISA::run_ema_multiscale,
                                    TORUS_ISA::run_ema_multiscale_backward, TORUS_ISA::run_rope};
  return &table;
}

}  // namespace torus
