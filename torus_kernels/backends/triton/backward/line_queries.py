"""Backward of the line streams, queries first: lines of several key blocks, before `lines` visits their keys.

A program owns a block of queries. It sweeps the keys once for ``delta`` and once for the gradient of the queries, or
only once where all the keys that it sees are one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import (
    CAUSAL,
    CLOSED,
    CYLINDER,
    MINOR,
    OPEN_BOTH,
    OPEN_PAST,
    PERIODIC,
    from_half,
    line_program,
    line_steps,
    tokens_along,
)
from ..primitives.parts import accumulate_parts, dot_parts, load_parts, scaled_parts, twice_to_parts, zero_parts
from ..primitives.softmax import LOG2E, bias_slope
from ..primitives.tiles import hidden_zero, no_sums, partial_sums, total_of
from .line import line_base, line_of, queries_of_line, visibility
from .operands import (
    ROW_NUMBERS,
    inverse,
    load_decay,
    load_stream,
    partial_of,
    probabilities,
    row_numbers_of,
    slot_of,
    store_decay_sums,
    store_row_numbers,
)


@triton.jit
def _normalised(gate, deltas, totals):
    """``(gate, delta)`` of a stream: over its total, and of the probabilities that sum to one."""
    normaliser = inverse(tl.sum(totals, axis=1))
    return gate * normaliser, tl.sum(deltas, axis=1) * normaliser


@triton.jit
def _tile(
    q, d_out, k_base, v_base, stride_kt, stride_vt, position, lse, partner_lse, decline, partner_decline, reach,
    first_position, begin, line, shape, scale,
    ARCS: tl.constexpr, FORM: tl.constexpr, STRAIGHT: tl.constexpr, FULL_BLOCKS: tl.constexpr, HALFWAY: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """What a block of keys is to the queries, ``[BLOCK_M, BLOCK_N]`` but for the keys: ``(k, dP, squared steps, P,
    partner's P)``; ``shape`` is that of the line, as of `line_of`."""
    loop, stride, slope, num_lines, length, _, _, _, _ = shape
    key_position = begin + tl.arange(0, BLOCK_N)
    key_valid = key_position < length
    key_place = tokens_along(line, key_position, stride, slope, num_lines, STRAIGHT)
    k = load_parts(k_base, key_place, key_valid, stride_kt, D, BLOCK_D, PARTS)  # [BLOCK_N, D]
    v = load_parts(v_base, key_place, key_valid, stride_vt, D, BLOCK_D, PARTS)
    products = dot_parts(q, k, PARTS, PRECISION)  # [BLOCK_M, BLOCK_N]
    d_probs = dot_parts(d_out, v, PARTS, PRECISION)
    # Counted from the block, places along its columns are the same for every block.
    TURNS: tl.constexpr = HALFWAY and not ARCS and FORM == CLOSED
    turn = from_half(first_position, begin, loop, BLOCK_N, TURNS)
    steps = line_steps(position - begin + turn, tl.arange(0, BLOCK_N), True)
    visible, partner_visible, squared = visibility(
        steps, loop, reach, key_valid[None, :], ARCS, FORM, FULL_BLOCKS, q[0].dtype != tl.float32, TURNS
    )
    probs = probabilities(products, scale * LOG2E, decline, squared, lse[:, None], visible)
    partner_probs = probs
    if ARCS:
        partner_probs = probabilities(
            products, scale * LOG2E, partner_decline, squared, partner_lse[:, None], partner_visible
        )
    return k, d_probs, squared, probs, partner_probs


@triton.jit
def _queries_of_line(
    operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_head, first_program, num_programs, slot,
    family, line, block,
    ARCS: tl.constexpr, FORM: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, ONE_TILE: tl.constexpr,
    FULL_BLOCKS: tl.constexpr, HALFWAY: tl.constexpr, ACCUMULATE: tl.constexpr, GATES: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUMMED_N: tl.constexpr,
):
    local_head, num_heads = tl.program_id(1), tl.num_programs(1)
    batch, head = (first_head + local_head) // heads, (first_head + local_head) % heads
    kv_head = head // group
    STRAIGHT: tl.constexpr = ARCS or TOPOLOGY == CAUSAL
    shape = line_of(family, line, n_major, n_minor, winding, seq_len, ARCS, FORM, TOPOLOGY)
    _, stride, slope, num_lines, length, max_step, unit, stream, start = shape
    decline = bias_slope(load_decay(operands, head, stream, STREAMS), unit)
    partner_decline = decline
    if ARCS:
        partner_decline = bias_slope(load_decay(operands, head, stream + 1, STREAMS), unit)

    first_position = block * BLOCK_M
    position = first_position + tl.arange(0, BLOCK_M)
    token, valid, q, d_out, reach = queries_of_line(
        operands, batch, head, seq_len, line, shape, first_position, ARCS, TOPOLOGY, HAS_FIRST_KEY, D, BLOCK_D, PARTS,
        BLOCK_M,
    )
    lse, gate = load_stream(operands, batch, head, heads, seq_len, token, valid, stream, STREAMS, GATES)
    partner_lse = lse
    if ARCS:
        partner_lse, partner_gate = load_stream(
            operands, batch, head, heads, seq_len, token, valid, stream + 1, STREAMS, GATES
        )
    if HAS_FIRST_KEY:
        reach = reach[:, None]

    if FORM == OPEN_PAST:
        key_begin = tl.maximum(first_position - max_step, 0)
        key_end = tl.minimum(length, first_position + BLOCK_M)
    else:
        key_begin = 0
        key_end = BLOCK_N if ONE_TILE else length
    k_base, v_base = line_base(operands.k, batch, kv_head, start), line_base(operands.v, batch, kv_head, start)
    totals = no_sums(BLOCK_M)
    partner_totals = totals
    deltas = totals
    partner_deltas = totals
    decay_sums = totals  # of squared steps times dS
    partner_decay_sums = totals
    d_q = zero_parts(BLOCK_M, BLOCK_D, PARTS)
    # Given anew by the first sweep, or where there is one tile inside the loop, before which they must exist.
    delta = tl.zeros([BLOCK_M], tl.float32)
    partner_delta = delta
    if not ONE_TILE:
        for begin in range(key_begin, key_end, SUMMED_N):
            _k, d_probs, _squared, probs, partner_probs = _tile(
                q, d_out, k_base, v_base, operands.k.token, operands.v.token, position, lse, partner_lse, decline,
                partner_decline, reach, first_position, begin, line, shape, scale, ARCS, FORM, STRAIGHT, FULL_BLOCKS,
                HALFWAY, PRECISION, D, BLOCK_D, PARTS, SUMMED_N,
            )
            totals += partial_sums(probs)
            deltas += partial_sums(probs * d_probs)
            if ARCS:
                partner_totals += partial_sums(partner_probs)
                partner_deltas += partial_sums(partner_probs * d_probs)
        gate, delta = _normalised(gate, deltas, totals)
        if ARCS:
            partner_gate, partner_delta = _normalised(partner_gate, partner_deltas, partner_totals)
    for begin in range(key_begin, key_end, BLOCK_N):
        k, d_probs, squared, probs, partner_probs = _tile(
            q, d_out, k_base, v_base, operands.k.token, operands.v.token, position, lse, partner_lse, decline,
            partner_decline, reach, first_position, begin, line, shape, scale, ARCS, FORM, STRAIGHT, FULL_BLOCKS,
            HALFWAY, PRECISION, D, BLOCK_D, PARTS, BLOCK_N,
        )
        if ONE_TILE:
            gate, delta = _normalised(gate, partial_sums(probs * d_probs), partial_sums(probs))
            if ARCS:
                partner_gate, partner_delta = _normalised(
                    partner_gate, partial_sums(partner_probs * d_probs), partial_sums(partner_probs)
                )
        d_scores = probs * (gate[:, None] * d_probs - (gate * delta)[:, None])
        decay_sums += partial_sums(squared * d_scores)
        if ARCS:
            partner_d_scores = partner_probs * (
                partner_gate[:, None] * d_probs - (partner_gate * partner_delta)[:, None]
            )
            partner_decay_sums += partial_sums(squared * partner_d_scores)
            d_scores += partner_d_scores
        d_q = twice_to_parts(d_scores, k, d_q, PARTS, PRECISION)

    position = first_position + hidden_zero(seq_len) + tl.arange(0, BLOCK_M)
    valid = position < length
    place = tokens_along(line, position, stride, slope, num_lines, STRAIGHT)
    numbers = row_numbers_of(operands, local_head, seq_len, start + place, stream)
    store_row_numbers(numbers, valid, delta, lse, gate)
    if ARCS:
        store_row_numbers(numbers + ROW_NUMBERS, valid, partner_delta, partner_lse, partner_gate)
    store_decay_sums(operands, first_head + local_head, first_program + tl.program_id(0), num_programs, stream,
                     unit * total_of(decay_sums), unit * total_of(partner_decay_sums))
    d_q_base = partial_of(operands.d_q, slot, num_heads, local_head, seq_len, D)
    d_q = scaled_parts(d_q, scale, PARTS)
    accumulate_parts(d_q_base + start * D, place, valid, d_q, ACCUMULATE, D, BLOCK_D, PARTS)


@triton.jit(do_not_specialize=[
    "heads", "group", "seq_len", "n_major", "n_minor", "winding", "first_head", "first_program", "num_programs",
])
def lines_by_queries(
    operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_head, first_program, num_programs,
    FAMILIES: tl.constexpr, GRID_FAMILIES: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr,
    ONE_TILE: tl.constexpr, FULL_BLOCKS: tl.constexpr, HALFWAY: tl.constexpr, ACCUMULATE: tl.constexpr,
    GATES: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUMMED_N: tl.constexpr,
):
    """One program: a block of queries of one line, for one head.

    Grid: ``(line_programs(...), query heads of the chunk)``; families and programs as in `lines_by_keys`. ONE_TILE
    where a block of keys holds every key that a query sees, FULL_BLOCKS where blocks of keys divide every line, HALFWAY
    where `halfway` for closed lines. The sweep for ``delta`` goes by SUMMED_N keys.
    """
    family, line, block = line_program(
        tl.program_id(0), n_major, n_minor, winding, seq_len, TOPOLOGY, GRID_FAMILIES, BLOCK_M, 1
    )
    slot = slot_of(family, FAMILIES)
    FORM: tl.constexpr = CLOSED if TOPOLOGY == PERIODIC else (OPEN_PAST if TOPOLOGY == CAUSAL else OPEN_BOTH)
    if family > MINOR:
        if GRID_FAMILIES & 12:
            _queries_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_head, first_program,
                num_programs, slot, family, line, block, False, FORM, TOPOLOGY, STREAMS, ONE_TILE, FULL_BLOCKS,
                HALFWAY, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, PARTS, BLOCK_M, BLOCK_N, SUMMED_N,
            )
    elif (TOPOLOGY == CYLINDER) & (family == MINOR):
        if TOPOLOGY == CYLINDER and GRID_FAMILIES & 2:
            _queries_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_head, first_program,
                num_programs, slot, family, line, block, True, CLOSED, TOPOLOGY, STREAMS, ONE_TILE, FULL_BLOCKS,
                HALFWAY, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, PARTS, BLOCK_M, BLOCK_N, SUMMED_N,
            )
    else:
        if GRID_FAMILIES & 3:
            _queries_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_head, first_program,
                num_programs, slot, family, line, block, True, FORM, TOPOLOGY, STREAMS, ONE_TILE, FULL_BLOCKS,
                HALFWAY, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, PARTS, BLOCK_M, BLOCK_N, SUMMED_N,
            )
