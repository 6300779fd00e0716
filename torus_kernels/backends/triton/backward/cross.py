"""Backward of the cross flows, queries first, and all that ends with a query row: its gradient and its gates'.

A program owns a tile of queries and walks the keys around it row by row of the lattice, once for ``delta`` and once
for the gradient of the queries. In one row of keys the displacement b is the same tile of numbers whatever the row,
and a is one number for each query: what depends on b is computed once, what depends on a is a sum over rows. Then the
program adds what the line families left, and writes the gradients of queries, state and gates; where the cross flows
are left out that is all it does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CAUSAL, CROSS_U_TO_V, CROSS_V_TO_U, CYLINDER, NUM_STREAMS, oldest_key
from ..primitives.softmax import LOG2E, bias_slope
from ..primitives.tiles import dot_transposed, dot_twice, gate_rows, load_rows, store_rows
from ..primitives.window import bias_along, row_tokens, seen_along, tile_sites
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
    row_sums_of,
    takes_part,
)


@triton.jit
def _finish_rows(
    operands, results, batch, head, heads, seq_len, local_head, token, valid, d_out, d_q, delta_wide, delta_tall,
    decay_sum_wide, decay_sum_tall,
    NUM_SLOTS: tl.constexpr, STREAMS: tl.constexpr, GATES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Everything that ends with a row: gradients of queries, state and gates, and the program's part of the rest."""
    row = (batch.to(tl.int64) * heads + head) * seq_len + token
    d_q = add_partials(d_q, operands.d_q, tl.num_programs(1), local_head, seq_len, token, valid, NUM_SLOTS, D, BLOCK_D)
    store_rows(base_of(results.d_q, batch, head), token, valid, results.d_q.token, d_q, D, BLOCK_D)

    stream = tl.arange(0, NUM_STREAMS)[None, :]
    from_lines = valid[:, None] & takes_part(stream, STREAMS) & (stream < CROSS_U_TO_V)
    delta = tl.load(row_sums_of(operands, local_head, seq_len, token)[:, None] + stream, mask=from_lines, other=0.0)
    delta = tl.where(stream == CROSS_U_TO_V, delta_wide[:, None],
                     tl.where(stream == CROSS_V_TO_U, delta_tall[:, None], delta))  # [BLOCK_M, 8]
    d_weights = delta
    part = results.parameter_sums + (
        (batch.to(tl.int64) * heads + head) * tl.num_programs(0) + tl.program_id(0)
    ) * PARAMETER_SUMS
    if HAS_STATE & GATES:
        alpha = load_alpha(operands, row, head, valid, GATES)
        d_weights = alpha[:, None] * delta
        weights_at = gate_rows(row, head, (TOKEN_WEIGHTS & GATES) != 0)[:, None] * NUM_STREAMS + stream
        weights = tl.load(operands.weights + weights_at, mask=valid[:, None] & takes_part(stream, STREAMS), other=0.0)
        state = load_rows(base_of(operands.state, batch, head), token, valid, operands.state.token, D, BLOCK_D)
        d_out = d_out.to(tl.float32)
        d_alpha = tl.sum(weights * delta, axis=1) - tl.sum(d_out * state.to(tl.float32), axis=1)
        store_rows(base_of(results.d_state, batch, head), token, valid, results.d_state.token,
                   (1.0 - alpha)[:, None] * d_out, D, BLOCK_D)
        if TOKEN_ALPHA & GATES:
            tl.store(results.d_alpha + row, d_alpha, mask=valid)
        else:
            tl.store(part + 2 * NUM_STREAMS, tl.sum(d_alpha, axis=0))
    if TOKEN_WEIGHTS & GATES:
        tl.store(results.d_weights + row[:, None] * NUM_STREAMS + stream, d_weights, mask=valid[:, None])
    else:
        tl.store(part + tl.arange(0, NUM_STREAMS), tl.sum(d_weights, axis=0))
    column = tl.arange(0, NUM_STREAMS)
    decay_sums = tl.where(column == CROSS_U_TO_V, decay_sum_wide, tl.where(column == CROSS_V_TO_U, decay_sum_tall, 0.0))
    tl.store(part + NUM_STREAMS + column, decay_sums)


