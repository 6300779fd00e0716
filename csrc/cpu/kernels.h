// What the bindings and the kernels share: plain structs of pointers and one table of entry points per instruction
// set. Nothing here depends on PyTorch or on an instruction set.
#pragma once

#include <cstdint>

#include "../lattice.h"

namespace torus {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

// A [B, H, T, D] tensor of tokens; strides in elements, the last dimension is contiguous.
struct Tokens {
  void* data;
  int64_t batch, head, token;
};

// A parameter in the compute type, per head or per token; a stride is 0 along a dimension it does not have.
struct Parameter {
  void* data;
  int64_t batch, head, token;
};

// Splits [begin, end) among threads, at least `grain` items each, and calls body(context, first, last) once a share.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t),
                             void* context);

// Scratch memory: aligned to 64 bytes, unwritten. The kernels ask once, before any thread starts.
using Allocate = void* (*)(int64_t bytes, void* owner);

struct Runtime {
  ParallelFor parallel_for;
  Allocate allocate;
  void* owner;
  int64_t num_threads;
};

struct AttentionInputs {
  Lattice lattice;
  DType dtype;                     // of all tokens; the compute type is double for kFloat64 and float otherwise
  int64_t batch, heads, kv_heads, seq_len, head_dim;
  double scale;
  Tokens q, k, v, state;           // state.data is null without EMA compounding
  Parameter weights, decay, alpha; // [.., 8], [.., 8], [..]
  const int64_t* first_key;        // [B, T] or null
};

struct AttentionForward {
  AttentionInputs in;
  Tokens out;
  void* lse;      // [B, H, T, 8] in the compute type, or null
  void* entropy;  // likewise
};

struct AttentionBackward {
  AttentionInputs in;
  Tokens d_out;
  Tokens d_q, d_k, d_v, d_state;
  void* d_weights;  // [H, 8] or [B, H, T, 8], as the weights
  void* d_decay;    // [H, 8]
  void* d_alpha;    // [H] or [B, H, T], as alpha; null without EMA compounding
};

// The newest token against rings of N slots: k and v hold position p in slot p % N, and T is 1.
struct AttentionDecode {
  AttentionInputs in;  // first_key counts positions since the ring was empty
  int64_t length;      // positions so far, the newest included
  Tokens out;
};

struct Compound {
  DType dtype;
  int64_t batch, heads, seq_len, head_dim;
  Tokens x, state, out;
  Parameter alpha, beta;          // beta.data is null without momentum
  Tokens velocity, new_velocity;  // in the compute type
};

struct CompoundBackward {
  Compound forward;
  Tokens d_out, d_new_velocity, d_x, d_state, d_velocity;
  void* d_alpha;
  void* d_beta;
};

struct Multiscale {
  DType dtype;
  int64_t scales, batch, heads, seq_len, head_dim;
  Tokens x, mixed, states, new_states;     // the states of the first scale
  int64_t states_scale, new_states_scale;  // strides from one scale to the next
  Parameter alphas, scale_weights;         // `token` is the stride from one scale to the next
};

struct MultiscaleBackward {
  Multiscale forward;
  Tokens d_mixed, d_new_states, d_x, d_states;
  int64_t d_new_states_scale, d_states_scale;
  void* d_alphas;         // [S, H]
  void* d_scale_weights;  // [S]
};

struct Rope {
  Lattice lattice;
  DType dtype;
  int64_t batch, heads, seq_len, head_dim;
  Tokens x, out;
  int64_t offset;
  bool inverse;
};

struct Kernels {
  void (*attention_forward)(const AttentionForward&, const Runtime&);
  void (*attention_backward)(const AttentionBackward&, const Runtime&);
  void (*attention_decode)(const AttentionDecode&, const Runtime&);
  void (*ema_compound)(const Compound&, const Runtime&);
  void (*ema_compound_backward)(const CompoundBackward&, const Runtime&);
  void (*ema_multiscale)(const Multiscale&, const Runtime&);
  void (*ema_multiscale_backward)(const MultiscaleBackward&, const Runtime&);
  void (*rope)(const Rope&, const Runtime&);
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();

}  // namespace torus
