"""Streams of long and of open lines, one at a time, each in one pass over blocks of the keys that it sees.

Along a line a stream sees a band: the keys that are ``low`` to ``high`` steps behind the query, or ahead of it. Blocks
of keys are counted from the block of queries, around the end of a closed line, and no
key is visited for the sake of the other arc. All blocks are masked: that only those at the ends of the band need it is
no use where there are two or three of them, and the compiler computes both ways of a condition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CLOSED, OPEN_BOTH, OPEN_PAST, before_end, from_half, strand, tokens_along, up_to
from ..primitives.parts import cast_to_parts, dot_parts, load_parts, scaled_parts, store_parts, sum_of_parts, zero_parts
from ..primitives.softmax import accumulate, anchor, finite, masked
from ..primitives.tiles import hidden_zero


@triton.jit
def _attend(
    q, k_base, v_base, stride_kt, stride_vt, line, block_position, low, high, reach, decline, queries, stride, slope,
    num_lines, length, loop, scale, acc, maximum, total, spread_total,
    AHEAD: tl.constexpr, STRAIGHT: tl.constexpr, TOPOLOGY: tl.constexpr, FORM: tl.constexpr, ALL: tl.constexpr,
    EVEN: tl.constexpr, HALFWAY: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Goes on with a softmax and its product with V over the keys that are ``low`` to ``high`` steps AHEAD of the query
    or else behind it, cut to ``reach`` ``[BLOCK_M]`` steps by packed documents; or over ALL keys of the line. A stream
    that is left out has no ``queries``."""
    rows = tl.minimum(BLOCK_M, queries - block_position)
    if ALL:
        begin, end = -block_position, length - block_position
    elif AHEAD:
        begin, end = low, rows + high
    else:
        begin, end = -high, rows - low
        if FORM == OPEN_PAST and EVEN:
            # No more blocks, and those next to the queries end with them; of keys further back none lie beyond the end.
            begin = tl.where(low == 0, -tl.cdiv(high, BLOCK_N) * BLOCK_N, begin)
    if FORM != CLOSED:
        begin, end = tl.maximum(begin, -block_position), tl.minimum(end, length - block_position)
    end = tl.where(queries > 0, end, begin)
    count = (high - low) + 1.0
    if HAS_FIRST_KEY:
        count = tl.maximum(tl.minimum(high, reach) - low + 1, 0).to(tl.float32)[:, None]
    # Of n steps beyond low, (low + n)^2 = low^2 + (2 low + n) n: what is squared is what is compared.
    nearest = low * 1.0
    of_low = -decline * (nearest * nearest)
    tilt = finite(-decline * (2.0 * nearest))
    offset = tl.arange(0, BLOCK_M).to(tl.float32)[:, None]
    column = tl.arange(0, BLOCK_N).to(tl.float32)[None, :]
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        position = block_position + place
        if FORM == CLOSED and not ALL:
            position = tl.where(position < 0, position + length, position)
            position = tl.where(position >= length, position - length, position)
        token = tokens_along(line, position, stride, slope, num_lines, STRAIGHT)
        valid = before_end(position, length, EVEN)
        k = load_parts(k_base, token, valid, stride_kt, D, BLOCK_D, PARTS)  # [BLOCK_N, D]
        v = load_parts(v_base, token, valid, stride_vt, D, BLOCK_D, PARTS)
        scores = dot_parts(q, k, PARTS, PRECISION) * scale  # [BLOCK_M, BLOCK_N]
        behind = offset - first * 1.0
        if ALL:
            TURNS: tl.constexpr = HALFWAY and FORM == CLOSED
            turn = from_half(0, first, loop, BLOCK_N, TURNS)
            _, squared = strand((behind + turn) - column, loop, high, FORM, TURNS)
            scores -= decline * squared
        else:
            beyond = column - (behind + nearest) if AHEAD else (behind - nearest) - column
            scores = masked((scores + of_low) + (tilt - decline * beyond) * beyond, up_to(beyond, count))
        if FORM == OPEN_BOTH or (ALL and not EVEN):
            scores = masked(scores, valid[None, :])
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
    loop, scale,
    STRAIGHT: tl.constexpr, TOPOLOGY: tl.constexpr, FORM: tl.constexpr, ARCS: tl.constexpr, EVEN: tl.constexpr,
    HALFWAY: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PARTS: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """The partial sum of a family's streams, then both softmaxes, a spiral's twice:
    ``(y, maximum, total, spread, partner's maximum, total, spread)``. Of arcs in several PARTS ``y`` is the second's
    alone, and the first's is left in ``line_partials``."""
    ALL: tl.constexpr = FORM != OPEN_PAST and not ARCS
    low, high = 0, max_step
    if ARCS and FORM != OPEN_BOTH:
        high = tl.minimum(loop // 2, max_step)
    if ARCS and FORM == OPEN_PAST:
        # For the second arc, but before the first: queries are not held as they were loaded.
        k = load_parts(k_base, query_token, query_valid, stride_kt, D, BLOCK_D, PARTS)
        own = tl.zeros([BLOCK_M], tl.float32)
        for part in tl.static_range(PARTS):
            own += tl.sum(q[part].to(tl.float32) * k[part].to(tl.float32), axis=1)
        own = tl.where(partner_queries > 0, own * scale, 0.0)  # of a stream that is left out any number but infinity
    maximum, total = _nothing_yet(queries, BLOCK_M)
    acc = zero_parts(BLOCK_M, BLOCK_D, PARTS)
    acc, maximum, total, spread_total = _attend(
        q, k_base, v_base, stride_kt, stride_vt, line, block_position, low, high, reach, decline, queries, stride,
        slope, num_lines, length, loop, scale, acc, maximum, total, tl.zeros([BLOCK_M], tl.float32),
        False, STRAIGHT, TOPOLOGY, FORM, ALL, EVEN, HALFWAY, HAS_FIRST_KEY, BLOCK_M, BLOCK_N, D, BLOCK_D, PARTS,
        WITH_ENTROPY, PRECISION,
    )
    maximum = anchor(maximum)
    y = scaled_parts(acc, (gate / total)[:, None], PARTS)
    if ARCS:
        # Computed anew, rows need not be held through the loop.
        query_position = block_position + hidden_zero(length) + tl.arange(0, BLOCK_M)
        query_token = tokens_along(line, query_position, stride, slope, num_lines, STRAIGHT)
        query_valid = before_end(query_position, length, EVEN)
    if ARCS and PARTS > 1:
        # Held beside the sums of the other arc it would be spilled.
        store_parts(line_partials, query_token, query_valid, D, y, D, BLOCK_D, PARTS)
    partner_maximum, partner_total, partner_spread = maximum, total, spread_total
    if ARCS:
        partner_maximum, partner_total = _nothing_yet(partner_queries, BLOCK_M)
        acc = zero_parts(BLOCK_M, BLOCK_D, PARTS)
        if FORM == OPEN_PAST:
            # Time only runs one way: the arc is half a loop and more behind, but for the query's own key.
            low, high = loop - loop // 2, max_step
            v = load_parts(v_base, query_token, query_valid, stride_vt, D, BLOCK_D, PARTS)
            partner_maximum = own
            partner_total = tl.exp2(own - anchor(own))
            acc = scaled_parts(v, partner_total[:, None], PARTS)
        acc, partner_maximum, partner_total, partner_spread = _attend(
            q, k_base, v_base, stride_kt, stride_vt, line, block_position, low, high, reach, partner_decline,
            partner_queries, stride, slope, num_lines, length, loop, scale, acc, partner_maximum,
            partner_total, tl.zeros([BLOCK_M], tl.float32), FORM != OPEN_PAST, STRAIGHT, TOPOLOGY, FORM, ALL, EVEN,
            HALFWAY, HAS_FIRST_KEY, BLOCK_M, BLOCK_N, D, BLOCK_D, PARTS, WITH_ENTROPY, PRECISION,
        )
        partner_maximum = anchor(partner_maximum)
        partner_y = scaled_parts(acc, (partner_gate / partner_total)[:, None], PARTS)
        y = partner_y if PARTS > 1 else sum_of_parts(y, partner_y, PARTS)
    return y, maximum, total, spread_total, partner_maximum, partner_total, partner_spread
