"""Backward of the cross flows, keys first, and the end of the gradients of keys and values.

A program owns a tile of keys and walks the queries around it, as `cross_by_queries` walks the keys; that has left
``delta``. Each flow has a launch of its own, and the last of them adds what the other and the line families left. Where
the cross flows are left out that last part is all it does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CAUSAL, CYLINDER, NUM_STREAMS, PERIODIC, oldest_key
from ..primitives.parts import cast_to_parts, dot_parts, load_parts, scaled_parts, store_parts, zero_parts
from ..primitives.softmax import LOG2E, bias_slope, masked
from ..primitives.tiles import hidden_zero
from ..primitives.window import (
    across_along,
    between,
    bias_along,
    memory,
    near_token,
    sites_exist,
    tile_sites,
    tokens_on_axis,
    walk,
)
from .operands import add_partials, base_of, load_row_numbers, partial_of, row_numbers_of


@triton.jit
def _add_gradients(
    d_k, d_v, operands, batch, kv_head, group, local_pair, seq_len, n_major, n_minor, scale, first_row,
    first_col, key_row, key_col, key_token, key_valid, num_rows, a_lo, a_hi, b_lo, b_hi, unit_u, unit_v,
    TOPOLOGY: tl.constexpr, FLOW: tl.constexpr, BY_ROWS: tl.constexpr, GROUPED: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, TILE_U: tl.constexpr, TILE_V: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """``(d_k, d_v)`` and what one flow adds for a tile of keys, from all query heads that read it."""
    k = load_parts(base_of(operands.k, batch, kv_head), key_token, key_valid, operands.k.token, D, BLOCK_D, PARTS)
    v = load_parts(base_of(operands.v, batch, kv_head), key_token, key_valid, operands.v.token, D, BLOCK_D, PARTS)
    across_begin, across_end, along_begin, along_end = walk(
        first_row, num_rows, a_lo, a_hi, b_lo, b_hi, TOPOLOGY, BY_ROWS, TILE_U, TILE_V
    )
    # A window has its own site at least. Without this, registers are kept for loops that make no turn.
    tl.assume((across_begin < across_end) & (along_begin < along_end))
    # Rows come in multiples of ROWS: told so, the compiler makes no second loop for what is left over.
    across_end = across_begin + (across_end - across_begin) // ROWS * ROWS
    across_site, along_site = across_along(key_row, key_col, BY_ROWS)
    across_lo, along_lo = across_along(a_lo, b_lo, BY_ROWS)
    across_hi, along_hi = across_along(a_hi, b_hi, BY_ROWS)
    across_unit, along_unit = across_along(unit_u, unit_v, BY_ROWS)
    ALL_EXIST: tl.constexpr = TOPOLOGY == PERIODIC or (TOPOLOGY == CYLINDER and BY_ROWS)
    for member in range(group if GROUPED else 1):
        head = kv_head * group + member
        local_head = local_pair * group + member
        q_base, d_out_base = base_of(operands.q, batch, head), base_of(operands.d_out, batch, head)
        decay = tl.load(operands.decay + head * NUM_STREAMS + FLOW)
        for block in range(1 if ONE_BLOCK else tl.cdiv(along_end - along_begin, BLOCK_M)):
            along = along_begin + block * BLOCK_M + tl.arange(0, BLOCK_M)
            along_bias = bias_along(along[None, :] - along_site[:, None], along_lo, along_hi,
                                    bias_slope(decay, along_unit))
            along_token = tokens_on_axis(along, first_row, first_col, n_major, n_minor, TOPOLOGY, not BY_ROWS)
            for across in tl.range(across_begin, across_end, loop_unroll_factor=ROWS):
                across_token = tokens_on_axis(across, first_row, first_col, n_major, n_minor, TOPOLOGY, BY_ROWS)
                token = across_token + along_token
                # Queries beyond the window may exist and be read; their bias is -inf.
                valid = sites_exist(
                    across_token, along_token, seq_len, TOPOLOGY, BY_ROWS, k[0].dtype != tl.float32 and not GROUPED
                )
                if (TOPOLOGY == CAUSAL and not GROUPED) or k[0].dtype == tl.float32:
                    valid = valid & (along < along_end)  # spares registers
                q = load_parts(q_base, token, valid, operands.q.token, D, BLOCK_D, PARTS)  # [BLOCK_M, D]
                d_out = load_parts(d_out_base, token, valid, operands.d_out.token, D, BLOCK_D, PARTS)
                numbers = row_numbers_of(operands, local_head, seq_len, token, FLOW)
                delta, lse, gate, _ = load_row_numbers(numbers, valid, ALL_EXIST)
                scores = dot_parts(k, q, PARTS, PRECISION) * (scale * LOG2E) + along_bias  # [BLOCK_N, BLOCK_M]
                if TOPOLOGY == CAUSAL:
                    first = near_token(key_token) - near_token(across_token)
                    seen = between(near_token(along_token), first, first + memory(n_major, n_minor))
                    if HAS_FIRST_KEY:
                        oldest = oldest_key(operands.first_key, batch, token, valid, seq_len)
                        seen = seen & (key_token[:, None] >= oldest[None, :])
                    scores = masked(scores, seen)
                across_bias = bias_along(across - across_site, across_lo, across_hi, bias_slope(decay, across_unit))
                # Of a query that is not there the log-sum-exp is infinite.
                weighted = gate[None, :] * tl.exp2(scores + across_bias[:, None] - lse[None, :])
                d_probs = dot_parts(v, d_out, PARTS, PRECISION)
                d_v = cast_to_parts(weighted, d_out, d_v, PARTS, PRECISION)
                d_k = cast_to_parts(weighted * (d_probs - delta[None, :]), q, d_k, PARTS, PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=[
    "heads", "group", "seq_len", "n_major", "n_minor", "first_pair", "num_rows", "num_cols", "a_lo", "a_hi", "b_lo",
    "b_hi",
])
def cross_by_keys(
    operands, results, heads, group, seq_len, n_major, n_minor, scale, first_pair,
    num_rows, num_cols, a_lo, a_hi, b_lo, b_hi, unit_u, unit_v,
    TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, FLOW: tl.constexpr, BY_ROWS: tl.constexpr, FINISH: tl.constexpr,
    SLOT: tl.constexpr, NUM_SLOTS: tl.constexpr, ACCUMULATE: tl.constexpr, GROUPED: tl.constexpr, GATES: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, TILE_U: tl.constexpr, TILE_V: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """One program: a tile of keys of one key/value head and one flow, for all query heads that read it.

    ``FLOW`` and what becomes of the gradients are as in `cross_by_queries`; ``GROUPED`` where several heads read a key.
    A turn of the loop is ``ROWS`` rows of queries, which come in multiples of that.
    """
    local_pair, num_pairs = tl.program_id(1), tl.num_programs(1)
    kv_heads = heads // group
    batch, kv_head = (first_pair + local_pair) // kv_heads, (first_pair + local_pair) % kv_heads
    first_row, first_col, row, col, token, valid = tile_sites(
        tl.program_id(0), n_minor, seq_len, num_rows, num_cols, TILE_U, TILE_V
    )
    # Sums begin with what is there: added at the end it would need registers beside both of them.
    SLOTS: tl.constexpr = NUM_SLOTS if FINISH else (1 if ACCUMULATE else 0)
    nothing = zero_parts(TILE_U * TILE_V, BLOCK_D, PARTS)
    d_k = add_partials(nothing, operands.d_k, num_pairs, local_pair, seq_len, token, valid, SLOTS, D, BLOCK_D, PARTS)
    d_v = add_partials(nothing, operands.d_v, num_pairs, local_pair, seq_len, token, valid, SLOTS, D, BLOCK_D, PARTS)
    if FLOW >= 0:
        d_k, d_v = _add_gradients(
            d_k, d_v, operands, batch, kv_head, group, local_pair, seq_len, n_major, n_minor, scale, first_row,
            first_col, row, col, token, valid, num_rows, a_lo, a_hi, b_lo, b_hi, unit_u, unit_v, TOPOLOGY, FLOW,
            BY_ROWS, GROUPED, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, PARTS, TILE_U, TILE_V, ROWS, BLOCK_M, ONE_BLOCK,
        )
        zero = hidden_zero(seq_len)
        local_pair += zero
        kv_heads = (heads + zero) // group
        batch, kv_head = (first_pair + local_pair) // kv_heads, (first_pair + local_pair) % kv_heads
        _, _, _, _, token, valid = tile_sites(
            tl.program_id(0) + zero, n_minor, seq_len, num_rows, num_cols, TILE_U, TILE_V
        )
    if FINISH:
        d_k_base, d_v_base = base_of(results.d_k, batch, kv_head), base_of(results.d_v, batch, kv_head)
        d_k_stride, d_v_stride = results.d_k.token, results.d_v.token
        d_k = scaled_parts(d_k, scale, PARTS)
    else:
        d_k_base = partial_of(operands.d_k, SLOT, num_pairs, local_pair, seq_len, D)
        d_v_base = partial_of(operands.d_v, SLOT, num_pairs, local_pair, seq_len, D)
        d_k_stride, d_v_stride = D, D
    store_parts(d_k_base, token, valid, d_k_stride, d_k, D, BLOCK_D, PARTS)
    store_parts(d_v_base, token, valid, d_v_stride, d_v, D, BLOCK_D, PARTS)
