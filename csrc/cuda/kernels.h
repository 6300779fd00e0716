// What the bindings and the CUDA kernels share: plain structs of pointers and one function per operator. Nothing here
// depends on PyTorch or on CUDA: the same functions run on a GPU, compiled by nvcc, and on the CPU, where a C++
// compiler builds the same kernels over csrc/cuda/host.
//
// Contract of the callers, on top of what every backend may count on:
// - tokens are float16 or bfloat16, head_dim a multiple of 8 up to kMaxHeadDim, seq_len at most kMaxTokens;
// - every row of tokens that is read begins at a multiple of 16 bytes: data and strides are multiples of it;
// - parameters (weights, decay, alpha) are float32;
// - lse and entropy are float32 [B, H, T, 8].
#pragma once

#include <cstdint>

#include "../cpu/kernels.h"

namespace torus::cuda {

constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kMaxTokens = int64_t{1} << 30;

// Where kernels run. Scratch is unwritten and aligned to 256 bytes; it lives until the call's kernels have run.
struct Device {
  void* stream;        // a cudaStream_t; of no meaning to the emulation
  Allocate allocate;
  void* owner;         // passed to `allocate`
  int64_t cache_bytes; // of L2: heads are worked off in chunks whose partial sums stay in it
};

// As torus::AttentionBackward; the forward's lse is read, not computed again.
struct AttentionBackward {
  torus::AttentionBackward gradients;
  const float* lse;  // [B, H, T, 8]
};

// All enqueue their kernels on the device's stream and return. A call or launch that CUDA refuses is a
// std::runtime_error that names the kernel and its configuration; so is whatever the emulation finds.
void attention_forward(const AttentionForward& problem, const Device& device);
void attention_backward(const AttentionBackward& problem, const Device& device);
void attention_decode(const AttentionDecode& problem, const Device& device);
void ema_compound(const Compound& problem, const Device& device);
void ema_compound_backward(const CompoundBackward& problem, const Device& device);
void ema_multiscale(const Multiscale& problem, const Device& device);
void ema_multiscale_backward(const MultiscaleBackward& problem, const Device& device);

}  // namespace torus::cuda