@triton.jit
def _flow_probabilities(scores, col_bias, row_bias):
    """Softmax of one flow; ``row_bias`` ``[BLOCK_M]`` includes the negative log-sum-exp."""
    return tl.exp2(scores + col_bias + row_bias[:, None])


@triton.jit(do_not_specialize=[
    "heads", "group", "seq_len", "n_major", "n_minor", "first_head", "a_lo", "a_hi", "b_lo", "b_hi", "num_rows",
    "num_cols", "wide_u", "wide_v", "tall_u", "tall_v",
])
def cross_by_queries(
    operands, results, heads, group, seq_len, n_major, n_minor, scale, first_head,
    a_lo, a_hi, b_lo, b_hi, num_rows, num_cols, wide_u, wide_v, tall_u, tall_v,
    wide_unit_u, wide_unit_v, tall_unit_u, tall_unit_v,
    TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, NUM_SLOTS: tl.constexpr, GATES: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE_U: tl.constexpr, TILE_V: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: a tile of queries of one head.

    The window is that of `CrossWindow`: ``wide`` is cross_u_to_v and ``tall`` cross_v_to_u, named for the usual radii;
    a unit is the inverse square of a radius.
    """
    BLOCK_M: tl.constexpr = TILE_U * TILE_V
    local_head = tl.program_id(1)
    batch, head = (first_head + local_head) // heads, (first_head + local_head) % heads
    first_row, first_col, row, col, token, valid = tile_sites(
        tl.program_id(0), n_minor, seq_len, num_rows, num_cols, TILE_U, TILE_V
    )
    d_out = load_rows(base_of(operands.d_out, batch, head), token, valid, operands.d_out.token, D, BLOCK_D)
    delta_wide = tl.zeros([BLOCK_M], tl.float32)
    delta_tall = tl.zeros([BLOCK_M], tl.float32)
    decay_sum_wide = 0.0
    decay_sum_tall = 0.0
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if STREAMS & 192:
        kv_head = head // group
        q = load_rows(base_of(operands.q, batch, head), token, valid, operands.q.token, D, BLOCK_D)
        k_base, v_base = base_of(operands.k, batch, kv_head), base_of(operands.v, batch, kv_head)
        lse_wide, gate_wide = load_stream(
            operands, batch, head, heads, seq_len, token, valid, CROSS_U_TO_V, STREAMS, GATES
        )
        lse_tall, gate_tall = load_stream(
            operands, batch, head, heads, seq_len, token, valid, CROSS_V_TO_U, STREAMS, GATES
        )
        decay = operands.decay + head * NUM_STREAMS
        slope_wide = bias_slope(tl.load(decay + CROSS_U_TO_V), 1.0)
        slope_tall = bias_slope(tl.load(decay + CROSS_V_TO_U), 1.0)
        lowest_row = -a_hi
        highest_row = TILE_U - 1 - a_lo
        if TOPOLOGY == CAUSAL:
            # Columns beyond the end of a row are the beginning of the next: row -1 may hold the first keys.
            lowest_row = tl.maximum(lowest_row, -1 - first_row)
            oldest = tl.maximum(token - (n_major.to(tl.int64) * n_minor - 1), 0)
            if HAS_FIRST_KEY:
                oldest = tl.maximum(oldest, oldest_key(operands.first_key, batch, token, valid, seq_len))
            newest, oldest = token.to(tl.int32), oldest.to(tl.int32)  # a sequence has less than 2**31 tokens
        elif TOPOLOGY == CYLINDER:
            lowest_row = tl.maximum(lowest_row, -first_row)
            highest_row = tl.minimum(highest_row, num_rows - 1 - first_row)

        normaliser_wide = tl.zeros([BLOCK_M], tl.float32)
        normaliser_tall = tl.zeros([BLOCK_M], tl.float32)
        for sweep in tl.static_range(2):
            for first in range(-b_hi, TILE_V - b_lo, BLOCK_N):
                key_col = first + tl.arange(0, BLOCK_N)
                b = col[:, None] - key_col[None, :]
                wide_cols = bias_along(b, seen_along(b, b_lo, b_hi, wide_v), slope_wide * wide_unit_v)
                tall_cols = bias_along(b, seen_along(b, b_lo, b_hi, tall_v), slope_tall * tall_unit_v)
                b_squared = b.to(tl.float32) * b.to(tl.float32)
                # Sums over a row of keys are taken once, at the end.
                sum_wide = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                sum_tall = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if sweep == 0:
                    total_wide = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                    total_tall = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for key_row in range(lowest_row, highest_row + 1):
                    a = row - key_row
                    a_squared = a.to(tl.float32) * a.to(tl.float32)
                    wide_rows = bias_along(a, seen_along(a, a_lo, a_hi, wide_u), slope_wide * wide_unit_u) - lse_wide
                    tall_rows = bias_along(a, seen_along(a, a_lo, a_hi, tall_u), slope_tall * tall_unit_u) - lse_tall
                    key_token, key_valid = row_tokens(
                        key_row, key_col, first_row, first_col, n_major, n_minor, seq_len, TOPOLOGY
                    )
                    key_valid = key_valid & (key_col < TILE_V - b_lo)
                    k = load_rows(k_base, key_token, key_valid, operands.k.token, D, BLOCK_D)  # [BLOCK_N, D]
                    v = load_rows(v_base, key_token, key_valid, operands.v.token, D, BLOCK_D)
                    scores = scale * LOG2E * dot_transposed(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
                    d_probs = dot_transposed(d_out, v, PRECISION)
                    if TOPOLOGY == CAUSAL:
                        key_time = tl.where(key_valid, key_token, seq_len).to(tl.int32)[None, :]
                        seen = (key_time <= newest[:, None]) & (key_time >= oldest[:, None])
                        scores = tl.where(seen, scores, float("-inf"))
                    probs_wide = _flow_probabilities(scores, wide_cols, wide_rows)
                    probs_tall = _flow_probabilities(scores, tall_cols, tall_rows)
                    if sweep == 0:
                        total_wide += probs_wide
                        total_tall += probs_tall
                        sum_wide += probs_wide * d_probs
                        sum_tall += probs_tall * d_probs
                    else:
                        d_scores_wide = gate_wide[:, None] * probs_wide * (d_probs - delta_wide[:, None])
                        d_scores_tall = gate_tall[:, None] * probs_tall * (d_probs - delta_tall[:, None])
                        sum_wide += (a_squared * wide_unit_u)[:, None] * d_scores_wide + \
                            b_squared * wide_unit_v * d_scores_wide
                        sum_tall += (a_squared * tall_unit_u)[:, None] * d_scores_tall + \
                            b_squared * tall_unit_v * d_scores_tall
                        d_q = dot_twice(d_scores_wide + d_scores_tall, k, PRECISION, d_q)
                if sweep == 0:
                    normaliser_wide += tl.sum(total_wide, axis=1)
                    normaliser_tall += tl.sum(total_tall, axis=1)
                    delta_wide += tl.sum(sum_wide, axis=1)
                    delta_tall += tl.sum(sum_tall, axis=1)
                else:
                    decay_sum_wide += tl.sum(tl.sum(sum_wide, axis=1), axis=0)
                    decay_sum_tall += tl.sum(tl.sum(sum_tall, axis=1), axis=0)
            if sweep == 0:
                normaliser_wide, normaliser_tall = inverse(normaliser_wide), inverse(normaliser_tall)
                delta_wide *= normaliser_wide
                delta_tall *= normaliser_tall
                gate_wide *= normaliser_wide
                gate_tall *= normaliser_tall
        d_q = scale * d_q
        sums = row_sums_of(operands, local_head, seq_len, token)
        tl.store(sums + CROSS_U_TO_V, delta_wide, mask=valid)
        tl.store(sums + CROSS_V_TO_U, delta_tall, mask=valid)
        tl.store(sums + NUM_STREAMS + CROSS_U_TO_V, normaliser_wide, mask=valid)
        tl.store(sums + NUM_STREAMS + CROSS_V_TO_U, normaliser_tall, mask=valid)
    _finish_rows(operands, results, batch, head, heads, seq_len, local_head, token, valid, d_out, d_q, delta_wide,
                 delta_tall, decay_sum_wide, decay_sum_tall, NUM_SLOTS, STREAMS, GATES, D,
                 BLOCK_D)
