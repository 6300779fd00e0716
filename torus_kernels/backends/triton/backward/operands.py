"""Operands of the backward kernels: what a call hands to every one of them, and how they read its rows."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..primitives.lattice import NUM_STREAMS
from ..primitives.parts import add_slots
from ..primitives.softmax import LOG2E

ROW_NUMBERS = tl.constexpr(4)
"""Floats that query rows keep of each stream between kernels: see `store_row_numbers`."""

PARAMETER_SUMS = tl.constexpr(16)
"""Floats that a program leaves for the gates of its head: d_weights, d_alpha, unused."""

# Bits of GATES, what a call has of gates.
TOKEN_WEIGHTS = tl.constexpr(1)
HAS_STATE = tl.constexpr(2)
TOKEN_ALPHA = tl.constexpr(4)


class Strided(NamedTuple):
    """Tokens ``[B, H, T, D]``, their last dimension contiguous."""

    data: Tensor | None
    batch: int
    head: int
    token: int


class Operands(NamedTuple):
    """What the kernels read, indexed by batch and head, and their workspaces, which hold a chunk of heads."""

    d_out: Strided
    q: Strided
    k: Strided
    v: Strided
    state: Strided
    weights: Tensor  # [H, 8] or [B, H, T, 8], contiguous
    alpha: Tensor | None  # [H] or [B, H, T], contiguous
    decay: Tensor  # [H, 8]
    lse: Tensor  # [B, H, T, 8] float32, contiguous
    first_key: Tensor | None  # [B, T]
    row_numbers: Tensor  # float32 [chunk, T, 8, ROW_NUMBERS], a chunk of query heads
    decay_sums: Tensor  # float32 [B * H, programs, 8]: sum rho^2 dS
    d_q: Tensor  # float32 [slots, chunk, T, D]: sums of the line families and of the first of two cross flows
    d_k: Tensor  # the same, a chunk of key/value heads; to be multiplied by the scale
    d_v: Tensor


class Results(NamedTuple):
    """Where gradients that are final go; those of gates are contiguous."""

    d_q: Strided
    d_k: Strided
    d_v: Strided
    d_state: Strided
    d_weights: Tensor | None  # [B, H, T, 8], where weights are per token
    d_alpha: Tensor | None  # [B, H, T], where alpha is per token
    parameter_sums: Tensor  # float32 [B * H, tiles, PARAMETER_SUMS]


@triton.jit
def base_of(rows, batch, head):
    """Pointer to token 0 of a head."""
    return rows.data + batch.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head


@triton.jit
def takes_part(stream, STREAMS: tl.constexpr):
    """Whether streams, a tensor of their numbers, are in the mask STREAMS."""
    return (((tl.zeros_like(stream) + STREAMS) >> stream) & 1) != 0


@triton.jit
def load_decay(operands, head, stream, STREAMS: tl.constexpr):
    """Decay of a stream; 0 for one that is left out, whose own may be any number."""
    return tl.load(operands.decay + head * NUM_STREAMS + stream, mask=takes_part(stream, STREAMS), other=0.0)


@triton.jit
def load_gate(gate, row, head, valid, width, column, PER_TOKEN: tl.constexpr):
    """A column of a gate, ``[H, width]`` or ``[B, H, T, width]``, for rows of ``[B, H, T]``; ``[BLOCK]``."""
    if PER_TOKEN:
        values = tl.load(gate + row * width + column, mask=valid, other=0.0)
    else:
        values = tl.where(valid, tl.load(gate + head * width + column), 0.0)
    return values


@triton.jit
def load_alpha(operands, row, head, valid, GATES: tl.constexpr):
    """EMA rate of each row, ``[BLOCK]``."""
    return load_gate(operands.alpha, row, head, valid, 1, 0, (TOKEN_ALPHA & GATES) != 0)


@triton.jit
def load_stream(
    operands, batch, head, heads, seq_len, token, valid, stream, STREAMS: tl.constexpr, GATES: tl.constexpr
):
    """Log-sum-exp in base 2 and gate ``alpha * g`` of one stream at int64 tokens, ``[BLOCK]`` each.

    A row that is not there and a stream that is left out have an infinite log-sum-exp: their probabilities are zero.
    """
    there = valid & takes_part(tl.zeros_like(token) + stream, STREAMS)
    row = (batch.to(tl.int64) * heads + head) * seq_len + token
    lse = LOG2E * tl.load(operands.lse + row * NUM_STREAMS + stream, mask=there, other=float("inf"))
    gate = load_gate(operands.weights, row, head, there, NUM_STREAMS, stream, (TOKEN_WEIGHTS & GATES) != 0)
    if HAS_STATE & GATES:
        gate *= load_alpha(operands, row, head, valid, GATES)
    return lse, gate


@triton.jit
def row_numbers_of(operands, local_head, seq_len, token, stream):
    """Pointers ``[BLOCK]`` to what query rows keep of a stream between kernels."""
    row = local_head.to(tl.int64) * seq_len + token
    return operands.row_numbers + (row * NUM_STREAMS + stream) * ROW_NUMBERS


@triton.jit
def store_row_numbers(at, valid, delta, lse, gate):
    """Leaves what those who own keys need of query rows, who would compute it anew for every key: ``delta``, the
    log-sum-exp in base 2, the gate over the total, and that times ``delta``."""
    tl.store(at, delta, mask=valid)
    tl.store(at + 1, lse, mask=valid)
    tl.store(at + 2, gate, mask=valid)
    tl.store(at + 3, gate * delta, mask=valid)


@triton.jit
def load_row_numbers(at, valid, ALL_VALID: tl.constexpr):
    """``(delta, log-sum-exp, gate, gate times delta)``; a row that is not there has probabilities of zero."""
    if ALL_VALID:
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    else:
        delta = tl.load(at, mask=valid, other=0.0)
        lse = tl.load(at + 1, mask=valid, other=float("inf"))
        gate = tl.load(at + 2, mask=valid, other=0.0)
        return delta, lse, gate, tl.load(at + 3, mask=valid, other=0.0)


@triton.jit
def inverse(total):
    """What makes rows of probabilities sum to one; of no meaning for a row that is not there, whose total is zero.

    A log-sum-exp is rounded to its own size, so the probabilities that are taken from it share a relative error.
    """
    return 1.0 / tl.where(total == 0, 1.0, total)


@triton.jit
def store_decay_sums(operands, head_index, program, num_programs, stream, value, partner_value):
    """Leaves a program's ``sum rho^2 dS`` of a stream and of the one behind it, and zeros for the other streams."""
    column = tl.arange(0, NUM_STREAMS)
    sums = tl.where(column == stream, value, tl.where(column == stream + 1, partner_value, 0.0))
    tl.store(operands.decay_sums + (head_index.to(tl.int64) * num_programs + program) * NUM_STREAMS + column, sums)


