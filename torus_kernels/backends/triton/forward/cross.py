"""Cross flows, mixing and compounding: each program owns a tile of sites and writes their output.

A flow's window is short along one axis and long along the other. The keys of a tile are walked along the short axis,
``across``, and each step is one block of keys ``along`` the other: with radii of 3 and 7, a tile of 4 sites by 16 takes
10 steps of 16 + 14 keys. The displacement along a block is the same tile of numbers in every step, the displacement
across is one number for each query: what depends on the first is computed once, what depends on the second costs
nothing for each score. Each flow has a launch of its own, since the short axis of one is the long axis of the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CAUSAL, CYLINDER, NUM_STREAMS, oldest_key
from ..primitives.parts import (
    add_slots,
    cast_to_parts,
    dot_parts,
    load_parts,
    scaled_parts,
    store_parts,
    towards,
    zero_parts,
)
from ..primitives.softmax import accumulate, anchor, bias_slope, masked, write_statistics
from ..primitives.tiles import gate_rows, head_of, hidden_zero
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


@triton.jit
def _keys_of_row(
    q, k_base, v_base, stride_kt, stride_vt, scale, newest, oldest, across, along_bias, along_token,
    first_row, first_col, n_major, n_minor, seq_len,
    TOPOLOGY: tl.constexpr, BY_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``(scores, v)`` of a row of keys, ``[BLOCK_M, BLOCK_N]`` and ``[BLOCK_N, D]``; scores lack the bias across."""
    across_token = tokens_on_axis(across, first_row, first_col, n_major, n_minor, TOPOLOGY, BY_ROWS)
    # Keys beyond the window may exist and be read; their bias is -inf.
    exists = sites_exist(across_token, along_token, seq_len, TOPOLOGY, BY_ROWS, q[0].dtype != tl.float32)
    k = load_parts(k_base + across_token * stride_kt, along_token, exists, stride_kt, D, BLOCK_D, PARTS)
    v = load_parts(v_base + across_token * stride_vt, along_token, exists, stride_vt, D, BLOCK_D, PARTS)
    scores = dot_parts(q, k, PARTS, PRECISION) * scale + along_bias
    if TOPOLOGY == CAUSAL:
        place = near_token(across_token)
        scores = masked(scores, between(near_token(along_token), oldest - place, newest - place))
    return scores, v


