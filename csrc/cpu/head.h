// One attention head as the families of streams see it, and the plans of the call that all heads share.
#pragma once

#include "products.h"
#include "softmax.h"

namespace torus::TORUS_ISA {

// `P` is the kind of products that the head's rows are operands of.
template <class P>
struct Head {
  using T = typename P::Compute;
  int64_t batch, index;       // b, h
  int64_t padded_dim;         // Dp: D rounded up to what products want
  TokenRows<typename P::Element> q, k, v, d_out;
  const typename P::Element* zeros;  // [Dp]
  T* y;                       // [T, Dp], forward: sum over streams so far
  T *d_q, *d_k, *d_v;         // [T, Dp], backward: sums so far
  T *delta, *d_decay;         // [T, 8], backward
  T *lse, *entropy;           // [T, 8] of this head in the caller's tensors, or null
  const T* weights;           // of this head
  int64_t weights_token;      // stride
  const T* decay;             // [8] of this head
  const T* alpha;             // of this head, or null
  int64_t alpha_token;
  const int64_t* first_key;   // [T] of this batch element, or null
  const T* bias[kNumStreams]; // tables, in units of log 2

  TORUS_INLINE T weight(int64_t t, int stream) const { return weights[t * weights_token + stream]; }
  TORUS_INLINE T alpha_at(int64_t t) const { return alpha == nullptr ? T(1) : alpha[t * alpha_token]; }
  // What the forward and the backward write of one query's softmax.
  TORUS_INLINE void keep_statistics(int64_t t, int stream, const StreamRow<T>& row) const {
    if (lse != nullptr) lse[t * kNumStreams + stream] = row.lse;
    if (entropy != nullptr) entropy[t * kNumStreams + stream] = row.entropy;
  }
  TORUS_INLINE void keep_row_gradients(int64_t t, int stream, const StreamRow<T>& row) const {
    delta[t * kNumStreams + stream] = row.delta;
    d_decay[t * kNumStreams + stream] = row.d_decay;
  }
  TORUS_INLINE int64_t oldest_key(int64_t t) const {
    return first_key == nullptr ? 0 : max_of(0, min_of(first_key[t], t));
  }
};

// The streams of a tile that take part.
struct ActiveStreams {
  int count = 0;
  int index[kMaxStreamsPerTile] = {};
  TORUS_INLINE void add(const Lattice& lattice, int stream) {
    if (lattice.has(stream)) index[count++] = stream;
  }
};

// A row of biases with all but [from, to) made invisible.
template <class T>
TORUS_INLINE const T* hide_outside(const T* bias, int64_t n, int64_t from, int64_t to, T* buffer) {
  for (int64_t j = 0; j < n; ++j) buffer[j] = j >= from && j < to ? bias[j] : kNegativeInfinity<T>;
  return buffer;
}

// The softmax rows of one query, forward: scores become mixed probabilities, statistics go to the caller's tensors.
template <class P, class T = typename P::Compute>
TORUS_INLINE void mix_streams(const Head<P>& head, const ActiveStreams& active, int64_t t, T* scores, int64_t n,
                              T scale2, StreamRow<T>* rows, T* exps, int64_t ld_exps) {
  for (int s = 0; s < active.count; ++s) rows[s].weight = head.weight(t, active.index[s]);
  softmax_forward(scores, n, scale2, rows, active.count, exps, ld_exps, head.lse != nullptr,
                  head.entropy != nullptr);
  for (int s = 0; s < active.count; ++s) head.keep_statistics(t, active.index[s], rows[s]);
}

// Backward: scores become mixed probabilities and d_probs the gradient of q.k. Alpha is folded into the weights, so
// that delta is d_out . O_s, which the gradients of both weights and alpha are made of.
template <class P, class T = typename P::Compute>
TORUS_INLINE void mix_streams_backward(const Head<P>& head, const ActiveStreams& active, int64_t t, T* scores,
                                       T* d_probs, int64_t n, T scale, T scale2, StreamRow<T>* rows, T* exps,
                                       int64_t ld_exps) {
  const T alpha = head.alpha_at(t);
  for (int s = 0; s < active.count; ++s) rows[s].weight = alpha * head.weight(t, active.index[s]);
  softmax_backward(scores, d_probs, n, scale, scale2, rows, active.count, exps, ld_exps);
  for (int s = 0; s < active.count; ++s) head.keep_row_gradients(t, active.index[s], rows[s]);
}

}  // namespace torus::TORUS_ISA
