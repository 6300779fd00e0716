"""Tiles of rows in memory and their products.

A row is the D contiguous channels of a token. Offsets are int64 throughout, since T * stride passes 2**31 in long
sequences. BLOCK_D is D rounded up to a power of two, at least 16 (what a tensor core takes); the channels beyond D
are read as zero and never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MIN_BLOCK = 16


def block_d(head_dim: int) -> int:
    """Channels of a tile."""
    return max(MIN_BLOCK, triton.next_power_of_2(head_dim))


def input_precision(dtype: torch.dtype) -> str:
    """How `dot` multiplies: exactly, unless PyTorch was told that float32 products may be rounded to TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def head_of(index, heads):
    """``(batch, head, index)``, int64, of a head counted through all batch elements, int32.

    Divided in 32 bits: a division in 64 calls a subroutine, around which registers are spilled.
    """
    return (index // heads).to(tl.int64), (index % heads).to(tl.int64), index.to(tl.int64)


@triton.jit
def hidden_zero(seq_len):
    """Zero, in a form that the compiler does not see through.

    Added to an index it makes what follows from the index something else for the compiler: computed anew behind a loop,
    it need not be held in registers through it, or be spilled.
    """
    return tl.minimum(seq_len - 1, 0)


@triton.jit
def row_pointers(base, token, stride_token, BLOCK_D: tl.constexpr):
    """Pointers ``[BLOCK, BLOCK_D]`` of rows at tokens; ``base`` points at channel 0 of token 0 of a head."""
    if token.dtype == tl.int32 and base.dtype.element_ty != tl.float32:
        # None is below zero, and the product of a number without a sign takes fewer instructions; in float32 kernels,
        # which multiply otherwise, registers that there are not.
        token = token.to(tl.uint32)
    return (base + tl.arange(0, BLOCK_D))[None, :] + (token.to(tl.int64) * stride_token)[:, None]


@triton.jit
def load_rows(base, token, valid, stride_token, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``[BLOCK, BLOCK_D]``; zero where not ``valid`` ``[BLOCK]``."""
    pointers = row_pointers(base, token, stride_token, BLOCK_D)
    mask = valid[:, None]
    if BLOCK_D > D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(base, token, valid, stride_token, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes rows ``[BLOCK, BLOCK_D]`` where ``valid``, rounded to the pointer's dtype."""
    pointers = row_pointers(base, token, stride_token, BLOCK_D)
    mask = valid[:, None]
    if BLOCK_D > D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def gate_rows(row, head, PER_TOKEN: tl.constexpr):
    """Which row of contiguous gates belongs to rows ``[BLOCK]`` of ``[B, H, T]``: their own, or that of their head."""
    if PER_TOKEN:
        return row
    else:
        return tl.zeros_like(row) + head


@triton.jit
def dot_transposed(a, b, PRECISION: tl.constexpr):
    """``a @ b.T`` of rows ``[M, K]`` and ``[N, K]``, accumulated in float32."""
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def dot_cast(probabilities, b, PRECISION: tl.constexpr, acc=None):
    """``acc + probabilities @ b`` of float32 ``[M, K]`` rounded to the dtype of ``b`` ``[K, N]``, in float32."""
    return tl.dot(probabilities.to(b.dtype), b, acc=acc, input_precision=PRECISION)


@triton.jit
def dot_twice(differences, b, PRECISION: tl.constexpr, acc=None, ROUNDED: tl.constexpr = False):
    """`dot_cast` of numbers that cancel: as two of the dtype of ``b``, the second of them what the first leaves.

    The score gradients of a query sum to zero. Rounded once they no longer do, and a part that all its keys have in
    common, which should vanish from the query's gradient, shows up there. The first is the number without its last
    bits: a conversion and back would be three instructions, one of them slow. ROUNDED, it is what other products take
    too.
    """
    if b.dtype == tl.float32:
        return tl.dot(differences, b, acc=acc, input_precision=PRECISION)
    if ROUNDED:
        first = differences.to(b.dtype).to(tl.float32)
    else:
        bits: tl.constexpr = -(1 << 13) if b.dtype == tl.float16 else -(1 << 16)
        first = (differences.to(tl.int32, bitcast=True) & bits).to(tl.float32, bitcast=True)
    acc = tl.dot(first.to(b.dtype), b, acc=acc)
    return tl.dot((differences - first).to(b.dtype), b, acc=acc)


@triton.jit
def no_sums(BLOCK_M: tl.constexpr):
    """`partial_sums` ``[BLOCK_M, 8]`` of nothing."""
    return tl.zeros([BLOCK_M, 8], tl.float32)


@triton.jit
def partial_sums(tile):
    """Sums ``[M, 8]`` of the columns of a tile ``[M, N]`` that are 8 apart.

    A tensor core leaves such columns of a row in one thread, so that a loop over tiles adds them up without exchanging
    anything between threads, and in few registers; the 8 are added after the loop.
    """
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 8]), axis=1)


@triton.jit
def total_of(sums):
    """The sum of all of `partial_sums`."""
    return tl.sum(tl.sum(sums, axis=1), axis=0)
