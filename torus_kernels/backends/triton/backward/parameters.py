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
    is_decay = (column >= NUM_STREAMS) & (column < 2 * NUM_STREAMS)
    total = tl.zeros([PARAMETER_SUMS], tl.float32)
    for element in range(batch):
        index = head.to(tl.int64) + element * heads
        for first in range(0, tiles, BLOCK):
            tile = first + tl.arange(0, BLOCK)
            part = parameter_sums + (index * tiles + tile)[:, None] * PARAMETER_SUMS + column[None, :]
            mask = (tile < tiles)[:, None] & (column <= 2 * NUM_STREAMS)[None, :]
            total += tl.sum(tl.load(part, mask=mask, other=0.0), axis=0)
        for first in range(0, programs, BLOCK):
            program = first + tl.arange(0, BLOCK)
            part = decay_sums + (index * programs + program)[:, None] * NUM_STREAMS + (column - NUM_STREAMS)[None, :]
            mask = (program < programs)[:, None] & is_decay[None, :]
            total += tl.sum(tl.load(part, mask=mask, other=0.0), axis=0)
    of_stream = head * NUM_STREAMS + column
    if PER_HEAD_WEIGHTS:
        tl.store(d_weights + of_stream, total, mask=column < NUM_STREAMS)
    tl.store(d_decay + of_stream - NUM_STREAMS, -0.5 * total, mask=is_decay)
    if PER_HEAD_ALPHA:
        tl.store(d_alpha + head + column * 0, total, mask=column == 2 * NUM_STREAMS)
