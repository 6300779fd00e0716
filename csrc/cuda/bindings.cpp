// Registers the CUDA kernels with PyTorch through its stable ABI, so that one binary serves torch 2.11 and newer; in
// the emulation's library, their functions of the same names for tensors on the CPU.
//
// Schemas are stated in Python (torus_kernels/backends/cuda.py); callers there have checked every argument, made last
// dimensions contiguous and rows of tokens aligned, allocated all outputs, and chosen the device. The stream comes as an
// integer, so that a library built beside a torch without CUDA needs nothing that this torch lacks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments.h"
#include "kernels.h"

namespace torus {
namespace {

// Scratch lives in tensors of bytes, on the device of the call's tensors. PyTorch's allocator hands their memory to
// later work on the same stream only.
class Workspace {
 public:
  Workspace(const Tensor& x, int64_t stream, int64_t cache_bytes)
      : place_(x.device()), stream_(stream), cache_bytes_(cache_bytes) {}

  cuda::Device device() {
    return {reinterpret_cast<void*>(stream_),
            [](int64_t bytes, void* owner) { return static_cast<Workspace*>(owner)->allocate(bytes); }, this,
            cache_bytes_};
  }

 private:
  void* allocate(int64_t bytes) {
    constexpr int64_t alignment = 256;
    const std::vector<int64_t> size = {bytes + alignment};
    buffers_.push_back(torch::stable::empty(size, torch::headeronly::ScalarType::Byte, std::nullopt, place_));
    const auto address = reinterpret_cast<uintptr_t>(buffers_.back().data_ptr());
    return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
  }

  torch::stable::Device place_;
  int64_t stream_, cache_bytes_;
  std::vector<Tensor> buffers_;
};

void attention_forward(Tensor q, Tensor k, Tensor v, Tensor weights, Tensor decay, Optional state, Optional alpha,
                       Optional first_key, std::vector<int64_t> lattice, double scale, Tensor out, Optional lse,
                       Optional entropy, int64_t stream, int64_t cache_bytes) {
  Workspace workspace(q, stream, cache_bytes);
  cuda::attention_forward({attention_inputs(q, k, v, weights, decay, state, alpha, first_key, lattice, scale),
                           tokens_of(out), pointer(lse), pointer(entropy)},
                          workspace.device());
}

void attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor weights, Tensor decay,
                        Optional state, Optional alpha, Optional first_key, std::vector<int64_t> lattice, double scale,
                        Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_weights, Tensor d_decay, Optional d_state,
                        Optional d_alpha, int64_t stream, int64_t cache_bytes) {
  Workspace workspace(q, stream, cache_bytes);
  cuda::attention_backward(
      {{attention_inputs(q, k, v, weights, decay, state, alpha, first_key, lattice, scale), tokens_of(d_out),
        tokens_of(d_q), tokens_of(d_k), tokens_of(d_v), tokens_of(d_state), d_weights.data_ptr(), d_decay.data_ptr(),
        pointer(d_alpha)},
       static_cast<const float*>(lse.data_ptr())},
      workspace.device());
}

void attention_decode(Tensor q, Tensor keys, Tensor values, Tensor weights, Tensor decay, Optional state,
                      Optional alpha, Optional first_key, std::vector<int64_t> lattice, double scale, int64_t length,
                      Tensor out, int64_t stream, int64_t cache_bytes) {
  Workspace workspace(q, stream, cache_bytes);
  cuda::attention_decode(
      {attention_inputs(q, keys, values, weights, decay, state, alpha, first_key, lattice, scale), length,
       tokens_of(out)},
      workspace.device());
}

void ema_compound(Tensor x, Tensor state, Tensor alpha, Optional beta, Optional velocity, Tensor out,
                  Optional new_velocity, int64_t stream, int64_t cache_bytes) {
  Workspace workspace(x, stream, cache_bytes);
  Compound p = compound_of(x, state, alpha, beta, velocity);
  p.out = tokens_of(out), p.new_velocity = tokens_of(new_velocity);
  cuda::ema_compound(p, workspace.device());
}

void ema_compound_backward(Tensor d_out, Optional d_new_velocity, Tensor x, Tensor state, Tensor alpha, Optional beta,
                           Optional velocity, Tensor d_x, Tensor d_state, Tensor d_alpha, Optional d_beta,
                           Optional d_velocity, int64_t stream, int64_t cache_bytes) {
  Workspace workspace(x, stream, cache_bytes);
  cuda::ema_compound_backward(
      {compound_of(x, state, alpha, beta, velocity), tokens_of(d_out), tokens_of(d_new_velocity), tokens_of(d_x),
       tokens_of(d_state), tokens_of(d_velocity), d_alpha.data_ptr(), pointer(d_beta)},
      workspace.device());
}

void ema_multiscale(Tensor x, Tensor states, Tensor alphas, Tensor scale_weights, Tensor mixed, Tensor new_states,
                    int64_t stream, int64_t cache_bytes) {
  Workspace workspace(x, stream, cache_bytes);
  Multiscale p = multiscale_of(x, states, alphas, scale_weights);
  p.mixed = tokens_of(mixed), p.new_states = states_of(new_states), p.new_states_scale = new_states.stride(0);
  cuda::ema_multiscale(p, workspace.device());
}

void ema_multiscale_backward(Tensor d_mixed, Tensor d_new_states, Tensor x, Tensor states, Tensor alphas,
                             Tensor scale_weights, Tensor d_x, Tensor d_states, Tensor d_alphas, Tensor d_scale_weights,
                             int64_t stream, int64_t cache_bytes) {
  Workspace workspace(x, stream, cache_bytes);
  cuda::ema_multiscale_backward(
      {multiscale_of(x, states, alphas, scale_weights), tokens_of(d_mixed), states_of(d_new_states), tokens_of(d_x),
       states_of(d_states), d_new_states.stride(0), d_states.stride(0), d_alphas.data_ptr(),
       d_scale_weights.data_ptr()},
      workspace.device());
}

}  // namespace
}  // namespace torus

#if defined(TORUS_CUDA_EMULATE)
#define TORUS_DISPATCH_KEY CPU
#else
#define TORUS_DISPATCH_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(torus_kernels, TORUS_DISPATCH_KEY, library) {
  library.impl("cuda_attention_forward", TORCH_BOX(&torus::attention_forward));
  library.impl("cuda_attention_backward", TORCH_BOX(&torus::attention_backward));
  library.impl("cuda_attention_decode", TORCH_BOX(&torus::attention_decode));
  library.impl("cuda_ema_compound", TORCH_BOX(&torus::ema_compound));
  library.impl("cuda_ema_compound_backward", TORCH_BOX(&torus::ema_compound_backward));
  library.impl("cuda_ema_multiscale", TORCH_BOX(&torus::ema_multiscale));
  library.impl("cuda_ema_multiscale_backward", TORCH_BOX(&torus::ema_multiscale_backward));
}
