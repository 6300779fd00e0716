"""Streams of long and of open lines, one at a time, each in one pass over blocks of the keys that it sees.

Along a line a stream sees a band: the keys that are ``low`` to ``high`` steps behind the query, or ahead of it where
steps are negative. Blocks of keys are counted from the block of queries, around the end of a closed line, and no
key is visited for the sake of the other arc. All blocks are masked: that only those at the ends of the band need it is
no use where there are two or three of them, and the compiler computes both ways of a condition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CLOSED, OPEN_BOTH, OPEN_PAST, on_line, strand, tokens_along
from ..primitives.parts import cast_to_parts, dot_parts, load_parts, scaled_parts, store_parts, sum_of_parts, zero_parts
from ..primitives.softmax import accumulate, anchor, masked
from ..primitives.tiles import hidden_zero


@triton.jit
def _attend(
    q, k_base, v_base, stride_kt, stride_vt, line, block_position, low, high, reach, decline, queries, stride, slope,
    num_lines, length, remaining, loop, scale, acc, maximum, total, spread_total,
    STRAIGHT: tl.constexpr, TOPOLOGY: tl.constexpr, FORM: tl.constexpr, AROUND: tl.constexpr, EVEN: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """Goes on with a softmax and its product with V over a band, cut to ``reach`` ``[BLOCK_M]`` steps by packed
    documents; ``AROUND``, over all keys of a closed line, which are near either way round. A stream that is left out
    has no ``queries``."""
    rows = tl.minimum(BLOCK_M, queries - block_position)
    if AROUND:
        begin, end = -block_position, length - block_position
    elif FORM == CLOSED:
        begin, end = -high, rows - low
    else:
        begin, end = tl.maximum(-high, -block_position), tl.minimum(rows - low, length - block_position)
    end = tl.where(queries > 0, end, begin)
    furthest = high * 1.0
    if HAS_FIRST_KEY:
        furthest = tl.minimum(high, reach).to(tl.float32)[:, None]
    # Of steps from low to high, those less their mean are at most half the band: one comparison.
    middle = (low + furthest) * 0.5
    half_width = (furthest - low) * 0.5
    offset = tl.arange(0, BLOCK_M).to(tl.float32)[:, None]
    column = tl.arange(0, BLOCK_N).to(tl.float32)[None, :]
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        position = block_position + place
        if FORM == CLOSED and not AROUND:
            position = tl.where(position < 0, position + length, position)
            position = tl.where(position >= length, position - length, position)
        token = tokens_along(line, position, stride, slope, num_lines, STRAIGHT)
        valid = on_line(position, token, length, remaining, TOPOLOGY, EVEN)
        k = load_parts(k_base, token, valid, stride_kt, D, BLOCK_D, PARTS)  # [BLOCK_N, D]
        v = load_parts(v_base, token, valid, stride_vt, D, BLOCK_D, PARTS)
        ahead = offset - first * 1.0
        steps = ahead - column
        scores = dot_parts(q, k, PARTS, PRECISION) * scale  # [BLOCK_M, BLOCK_N]
        if AROUND:
            _, squared = strand(steps, loop, high, FORM)
            scores -= decline * squared
            if not EVEN:
                scores = masked(scores, valid[None, :])
        else:
            visible = tl.abs((ahead - middle) - column) <= half_width
            if FORM == OPEN_BOTH:
                visible = visible & valid[None, :]
            scores = masked(scores - decline * (steps * steps), visible)
        p, kept, maximum, total, spread_total = accumulate(
            (scores,), (0.0,), maximum, total, spread_total, 1, WITH_ENTROPY
        )
        acc = cast_to_parts(p[0], v, scaled_parts(acc, kept[:, None], PARTS), PARTS, PRECISION)
    return acc, maximum, total, spread_total


@triton.jit
def _nothing_yet(queries, BLOCK_M: tl.constexpr):
    """``(maximum, total)`` before the first key; a stream that is left out is not divided by zero."""
    empty = tl.where(queries > 0, 0.0, 1.0)
    return tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32) + empty


@triton.jit
def attend_bands(
    q, k_base, v_base, line_partials, stride_kt, stride_vt, line, block_position, query_token, query_valid, reach,
    decline, partner_decline, queries, partner_queries, gate, partner_gate, max_step, stride, slope, num_lines, length,
    remaining, loop, scale,
    STRAIGHT: tl.constexpr, TOPOLOGY: tl.constexpr, FORM: tl.constexpr, ARCS: tl.constexpr, EVEN: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """The partial sum of a family's streams, then both softmaxes, a spiral's twice:
    ``(y, maximum, total, spread, partner's maximum, total, spread)``. Of arcs in several PARTS ``y`` is the second's
    alone, and the first's is left in ``line_partials``."""
    AROUND: tl.constexpr = FORM == CLOSED and not ARCS
    low, high = 0, max_step
    if ARCS and FORM != OPEN_BOTH:
        high = tl.minimum(loop // 2, max_step)
    if not ARCS and FORM == OPEN_BOTH:
        low = -max_step
    if ARCS and FORM == OPEN_PAST:
        # For the second arc, but before the first: queries are not held as they were loaded.
        k = load_parts(k_base, query_token, query_valid, stride_kt, D, BLOCK_D, PARTS)
        own = tl.zeros([BLOCK_M], tl.float32)
        for part in tl.static_range(PARTS):
            own += tl.sum(q[part].to(tl.float32) * k[part].to(tl.float32), axis=1)
        own *= scale
    maximum, total = _nothing_yet(queries, BLOCK_M)
    acc = zero_parts(BLOCK_M, BLOCK_D, PARTS)
    acc, maximum, total, spread_total = _attend(
        q, k_base, v_base, stride_kt, stride_vt, line, block_position, low, high, reach, decline, queries, stride,
        slope, num_lines, length, remaining, loop, scale, acc, maximum, total, tl.zeros([BLOCK_M], tl.float32),
        STRAIGHT, TOPOLOGY, FORM, AROUND, EVEN, HAS_FIRST_KEY, BLOCK_M, BLOCK_N, D, BLOCK_D, PARTS, WITH_ENTROPY,
        PRECISION,
    )
    maximum = anchor(maximum)
    y = scaled_parts(acc, (gate / total)[:, None], PARTS)
    if ARCS:
        # Computed anew, rows need not be held through the loop.
        query_position = block_position + hidden_zero(remaining) + tl.arange(0, BLOCK_M)
        query_token = tokens_along(line, query_position, stride, slope, num_lines, STRAIGHT)
        query_valid = on_line(query_position, query_token, length, remaining, TOPOLOGY, EVEN)
    if ARCS and PARTS > 1:
        # Held beside the sums of the other arc it would be spilled.
        store_parts(line_partials, query_token, query_valid, D, y, D, BLOCK_D, PARTS)
    partner_maximum, partner_total, partner_spread = maximum, total, spread_total
    if ARCS:
        partner_maximum, partner_total = _nothing_yet(partner_queries, BLOCK_M)
        acc = zero_parts(BLOCK_M, BLOCK_D, PARTS)
        low, high = -high, 0
        if FORM == OPEN_PAST:
            # Time only runs one way: the arc is half a loop and more behind, but for the query's own key.
            low, high = loop - loop // 2, max_step
            v = load_parts(v_base, query_token, query_valid, stride_vt, D, BLOCK_D, PARTS)
            partner_maximum = own
            partner_total = tl.exp2(own - anchor(own))
            acc = scaled_parts(v, partner_total[:, None], PARTS)
        acc, partner_maximum, partner_total, partner_spread = _attend(
            q, k_base, v_base, stride_kt, stride_vt, line, block_position, low, high, reach, partner_decline,
            partner_queries, stride, slope, num_lines, length, remaining, loop, scale, acc, partner_maximum,
            partner_total, tl.zeros([BLOCK_M], tl.float32), STRAIGHT, TOPOLOGY, FORM, AROUND, EVEN, HAS_FIRST_KEY,
            BLOCK_M, BLOCK_N, D, BLOCK_D, PARTS, WITH_ENTROPY, PRECISION,
        )
        partner_maximum = anchor(partner_maximum)
        partner_y = scaled_parts(acc, (partner_gate / partner_total)[:, None], PARTS)
        y = partner_y if PARTS > 1 else sum_of_parts(y, partner_y, PARTS)
    return y, maximum, total, spread_total, partner_maximum, partner_total, partner_spread
