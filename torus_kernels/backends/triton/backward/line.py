"""What both kernels of the line streams ask of a line: its shape, its tokens, and who sees whom along it."""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import (
    CAUSAL,
    MINOR,
    OPEN_BOTH,
    OPEN_PAST,
    arc_ceilings,
    arcs,
    line_family,
    line_length,
    line_start,
    oldest_key,
    reach_of,
    squared_step,
    strand,
    tokens_along,
)
from ..primitives.parts import load_parts
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
    length = line_length(line, length, stride, seq_len, TOPOLOGY)
    stream = tl.where(family <= MINOR, 2 * family, family + 2)
    start = line_start(family, line, n_minor, ARCS or TOPOLOGY == CAUSAL, TOPOLOGY)
    return loop, stride, slope, num_lines, length, max_step, squared_step(loop, FORM), stream, start


@triton.jit
def line_base(rows, batch, head, start):
    """Pointer that the rows of a line are counted from."""
    return base_of(rows, batch, head) + start * rows.token


@triton.jit
def queries_of_line(
    operands, batch, head, seq_len, line, shape, begin,
    ARCS: tl.constexpr, TOPOLOGY: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """A block of queries from a position on: ``(token, valid, q, d_out, reach)``. Rows ``[BLOCK_M, D]`` are in parts;
    the steps that a query sees are a vector where packed documents cut them."""
    _, stride, slope, num_lines, length, max_step, _, _, start = shape
    position = begin + tl.arange(0, BLOCK_M)
    valid = position < length
    place = tokens_along(line, position, stride, slope, num_lines, ARCS or TOPOLOGY == CAUSAL)
    token = start + place
    q = load_parts(line_base(operands.q, batch, head, start), place, valid, operands.q.token, D, BLOCK_D, PARTS)
    d_out = load_parts(
        line_base(operands.d_out, batch, head, start), place, valid, operands.d_out.token, D, BLOCK_D, PARTS
    )
    reach = max_step
    if HAS_FIRST_KEY:
        oldest = oldest_key(operands.first_key, batch, token, valid, seq_len)
        reach = reach_of(oldest, line, stride, position, max_step)
    return token, valid, q, d_out, reach


@triton.jit
def visibility(
    steps, loop, reach, on_line,
    ARCS: tl.constexpr, FORM: tl.constexpr, FULL_BLOCKS: tl.constexpr, CEILINGS: tl.constexpr,
    HALFWAY: tl.constexpr,
):
    """Which keys a family's streams see, and the squared distance in steps: ``(visible, partner_visible, squared)``; a
    spiral has no partner. ``on_line``, whether a key is on the line, broadcasts and is asked where it may not be. With
    CEILINGS the first two may be those of `arc_ceilings`: fewer instructions, and more registers at once. Steps of a
    spiral may be moved by `from_half`, HALFWAY."""
    if ARCS and FORM != OPEN_BOTH and CEILINGS:
        visible, partner_visible, squared = arc_ceilings(steps, loop, reach, FORM)
        hidden: tl.constexpr = float("-inf")
    else:
        if ARCS:
            visible, partner_visible, squared = arcs(steps, loop, reach, FORM)
        else:
            visible, squared = strand(steps, loop, reach, FORM, HALFWAY)
            partner_visible = visible
        hidden: tl.constexpr = False
    if not FULL_BLOCKS and FORM != OPEN_PAST:
        # In the past of a query no key is beyond the end of the line.
        visible = tl.where(on_line, visible, hidden)
        partner_visible = tl.where(on_line, partner_visible, hidden)
    return visible, partner_visible, squared
