"""Gradients of the parameters of a head, from what its programs left: sums in a fixed order, so that they repeat."""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import NUM_STREAMS
from .operands import PARAMETER_SUMS


@triton.jit(do_not_specialize=["batch", "heads", "tiles", "programs"])
def reduce_parameters(
    parameter_sums, decay_sums, d_weights, d_decay, d_alpha, batch, heads, tiles, programs,
    PER_HEAD_WEIGHTS: tl.constexpr, PER_HEAD_ALPHA: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program: ``d_weights`` ``[8]``, ``d_decay`` ``[8]`` and ``d_alpha`` of one head.

    ``parameter_sums`` ``[B, H, tiles, PARAMETER_SUMS]`` and ``decay_sums`` ``[B, H, programs, 8]`` are summed over
    batch and programs.
    """
    head = tl.program_id(0)
    column = tl.arange(0, PARAMETER_SUMS)
    stream = tl.arange(0, NUM_STREAMS)
    total = tl.zeros([PARAMETER_SUMS], tl.float32)
    decay_total = tl.zeros([NUM_STREAMS], tl.float32)
    for element in range(batch):
        index = head.to(tl.int64) + element * heads
        for first in range(0, tiles, BLOCK):
            tile = first + tl.arange(0, BLOCK)
            part = parameter_sums + (index * tiles + tile)[:, None] * PARAMETER_SUMS + column[None, :]
            mask = (tile < tiles)[:, None] & (column <= NUM_STREAMS)[None, :]
            total += tl.sum(tl.load(part, mask=mask, other=0.0), axis=0)
        for first in range(0, programs, BLOCK):
            program = first + tl.arange(0, BLOCK)
            part = decay_sums + (index * programs + program)[:, None] * NUM_STREAMS + stream[None, :]
            decay_total += tl.sum(tl.load(part, mask=(program < programs)[:, None], other=0.0), axis=0)
    if PER_HEAD_WEIGHTS:
        tl.store(d_weights + head * NUM_STREAMS + column, total, mask=column < NUM_STREAMS)
    tl.store(d_decay + head * NUM_STREAMS + stream, -0.5 * decay_total)
    if PER_HEAD_ALPHA:
        tl.store(d_alpha + head + column * 0, total, mask=column == NUM_STREAMS)