@triton.jit
def partial_of(workspace, slot, count, local, seq_len, D: tl.constexpr):
    """Pointer to token 0 of a head in a workspace ``[slots, count, T, D]``."""
    return workspace + (local.to(tl.int64) + slot * count) * seq_len * D


@triton.jit
def add_partials(
    parts, workspace, count, local, seq_len, token, valid, NUM_SLOTS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):
    """Rows in parts, and what earlier launches left for them in the first slots."""
    base = partial_of(workspace, 0, count, local, seq_len, D)
    slot_size = count.to(tl.int64) * seq_len * D
    return add_slots(parts, base, slot_size, token, valid, NUM_SLOTS, D, BLOCK_D, PARTS)


@triton.jit
def slot_of(family, FAMILIES: tl.constexpr):
    """Families before this one out of FAMILIES, a mask."""
    slot = 0
    for candidate in tl.static_range(4):
        if (FAMILIES >> candidate) & 1:
            slot += (candidate < family).to(tl.int32)
    return slot


@triton.jit
def probabilities(products, scale, slope, squared, lse, visible):
    """Softmax of one stream from products ``q.k`` and its log-sum-exp, in base 2; zero where a key is not visible."""
    logits = products * scale - lse - slope * squared
    if visible.dtype == tl.int1:
        return tl.exp2(tl.where(visible, logits, float("-inf")))
    else:
        return tl.exp2(tl.minimum(logits, visible, propagate_nan=tl.PropagateNan.ALL))
