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
    NUM_STREAMS,
    OPEN_BOTH,
    OPEN_PAST,
    PERIODIC,
    line_program,
    line_steps,
    oldest_key,
    reach_of,
    tokens_along,
)
from ..primitives.softmax import LOG2E, bias_slope
from ..primitives.tiles import dot_transposed, dot_twice, hidden_zero, load_rows, no_sums, partial_sums, total_of
from .line import line_base, line_of, visibility
from .operands import (
    accumulate_rows,
    inverse,
    load_stream,
    partial_of,
    probabilities,
    row_sums_of,
    slot_of,
    store_decay_sums,
)


@triton.jit
def _normalised(gate, deltas, totals):
    """``(gate, delta, inverse total)``: a stream's gate and ``delta`` of the probabilities that sum to one."""
    normaliser = inverse(tl.sum(totals, axis=1))
    return gate * normaliser, tl.sum(deltas, axis=1) * normaliser, normaliser


@triton.jit
def _queries_of_line(
    operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_head, first_program, num_programs, slot,
    family, line, block,
    ARCS: tl.constexpr, FORM: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, ONE_TILE: tl.constexpr,
    FULL_BLOCKS: tl.constexpr, ACCUMULATE: tl.constexpr, GATES: tl.constexpr, HAS_FIRST_KEY: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    local_head, num_heads = tl.program_id(1), tl.num_programs(1)
    batch, head = (first_head + local_head) // heads, (first_head + local_head) % heads
    kv_head = head // group
    STRAIGHT: tl.constexpr = ARCS or TOPOLOGY == CAUSAL
    loop, stride, slope, num_lines, length, max_step, unit, stream, start = line_of(
        family, line, n_major, n_minor, winding, seq_len, ARCS, FORM, TOPOLOGY
    )
    decline = bias_slope(tl.load(operands.decay + head * NUM_STREAMS + stream), unit)
    if ARCS:
        partner_decline = bias_slope(tl.load(operands.decay + head * NUM_STREAMS + stream + 1), unit)

    first_position = block * BLOCK_M
    position = first_position + tl.arange(0, BLOCK_M)
    valid = position < length
    place = tokens_along(line, position, stride, slope, num_lines, STRAIGHT)
    token = start + place
    q = load_rows(line_base(operands.q, batch, head, start), place, valid, operands.q.token, D, BLOCK_D)  # [BLOCK_M, D]
    d_out = load_rows(line_base(operands.d_out, batch, head, start), place, valid, operands.d_out.token, D, BLOCK_D)
    lse, gate = load_stream(operands, batch, head, heads, seq_len, token, valid, stream, STREAMS, GATES)
    if ARCS:
        partner_lse, partner_gate = load_stream(
            operands, batch, head, heads, seq_len, token, valid, stream + 1, STREAMS, GATES
        )
    reach = max_step
    if HAS_FIRST_KEY:
        oldest = oldest_key(operands.first_key, batch, token, valid, seq_len)
        reach = reach_of(oldest, line, stride, position, max_step)[:, None]

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
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Given anew by the first sweep, or where there is one tile inside the loop, before which they must exist.
    delta = tl.zeros([BLOCK_M], tl.float32)
    normaliser = delta
    partner_delta = delta
    partner_normaliser = delta
    SWEEPS: tl.constexpr = 1 if ONE_TILE else 2
    for sweep in tl.static_range(SWEEPS):
        for begin in range(key_begin, key_end, BLOCK_N):
            key_position = begin + tl.arange(0, BLOCK_N)
            key_valid = key_position < length
            key_place = tokens_along(line, key_position, stride, slope, num_lines, STRAIGHT)
            k = load_rows(k_base, key_place, key_valid, operands.k.token, D, BLOCK_D)  # [BLOCK_N, D]
            v = load_rows(v_base, key_place, key_valid, operands.v.token, D, BLOCK_D)
            products = dot_transposed(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
            d_probs = dot_transposed(d_out, v, PRECISION)
            visible, partner_visible, squared = visibility(
                line_steps(position, key_position), loop, reach, key_valid[None, :], ARCS, FORM, FULL_BLOCKS
            )
            probs = probabilities(products, scale * LOG2E, decline, squared, lse[:, None], visible)
            if ARCS:
                partner_probs = probabilities(
                    products, scale * LOG2E, partner_decline, squared, partner_lse[:, None], partner_visible
                )
            if sweep == 0:
                totals += partial_sums(probs)
                deltas += partial_sums(probs * d_probs)
                if ARCS:
                    partner_totals += partial_sums(partner_probs)
                    partner_deltas += partial_sums(partner_probs * d_probs)
            if ONE_TILE:
                gate, delta, normaliser = _normalised(gate, deltas, totals)
                if ARCS:
                    partner_gate, partner_delta, partner_normaliser = _normalised(
                        partner_gate, partner_deltas, partner_totals
                    )
            if sweep == SWEEPS - 1:
                d_scores = probs * (gate[:, None] * d_probs - (gate * delta)[:, None])
                decay_sums += partial_sums(squared * d_scores)
                if ARCS:
                    partner_d_scores = partner_probs * (
                        partner_gate[:, None] * d_probs - (partner_gate * partner_delta)[:, None]
                    )
                    partner_decay_sums += partial_sums(squared * partner_d_scores)
                    d_scores += partner_d_scores
                d_q = dot_twice(d_scores, k, PRECISION, d_q)
        if sweep == 0 and not ONE_TILE:
            gate, delta, normaliser = _normalised(gate, deltas, totals)
            if ARCS:
                partner_gate, partner_delta, partner_normaliser = _normalised(
                    partner_gate, partner_deltas, partner_totals
                )

    position = first_position + hidden_zero(seq_len) + tl.arange(0, BLOCK_M)
    valid = position < length
    place = tokens_along(line, position, stride, slope, num_lines, STRAIGHT)
    sums = row_sums_of(operands, local_head, seq_len, start + place) + stream
    tl.store(sums, delta, mask=valid)
    tl.store(sums + NUM_STREAMS, normaliser, mask=valid)
    if ARCS:
        tl.store(sums + 1, partner_delta, mask=valid)
        tl.store(sums + 1 + NUM_STREAMS, partner_normaliser, mask=valid)
    store_decay_sums(operands, first_head + local_head, first_program + tl.program_id(0), num_programs, stream,
                     unit * total_of(decay_sums), unit * total_of(partner_decay_sums))
    d_q_base = partial_of(operands.d_q, slot, num_heads, local_head, seq_len, D)
    accumulate_rows(d_q_base + start * D, place, valid, scale * d_q, ACCUMULATE, D, BLOCK_D)


@triton.jit(do_not_specialize=[
    "heads", "group", "seq_len", "n_major", "n_minor", "winding", "first_head", "first_program", "num_programs",
])
def lines_by_queries(
    operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_head, first_program, num_programs,
    FAMILIES: tl.constexpr, GRID_FAMILIES: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr,
    ONE_TILE: tl.constexpr, FULL_BLOCKS: tl.constexpr, ACCUMULATE: tl.constexpr, GATES: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: a block of queries of one line, for one head.

    Grid: ``(line_programs(...), query heads of the chunk)``; families and programs as in `lines_by_keys`. ONE_TILE
    where a block of keys holds every key that a query sees, FULL_BLOCKS where blocks of keys divide every line.
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
                ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )
    elif (TOPOLOGY == CYLINDER) & (family == MINOR):
        if TOPOLOGY == CYLINDER and GRID_FAMILIES & 2:
            _queries_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_head, first_program,
                num_programs, slot, family, line, block, True, CLOSED, TOPOLOGY, STREAMS, ONE_TILE, FULL_BLOCKS,
                ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )
    else:
        if GRID_FAMILIES & 3:
            _queries_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_head, first_program,
                num_programs, slot, family, line, block, True, FORM, TOPOLOGY, STREAMS, ONE_TILE, FULL_BLOCKS,
                ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )
