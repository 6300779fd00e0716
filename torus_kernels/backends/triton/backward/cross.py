"""Backward of the cross flows, queries first, and all that ends with a query row: its gradient and its gates'.

A program owns a tile of queries and walks the keys around it as the forward pass does, once for ``delta`` and once for
the gradient of the queries; each flow has a launch of its own. The last of them adds what the others and the line
families left, and writes the gradients of queries, state and gates; where the cross flows are left out that is all
it does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CAUSAL, CYLINDER, NUM_STREAMS, oldest_key
from ..primitives.parts import dot_parts, load_parts, scaled_parts, store_parts, twice_to_parts, zero_parts
from ..primitives.softmax import LOG2E, bias_slope, masked
from ..primitives.tiles import gate_rows, hidden_zero
from ..primitives.window import (
    across_along,
    between,
    bias_along,
    memory_of,
    near_token,
    sites_exist,
    tile_sites,
    tokens_on_axis,
    walk,
)
from .operands import (
    HAS_STATE,
    PARAMETER_SUMS,
    TOKEN_ALPHA,
    TOKEN_WEIGHTS,
    add_partials,
    base_of,
    inverse,
    load_alpha,
    load_stream,
    partial_of,
    row_numbers_of,
    store_decay_sums,
    store_row_numbers,
    takes_part,
)


@triton.jit
def _finish_rows(
    operands, results, batch, head, heads, seq_len, local_head, token, valid, d_q, own_delta,
    FLOW: tl.constexpr, NUM_SLOTS: tl.constexpr, STREAMS: tl.constexpr, GATES: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):
    """Everything that ends with a row: gradients of queries, state and gates, and the program's part of the rest."""
    row = (batch.to(tl.int64) * heads + head) * seq_len + token
    d_q = add_partials(
        d_q, operands.d_q, tl.num_programs(1), local_head, seq_len, token, valid, NUM_SLOTS, D, BLOCK_D, PARTS
    )
    store_parts(base_of(results.d_q, batch, head), token, valid, results.d_q.token, d_q, D, BLOCK_D, PARTS)

    stream = tl.arange(0, NUM_STREAMS)[None, :]
    of_others = valid[:, None] & takes_part(stream, STREAMS) & (stream != FLOW)
    delta = tl.load(
        row_numbers_of(operands, local_head, seq_len, token[:, None], stream), mask=of_others, other=0.0)
    delta = tl.where(stream == FLOW, own_delta[:, None], delta)  # [BLOCK_M, 8]
    d_weights = delta
    own_sums = results.parameter_sums + (
        (batch.to(tl.int64) * heads + head) * tl.num_programs(0) + tl.program_id(0)
    ) * PARAMETER_SUMS
    if HAS_STATE & GATES:
        alpha = load_alpha(operands, row, head, valid, GATES)
        d_weights = alpha[:, None] * delta
        weights_at = gate_rows(row, head, (TOKEN_WEIGHTS & GATES) != 0)[:, None] * NUM_STREAMS + stream
        weights = tl.load(operands.weights + weights_at, mask=valid[:, None] & takes_part(stream, STREAMS), other=0.0)
        d_alpha = tl.sum(weights * delta, axis=1)
        state = load_parts(base_of(operands.state, batch, head), token, valid, operands.state.token, D, BLOCK_D, PARTS)
        # Read again: held through the loops it would be there twice, once as their products take it.
        d_out = load_parts(base_of(operands.d_out, batch, head), token, valid, operands.d_out.token, D, BLOCK_D, PARTS)
        for part in tl.static_range(PARTS):
            d_alpha -= tl.sum(d_out[part].to(tl.float32) * state[part].to(tl.float32), axis=1)
        d_state = scaled_parts(d_out, (1.0 - alpha)[:, None], PARTS)
        store_parts(base_of(results.d_state, batch, head), token, valid, results.d_state.token, d_state, D, BLOCK_D,
                    PARTS)
        if TOKEN_ALPHA & GATES:
            tl.store(results.d_alpha + row, d_alpha, mask=valid)
        else:
            tl.store(own_sums + NUM_STREAMS, tl.sum(d_alpha, axis=0))
    if TOKEN_WEIGHTS & GATES:
        tl.store(results.d_weights + row[:, None] * NUM_STREAMS + stream, d_weights, mask=valid[:, None])
    else:
        tl.store(own_sums + tl.arange(0, NUM_STREAMS), tl.sum(d_weights, axis=0))


@triton.jit
def _row_gradients(
    operands, batch, head, heads, group, seq_len, n_major, n_minor, scale, first_row, first_col, row, col, token, valid,
    num_rows, a_lo, a_hi, b_lo, b_hi, unit_u, unit_v,
    TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, FLOW: tl.constexpr, BY_ROWS: tl.constexpr, GATES: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, TILE_U: tl.constexpr, TILE_V: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One flow: ``(d_q, delta, gate over its total, sum of rho^2 dS over the tile)``."""
    BLOCK_M: tl.constexpr = TILE_U * TILE_V
    kv_head = head // group
    q = load_parts(base_of(operands.q, batch, head), token, valid, operands.q.token, D, BLOCK_D, PARTS)
    d_out = load_parts(base_of(operands.d_out, batch, head), token, valid, operands.d_out.token, D, BLOCK_D, PARTS)
    k_base, v_base = base_of(operands.k, batch, kv_head), base_of(operands.v, batch, kv_head)
    lse, gate = load_stream(operands, batch, head, heads, seq_len, token, valid, FLOW, STREAMS, GATES)
    decay = tl.load(operands.decay + head * NUM_STREAMS + FLOW)
    newest = token.to(tl.int32)
    oldest = newest
    if TOPOLOGY == CAUSAL:
        oldest = memory_of(newest, n_major, n_minor)
        if HAS_FIRST_KEY:
            oldest = tl.maximum(oldest, oldest_key(operands.first_key, batch, token, valid, seq_len)).to(tl.int32)
    across_begin, across_end, along_begin, along_end = walk(
        first_row, num_rows, -a_hi, -a_lo, -b_hi, -b_lo, TOPOLOGY, BY_ROWS, TILE_U, TILE_V
    )
    if BLOCK_D <= 64 and q[0].dtype != tl.float32:
        # Spares registers that are kept for a loop without a turn; wider rows spill more with it.
        tl.assume(along_begin < along_end)
    across_site, along_site = across_along(row, col, BY_ROWS)
    across_lo, along_lo = across_along(a_lo, b_lo, BY_ROWS)
    across_hi, along_hi = across_along(a_hi, b_hi, BY_ROWS)
    across_unit, along_unit = across_along(unit_u, unit_v, BY_ROWS)

    normaliser = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    decay_sums = tl.zeros([BLOCK_M], tl.float32)
    d_q = zero_parts(BLOCK_M, BLOCK_D, PARTS)
    for sweep in tl.static_range(2):
        for first in range(along_begin, along_end, BLOCK_N):
            along = first + tl.arange(0, BLOCK_N)
            apart = along_site[:, None] - along[None, :]
            along_bias = bias_along(apart, along_lo, along_hi, bias_slope(decay, along_unit))
            if TOPOLOGY == CYLINDER and not BY_ROWS:
                along_bias = tl.where((along < along_end)[None, :], along_bias, float("-inf"))
            along_squared = apart.to(tl.float32) * apart.to(tl.float32) * along_unit
            along_token = tokens_on_axis(along, first_row, first_col, n_major, n_minor, TOPOLOGY, not BY_ROWS)
            # Sums over keys are taken once, at the end.
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if sweep == 0:
                totals = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for across in range(across_begin, across_end):
                across_token = tokens_on_axis(across, first_row, first_col, n_major, n_minor, TOPOLOGY, BY_ROWS)
                # Keys beyond the window may exist and be read; their bias is -inf.
                exists = sites_exist(
                    across_token, along_token, seq_len, TOPOLOGY, BY_ROWS, q[0].dtype != tl.float32
                )
                k = load_parts(k_base + across_token * operands.k.token, along_token, exists, operands.k.token, D,
                               BLOCK_D, PARTS)  # [BLOCK_N, D]
                v = load_parts(v_base + across_token * operands.v.token, along_token, exists, operands.v.token, D,
                               BLOCK_D, PARTS)
                scores = dot_parts(q, k, PARTS, PRECISION) * (scale * LOG2E) + along_bias  # [BLOCK_M, BLOCK_N]
                if TOPOLOGY == CAUSAL:
                    place = near_token(across_token)
                    scores = masked(scores, between(near_token(along_token), oldest - place, newest - place))
                apart_across = across_site - across
                across_bias = bias_along(apart_across, across_lo, across_hi, bias_slope(decay, across_unit))
                probs = tl.exp2(scores + (across_bias - lse)[:, None])
                d_probs = dot_parts(d_out, v, PARTS, PRECISION)
                if sweep == 0:
                    totals += probs
                    sums += probs * d_probs
                else:
                    d_scores = probs * (d_probs - delta[:, None])
                    across_squared = apart_across.to(tl.float32) * apart_across.to(tl.float32) * across_unit
                    sums += (along_squared + across_squared[:, None]) * d_scores
                    d_q = twice_to_parts(d_scores, k, d_q, PARTS, PRECISION)
            if sweep == 0:
                normaliser += tl.sum(totals, axis=1)
                delta += tl.sum(sums, axis=1)
            else:
                decay_sums += tl.sum(sums, axis=1)
        if sweep == 0:
            normaliser = inverse(normaliser)
            delta *= normaliser
    # What is the same for all keys of a query is multiplied last.
    gate *= normaliser
    return scaled_parts(d_q, (scale * gate)[:, None], PARTS), delta, gate, tl.sum(gate * decay_sums, axis=0)


@triton.jit(do_not_specialize=[
    "heads", "group", "seq_len", "n_major", "n_minor", "first_head", "first_program", "num_programs", "num_rows",
    "num_cols", "a_lo", "a_hi", "b_lo", "b_hi",
])
def cross_by_queries(
    operands, results, heads, group, seq_len, n_major, n_minor, scale, first_head, first_program, num_programs,
    num_rows, num_cols, a_lo, a_hi, b_lo, b_hi, unit_u, unit_v,
    TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, FLOW: tl.constexpr, BY_ROWS: tl.constexpr, FINISH: tl.constexpr,
    SLOT: tl.constexpr, NUM_SLOTS: tl.constexpr, ACCUMULATE: tl.constexpr, GATES: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, TILE_U: tl.constexpr, TILE_V: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: a tile of queries of one head and one flow.

    ``FLOW`` and its window are those of the forward pass, -1 where neither flow takes part. Without ``FINISH`` the
    gradient is left in ``SLOT``, on top of what is there where ``ACCUMULATE``. Programs are numbered as in
    `lines_by_keys`.
    """
    local_head = tl.program_id(1)
    batch, head = (first_head + local_head) // heads, (first_head + local_head) % heads
    first_row, first_col, row, col, token, valid = tile_sites(
        tl.program_id(0), n_minor, seq_len, num_rows, num_cols, TILE_U, TILE_V
    )
    delta = tl.zeros([TILE_U * TILE_V], tl.float32)
    d_q = zero_parts(TILE_U * TILE_V, BLOCK_D, PARTS)
    if FLOW >= 0:
        d_q, delta, gate, decay_sum = _row_gradients(
            operands, batch, head, heads, group, seq_len, n_major, n_minor, scale, first_row, first_col, row, col,
            token, valid, num_rows, a_lo, a_hi, b_lo, b_hi, unit_u, unit_v, TOPOLOGY, STREAMS, FLOW, BY_ROWS,
            GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, PARTS, TILE_U, TILE_V, BLOCK_N,
        )
        zero = hidden_zero(seq_len)
        local_head += zero
        batch, head = (first_head + local_head) // heads, (first_head + local_head) % heads
        _, _, _, _, token, valid = tile_sites(
            tl.program_id(0) + zero, n_minor, seq_len, num_rows, num_cols, TILE_U, TILE_V
        )
        lse, _ = load_stream(operands, batch, head, heads, seq_len, token, valid, FLOW, STREAMS, GATES)
        store_row_numbers(row_numbers_of(operands, local_head, seq_len, token, FLOW), valid, delta, lse, gate)
        store_decay_sums(operands, first_head + local_head, first_program + tl.program_id(0), num_programs, FLOW,
                         decay_sum, 0.0)
    if FINISH:
        _finish_rows(operands, results, batch, head, heads, seq_len, local_head, token, valid, d_q, delta, FLOW,
                     NUM_SLOTS, STREAMS, GATES, D, BLOCK_D, PARTS)
    else:
        SLOTS: tl.constexpr = 1 if ACCUMULATE else 0
        d_q = add_partials(
            d_q, operands.d_q, tl.num_programs(1), local_head, seq_len, token, valid, SLOTS, D, BLOCK_D, PARTS
        )
        d_q_base = partial_of(operands.d_q, SLOT, tl.num_programs(1), local_head, seq_len, D)
        store_parts(d_q_base, token, valid, D, d_q, D, BLOCK_D, PARTS)
