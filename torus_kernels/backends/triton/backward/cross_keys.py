"""Backward of the cross flows, keys first, and the end of the gradients of keys and values.

A program owns a tile of keys and walks the queries around it row by row of the lattice, as `cross_by_queries` walks the
keys; that has left ``delta``. Then it adds what the line families left. Where the cross flows are left out that last
part is all it does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CAUSAL, CROSS_U_TO_V, CROSS_V_TO_U, CYLINDER, NUM_STREAMS, oldest_key
from ..primitives.softmax import LOG2E, bias_slope
from ..primitives.tiles import dot_cast, dot_transposed, load_rows, store_rows
from ..primitives.window import bias_along, row_tokens, seen_along, tile_sites
from .operands import add_partials, base_of, load_stream, row_sums_of


@triton.jit(do_not_specialize=[
    "heads", "group", "seq_len", "n_major", "n_minor", "first_pair", "a_lo", "a_hi", "b_lo", "b_hi", "num_rows",
    "num_cols", "wide_u", "wide_v", "tall_u", "tall_v",
])
def cross_by_keys(
    operands, results, heads, group, seq_len, n_major, n_minor, scale, first_pair,
    a_lo, a_hi, b_lo, b_hi, num_rows, num_cols, wide_u, wide_v, tall_u, tall_v,
    wide_unit_u, wide_unit_v, tall_unit_u, tall_unit_v,
    TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, NUM_SLOTS: tl.constexpr, GATES: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_U: tl.constexpr, TILE_V: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """One program: a tile of keys of one key/value head, for all query heads that read it."""
    BLOCK_N: tl.constexpr = TILE_U * TILE_V
    local_pair, num_pairs = tl.program_id(1), tl.num_programs(1)
    kv_heads = heads // group
    batch, kv_head = (first_pair + local_pair) // kv_heads, (first_pair + local_pair) % kv_heads
    first_row, first_col, key_row, key_col, key_token, key_valid = tile_sites(
        tl.program_id(0), n_minor, seq_len, num_rows, num_cols, TILE_U, TILE_V
    )
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if STREAMS & 192:
        k = load_rows(base_of(operands.k, batch, kv_head), key_token, key_valid, operands.k.token, D, BLOCK_D)
        v = load_rows(base_of(operands.v, batch, kv_head), key_token, key_valid, operands.v.token, D, BLOCK_D)
        lowest_row = a_lo
        highest_row = TILE_U - 1 + a_hi
        if TOPOLOGY == CAUSAL:
            # Columns before the beginning of a row are the end of the one before: queries may begin a row late.
            highest_row = tl.minimum(highest_row, num_rows - first_row)
        elif TOPOLOGY == CYLINDER:
            lowest_row = tl.maximum(lowest_row, -first_row)
            highest_row = tl.minimum(highest_row, num_rows - 1 - first_row)
        for member in range(group):
            head = kv_head * group + member
            local_head = local_pair * group + member
            q_base, d_out_base = base_of(operands.q, batch, head), base_of(operands.d_out, batch, head)
            decay = operands.decay + head * NUM_STREAMS
            slope_wide = bias_slope(tl.load(decay + CROSS_U_TO_V), 1.0)
            slope_tall = bias_slope(tl.load(decay + CROSS_V_TO_U), 1.0)
            for first in range(b_lo, TILE_V + b_hi, BLOCK_M):
                col = first + tl.arange(0, BLOCK_M)
                b = col[None, :] - key_col[:, None]
                wide_cols = bias_along(b, seen_along(b, b_lo, b_hi, wide_v), slope_wide * wide_unit_v)
                tall_cols = bias_along(b, seen_along(b, b_lo, b_hi, tall_v), slope_tall * tall_unit_v)
                for row in range(lowest_row, highest_row + 1):
                    a = row - key_row
                    wide_seen = seen_along(a, a_lo, a_hi, wide_u) & key_valid
                    tall_seen = seen_along(a, a_lo, a_hi, tall_u) & key_valid
                    wide_rows = bias_along(a, wide_seen, slope_wide * wide_unit_u)
                    tall_rows = bias_along(a, tall_seen, slope_tall * tall_unit_u)
                    token, valid = row_tokens(row, col, first_row, first_col, n_major, n_minor, seq_len, TOPOLOGY)
                    valid = valid & (col < TILE_V + b_hi)
                    q = load_rows(q_base, token, valid, operands.q.token, D, BLOCK_D)  # [BLOCK_M, D]
                    d_out = load_rows(d_out_base, token, valid, operands.d_out.token, D, BLOCK_D)
                    lse_wide, gate_wide = load_stream(
                        operands, batch, head, heads, seq_len, token, valid, CROSS_U_TO_V, STREAMS, GATES
                    )
                    lse_tall, gate_tall = load_stream(
                        operands, batch, head, heads, seq_len, token, valid, CROSS_V_TO_U, STREAMS, GATES
                    )
                    sums = row_sums_of(operands, local_head, seq_len, token)
                    delta_wide = tl.load(sums + CROSS_U_TO_V, mask=valid, other=0.0)
                    delta_tall = tl.load(sums + CROSS_V_TO_U, mask=valid, other=0.0)
                    gate_wide *= tl.load(sums + NUM_STREAMS + CROSS_U_TO_V, mask=valid, other=0.0)
                    gate_tall *= tl.load(sums + NUM_STREAMS + CROSS_V_TO_U, mask=valid, other=0.0)
                    scores = scale * LOG2E * dot_transposed(k, q, PRECISION)  # [BLOCK_N, BLOCK_M]
                    d_probs = dot_transposed(v, d_out, PRECISION)
                    if TOPOLOGY == CAUSAL:
                        oldest = tl.maximum(token - (n_major.to(tl.int64) * n_minor - 1), 0)
                        if HAS_FIRST_KEY:
                            oldest = tl.maximum(oldest, oldest_key(operands.first_key, batch, token, valid, seq_len))
                        key_time = key_token.to(tl.int32)[:, None]  # a sequence has less than 2**31 tokens
                        seen = (key_time <= token.to(tl.int32)[None, :]) & (key_time >= oldest.to(tl.int32)[None, :])
                        scores = tl.where(seen, scores, float("-inf"))
                    probs_wide = tl.exp2(scores + wide_cols + wide_rows[:, None] - lse_wide[None, :])
                    probs_tall = tl.exp2(scores + tall_cols + tall_rows[:, None] - lse_tall[None, :])
                    weighted_wide = gate_wide[None, :] * probs_wide
                    weighted_tall = gate_tall[None, :] * probs_tall
                    d_scores = weighted_wide * (d_probs - delta_wide[None, :]) + \
                        weighted_tall * (d_probs - delta_tall[None, :])
                    d_v = dot_cast(weighted_wide + weighted_tall, d_out, PRECISION, d_v)
                    d_k = dot_cast(d_scores, q, PRECISION, d_k)
        d_k = scale * d_k
    d_k = add_partials(d_k, operands.d_k, num_pairs, local_pair, seq_len, key_token, key_valid, NUM_SLOTS, D, BLOCK_D)
    d_v = add_partials(d_v, operands.d_v, num_pairs, local_pair, seq_len, key_token, key_valid, NUM_SLOTS, D, BLOCK_D)
    store_rows(base_of(results.d_k, batch, kv_head), key_token, key_valid, results.d_k.token, d_k, D, BLOCK_D)
    store_rows(base_of(results.d_v, batch, kv_head), key_token, key_valid, results.d_v.token, d_v, D, BLOCK_D)
