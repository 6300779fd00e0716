"""What both kernels of the line streams ask of a line: its shape, its tokens, and who sees whom along it."""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import (
    CAUSAL,
    MINOR,
    OPEN_PAST,
    arcs,
    line_family,
    line_start,
    squared_step,
    strand,
)
from .operands import base_of


@triton.jit
def line_of(
    family, line, n_major, n_minor, winding, seq_len, ARCS: tl.constexpr, FORM: tl.constexpr, TOPOLOGY: tl.constexpr
):
    """``(loop, stride, slope, num_lines, length, max_step, unit, stream, start)``: as of `line_family`, but the length
    is the line's own; then rho^2 of one step, the family's first stream, and `line_start`."""
    loop, stride, slope, num_lines, length, max_step = line_family(
        family, n_major, n_minor, winding, seq_len, TOPOLOGY
    )
    if TOPOLOGY == CAUSAL:
        length = tl.cdiv(seq_len - line, stride).to(tl.int32)
    stream = tl.where(family <= MINOR, 2 * family, family + 2)
    start = line_start(family, line, n_minor, ARCS or TOPOLOGY == CAUSAL, TOPOLOGY)
    return loop, stride, slope, num_lines, length, max_step, squared_step(loop, FORM), stream, start


@triton.jit
def line_base(rows, batch, head, start):
    """Pointer that the rows of a line are counted from."""
    return base_of(rows, batch, head) + start * rows.token


@triton.jit
def visibility(steps, loop, reach, on_line, ARCS: tl.constexpr, FORM: tl.constexpr, FULL_BLOCKS: tl.constexpr):
    """Which keys a family's streams see, and the squared distance in steps: ``(visible, partner_visible, squared)``; a
    spiral has no partner. ``on_line``, whether a key is on the line, broadcasts and is asked where it may not be."""
    if ARCS:
        visible, partner_visible, squared = arcs(steps, loop, reach, FORM)
    else:
        visible, squared = strand(steps, loop, reach, FORM)
        partner_visible = visible
    if not FULL_BLOCKS and FORM != OPEN_PAST:
        # In the past of a query no key is beyond the end of the line.
        visible = visible & on_line
        partner_visible = partner_visible & on_line
    return visible, partner_visible, squared