@triton.jit
def _attend(
    q, k_base, v_base, decay, first_key_ptr, stride_kt, stride_vt, scale, batch, token, valid, row, col, first_row,
    first_col, n_major, n_minor, seq_len, num_rows, a_lo, a_hi, b_lo, b_hi, unit_u, unit_v,
    TOPOLOGY: tl.constexpr, BY_ROWS: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, TILE_U: tl.constexpr,
    TILE_V: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """One flow: exponentials' product with V, then its softmax: ``(acc, maximum, total, spread)``."""
    BLOCK_M: tl.constexpr = TILE_U * TILE_V
    newest = token.to(tl.int32)
    oldest = newest
    if TOPOLOGY == CAUSAL:
        oldest = memory_of(newest, n_major, n_minor)
        if HAS_FIRST_KEY:
            oldest = tl.maximum(oldest, oldest_key(first_key_ptr, batch, token, valid, seq_len)).to(tl.int32)
    across_begin, across_end, along_begin, along_end = walk(
        first_row, num_rows, -a_hi, -a_lo, -b_hi, -b_lo, TOPOLOGY, BY_ROWS, TILE_U, TILE_V
    )
    if BLOCK_D > 64:
        # Spares registers that are kept for loops without a turn.
        tl.assume((across_begin < across_end) & (along_begin < along_end))
    across_site, along_site = across_along(row, col, BY_ROWS)
    across_lo, along_lo = across_along(a_lo, b_lo, BY_ROWS)
    across_hi, along_hi = across_along(a_hi, b_hi, BY_ROWS)
    across_decline, along_decline = across_along(bias_slope(decay, unit_u), bias_slope(decay, unit_v), BY_ROWS)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    spread_total = total
    acc = zero_parts(BLOCK_M, BLOCK_D, PARTS)
    for first in range(along_begin, along_end, BLOCK_N):
        along = first + tl.arange(0, BLOCK_N)
        along_bias = bias_along(along_site[:, None] - along[None, :], along_lo, along_hi, along_decline)
        if TOPOLOGY == CYLINDER and not BY_ROWS:
            along_bias = tl.where((along < along_end)[None, :], along_bias, float("-inf"))
        along_token = tokens_on_axis(along, first_row, first_col, n_major, n_minor, TOPOLOGY, not BY_ROWS)
        for across in range(across_begin, across_end, ROWS):
            scores, values, biases = (), (), ()
            for index in tl.static_range(ROWS):
                row_scores, v = _keys_of_row(
                    q, k_base, v_base, stride_kt, stride_vt, scale, newest, oldest, across + index, along_bias,
                    along_token, first_row, first_col, n_major, n_minor, seq_len, TOPOLOGY, BY_ROWS, D, BLOCK_D,
                    PARTS, PRECISION,
                )
                scores += (row_scores,)
                values += (v,)
                biases += (bias_along(across_site - (across + index), across_lo, across_hi, across_decline),)
            p, kept, maximum, total, spread_total = accumulate(
                scores, biases, maximum, total, spread_total, ROWS, WITH_ENTROPY
            )
            acc = scaled_parts(acc, kept[:, None], PARTS)
            for index in tl.static_range(ROWS):
                acc = cast_to_parts(p[index], values[index], acc, PARTS, PRECISION)
    return acc, anchor(maximum), total, spread_total


@triton.jit(do_not_specialize=[
    "n_major", "n_minor", "seq_len", "first_head", "heads", "group", "num_rows", "num_cols", "a_lo", "a_hi", "b_lo",
    "b_hi",
])
def cross_kernel(
    q_ptr, k_ptr, v_ptr, weights_ptr, decay_ptr, first_key_ptr, state_ptr, alpha_ptr, partials_ptr,
    out_ptr, lse_ptr, entropy_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_sb, stride_sh, stride_st, stride_ob, stride_oh, stride_ot,
    n_major, n_minor, seq_len, first_head, heads, group, scale,
    num_rows, num_cols, a_lo, a_hi, b_lo, b_hi, unit_u, unit_v,
    TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, FLOW: tl.constexpr, BY_ROWS: tl.constexpr, FINISH: tl.constexpr,
    NUM_PARTIALS: tl.constexpr, TILE_U: tl.constexpr, TILE_V: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, TOKEN_WEIGHTS: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, HAS_STATE: tl.constexpr, TOKEN_ALPHA: tl.constexpr, WITH_LSE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """One cross flow of a chunk of heads: a partial sum, as the line families leave theirs, or where ``FINISH`` what
    is added to the ``NUM_PARTIALS`` that are there, then compounding.

    Grid: ``(tiles of TILE_U x TILE_V sites, heads of the chunk)``. ``FLOW`` is the number of its stream, which sees
    displacements ``a_lo`` to ``a_hi`` and ``b_lo`` to ``b_hi``; -1 leaves the sums and the compounding. A unit is the
    inverse square of a radius. Keys are walked ``BY_ROWS`` of the lattice or by its columns, ``ROWS`` a step, of
    which there are multiples. Without ``FINISH`` the sum goes behind the ``NUM_PARTIALS``.
    """
    BLOCK_M: tl.constexpr = TILE_U * TILE_V
    local_head = tl.program_id(1)
    batch, head, global_head = head_of(first_head + local_head, heads)
    first_row, first_col, row, col, token, valid = tile_sites(
        tl.program_id(0), n_minor, seq_len, num_rows, num_cols, TILE_U, TILE_V
    )
    at = global_head * seq_len + token
    y = zero_parts(BLOCK_M, BLOCK_D, PARTS)
    if FLOW >= 0:
        kv_head = (head.to(tl.int32) // group).to(tl.int64)
        q = load_parts(q_ptr + batch * stride_qb + head * stride_qh, token, valid, stride_qt, D, BLOCK_D, PARTS)
        acc, maximum, total, spread_total = _attend(
            q, k_ptr + batch * stride_kb + kv_head * stride_kh, v_ptr + batch * stride_vb + kv_head * stride_vh,
            tl.load(decay_ptr + head * NUM_STREAMS + FLOW), first_key_ptr, stride_kt, stride_vt, scale, batch, token,
            valid, row, col, first_row, first_col, n_major, n_minor, seq_len, num_rows, a_lo, a_hi, b_lo, b_hi, unit_u,
            unit_v, TOPOLOGY, BY_ROWS, HAS_FIRST_KEY, TILE_U, TILE_V, ROWS, BLOCK_N, D, BLOCK_D, PARTS,
            WITH_ENTROPY, PRECISION,
        )
        zero = hidden_zero(seq_len)
        local_head += zero
        batch, head, global_head = head_of(first_head + local_head, heads)
        _, _, _, _, token, valid = tile_sites(
            tl.program_id(0) + zero, n_minor, seq_len, num_rows, num_cols, TILE_U, TILE_V
        )
        at = global_head * seq_len + token
        gate = tl.load(weights_ptr + gate_rows(at, head, TOKEN_WEIGHTS) * NUM_STREAMS + FLOW, mask=valid, other=0.0)
        y = scaled_parts(acc, (gate / total)[:, None], PARTS)
        write_statistics(maximum, total, spread_total, lse_ptr, entropy_ptr, at * NUM_STREAMS + FLOW, valid,
                         WITH_LSE, WITH_ENTROPY)

    head_partials = partials_ptr + local_head.to(tl.int64) * seq_len * D
    partial_size = tl.num_programs(1).to(tl.int64) * seq_len * D
    if FINISH:
        y = add_slots(y, head_partials, partial_size, token, valid, NUM_PARTIALS, D, BLOCK_D, PARTS)
        if BLOCK_D > 64:
            _, _, _, _, token, valid = tile_sites(
                tl.program_id(0) + hidden_zero(n_minor), n_minor, seq_len, num_rows, num_cols, TILE_U, TILE_V
            )
            at = global_head * seq_len + token
        for stream in tl.static_range(NUM_STREAMS):
            if ((STREAMS >> stream) & 1) == 0:
                left_out = tl.zeros([BLOCK_M], tl.float32)
                if WITH_LSE:
                    tl.store(lse_ptr + at * NUM_STREAMS + stream, left_out - float("inf"), mask=valid)
                if WITH_ENTROPY:
                    tl.store(entropy_ptr + at * NUM_STREAMS + stream, left_out, mask=valid)
        if HAS_STATE:
            state_base = state_ptr + batch * stride_sb + head * stride_sh
            state = load_parts(state_base, token, valid, stride_st, D, BLOCK_D, PARTS)
            alpha = tl.load(alpha_ptr + gate_rows(at, head, TOKEN_ALPHA), mask=valid, other=0.0)
            y = towards(state, y, alpha[:, None], PARTS)
        store_parts(out_ptr + batch * stride_ob + head * stride_oh, token, valid, stride_ot, y, D, BLOCK_D, PARTS)
    else:
        store_parts(head_partials + NUM_PARTIALS * partial_size, token, valid, D, y, D, BLOCK_D, PARTS)
