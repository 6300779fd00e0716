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
    arcs,
    line_family,
    line_program,
    line_steps,
    oldest_key,
    reach_of,
    squared_step,
    strand,
)
from ..primitives.softmax import LOG2E, bias_slope
from ..primitives.tiles import dot_transposed, dot_twice, load_rows
from .operands import (
    accumulate_rows,
    base_of,
    inverse,
    load_stream,
    partial_of,
    probabilities,
    row_sums_of,
    slot_of,
    store_decay_sums,
    tokens_at,
)


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
    loop, stride, slope, num_lines, length, max_step = line_family(
        family, n_major, n_minor, winding, seq_len, TOPOLOGY
    )
    if TOPOLOGY == CAUSAL:
        length = tl.cdiv(seq_len - line, stride).to(tl.int32)
    if ARCS or TOPOLOGY == CAUSAL:
        slope = 0  # known to the compiler, it spares divisions
    unit = squared_step(loop, FORM)
    stream = tl.where(family <= MINOR, 2 * family, family + 2)
    decline = bias_slope(tl.load(operands.decay + head * NUM_STREAMS + stream), unit)
    if ARCS:
        partner_decline = bias_slope(tl.load(operands.decay + head * NUM_STREAMS + stream + 1), unit)

    first_position = block * BLOCK_M
    position = first_position + tl.arange(0, BLOCK_M)
    valid = position < length
    token = tokens_at(family, line, position, n_minor, stride, slope, num_lines, TOPOLOGY)
    q = load_rows(base_of(operands.q, batch, head), token, valid, operands.q.token, D, BLOCK_D)  # [BLOCK_M, D]
    d_out = load_rows(base_of(operands.d_out, batch, head), token, valid, operands.d_out.token, D, BLOCK_D)
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
        key_end = length
    k_base, v_base = base_of(operands.k, batch, kv_head), base_of(operands.v, batch, kv_head)
    total = tl.zeros([BLOCK_M], tl.float32)
    partner_total = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    partner_delta = tl.zeros([BLOCK_M], tl.float32)
    decay_sum = tl.zeros([BLOCK_M], tl.float32)  # sum of squared steps times dS
    partner_decay_sum = tl.zeros([BLOCK_M], tl.float32)
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    SWEEPS: tl.constexpr = 1 if ONE_TILE else 2
    for sweep in tl.static_range(SWEEPS):
        for begin in range(key_begin, key_end, BLOCK_N):
            key_position = begin + tl.arange(0, BLOCK_N)
            key_valid = key_position < length
            key_token = tokens_at(family, line, key_position, n_minor, stride, slope, num_lines, TOPOLOGY)
            k = load_rows(k_base, key_token, key_valid, operands.k.token, D, BLOCK_D)  # [BLOCK_N, D]
            v = load_rows(v_base, key_token, key_valid, operands.v.token, D, BLOCK_D)
            products = dot_transposed(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
            d_probs = dot_transposed(d_out, v, PRECISION)
            steps = line_steps(position, key_position)
            if ARCS:
                visible, partner_visible, squared = arcs(steps, loop, reach, FORM)
                if not FULL_BLOCKS and FORM != OPEN_PAST:
                    partner_visible = partner_visible & key_valid[None, :]
                partner_probs = probabilities(
                    products, scale * LOG2E, partner_decline, squared, partner_lse[:, None], partner_visible
                )
            else:
                visible, squared = strand(steps, loop, reach, FORM)
            if not FULL_BLOCKS and FORM != OPEN_PAST:
                visible = visible & key_valid[None, :]
            probs = probabilities(products, scale * LOG2E, decline, squared, lse[:, None], visible)
            if sweep == 0:
                total += tl.sum(probs, axis=1)
                delta += tl.sum(probs * d_probs, axis=1)
                if ARCS:
                    partner_total += tl.sum(partner_probs, axis=1)
                    partner_delta += tl.sum(partner_probs * d_probs, axis=1)
            if ONE_TILE:
                delta *= inverse(total)
                partner_delta *= inverse(partner_total)
            if sweep == SWEEPS - 1:
                d_scores = (gate * inverse(total))[:, None] * probs * (d_probs - delta[:, None])
                decay_sum += tl.sum(squared * d_scores, axis=1)
                if ARCS:
                    partner_gates = (partner_gate * inverse(partner_total))[:, None]
                    partner_d_scores = partner_gates * partner_probs * (d_probs - partner_delta[:, None])
                    partner_decay_sum += tl.sum(squared * partner_d_scores, axis=1)
                    d_scores += partner_d_scores
                d_q = dot_twice(d_scores, k, PRECISION, d_q)
        if sweep == 0 and not ONE_TILE:
            delta *= inverse(total)
            partner_delta *= inverse(partner_total)

    sums = row_sums_of(operands, local_head, seq_len, token) + stream
    tl.store(sums, delta, mask=valid)
    tl.store(sums + NUM_STREAMS, inverse(total), mask=valid)
    if ARCS:
        tl.store(sums + 1, partner_delta, mask=valid)
        tl.store(sums + 1 + NUM_STREAMS, inverse(partner_total), mask=valid)
    store_decay_sums(operands, first_head + local_head, first_program + tl.program_id(0), num_programs, stream,
                     unit * tl.sum(decay_sum, axis=0), unit * tl.sum(partner_decay_sum, axis=0))
    d_q_base = partial_of(operands.d_q, slot, num_heads, local_head, seq_len, D)
    accumulate_rows(d_q_base, token, valid, scale * d_q, ACCUMULATE, D, BLOCK_D)


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
