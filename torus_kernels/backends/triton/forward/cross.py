"""Cross flows, mixing and compounding: each program owns a tile of sites and writes their output.

The keys of a tile are walked row by row of the lattice. In one row of keys the displacement b is the same tile of
numbers whatever the row, and the displacement a is one number for each query: what depends on b is computed once,
what depends on a costs nothing for each score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CAUSAL, PERIODIC, oldest_key
from ..primitives.softmax import anchor, bias_slope, entropy, log_sum_exp, spread
from ..primitives.tiles import dot_cast, dot_transposed, gate_rows, load_rows, store_rows

_FAR = tl.constexpr(2**30)  # columns; no tile is as wide


@triton.jit
def _axis_bias(displacement, low, high, radius, decline):
    """Bias of a flow along one axis; -inf outside the window and beyond the flow's radius."""
    inside = (displacement >= low) & (displacement <= high) & (tl.abs(displacement) <= radius)
    wide = displacement.to(tl.float32)
    return tl.where(inside, -decline * (wide * wide), float("-inf"))


@triton.jit
def _key_row(
    key_row, key_col, first_row, first_col, n_major, n_minor, seq_len, width, TOPOLOGY: tl.constexpr
):
    """Tokens of one row of keys, counted from the tile's first site, and which of them exist."""
    if TOPOLOGY == CAUSAL:
        token = (first_row + key_row) * n_minor + (first_col + key_col)
        return token, (key_col < width) & (token >= 0) & (token < seq_len)
    else:
        row, col = first_row + key_row, first_col + key_col
        if TOPOLOGY == PERIODIC:
            row = (row % n_major + n_major) % n_major
        col = (col % n_minor + n_minor) % n_minor
        return row * n_minor + col, key_col < width


@triton.jit
def _scores(
    q, k_base, key_token, key_valid, stride_kt, scale, key_row, key_col, first_row, first_col, n_major, n_minor, token,
    oldest, TOPOLOGY: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, TILE_U: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):
    """Scores with one row of keys, a tile's own rows from 0 on; -inf where time forbids."""
    scores = dot_transposed(q, load_rows(k_base, key_token, key_valid, stride_kt, D, BLOCK_D), PRECISION) * scale
    if TOPOLOGY == CAUSAL:
        # Rows between those of the queries and the end of their memory lie wholly in sight.
        at_edge = (key_row >= 0) | (first_row + key_row <= 0) | (key_row < TILE_U - n_major)
        if HAS_FIRST_KEY or at_edge:
            origin = (first_row + key_row) * n_minor + first_col
            latest = tl.minimum(tl.maximum(token - origin, -_FAR), _FAR).to(tl.int32)
            earliest = tl.minimum(tl.maximum(oldest - origin, -_FAR), _FAR).to(tl.int32)
            seen = (key_col[None, :] <= latest[:, None]) & (key_col[None, :] >= earliest[:, None])
            scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _attend(
    q, k_base, v_base, stride_kt, stride_vt, scale, token, oldest, site_row, site_col, first_row, first_col,
    n_major, n_minor, seq_len, lowest_row, highest_row, a_lo, a_hi, b_lo, b_hi, wide_u, wide_v, tall_u, tall_v,
    wide_decline_u, wide_decline_v, tall_decline_u, tall_decline_v, wide_max, tall_max,
    TOPOLOGY: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
    TILE_U: tl.constexpr, TILE_V: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """Products of one or both flows' exponentials with V, their sums and their part of the entropy."""
    BLOCK_M: tl.constexpr = TILE_U * TILE_V
    wide_total = tl.zeros([BLOCK_M], tl.float32)
    wide_spread = wide_total
    tall_total, tall_spread = wide_total, wide_total
    wide_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tall_acc = wide_acc
    width = TILE_V - b_lo
    for first in range(-b_hi, width, BLOCK_N):
        key_col = first + tl.arange(0, BLOCK_N)
        b = site_col[:, None] - key_col[None, :]
        wide_columns = _axis_bias(b, b_lo, b_hi, wide_v, wide_decline_v) - wide_max[:, None]
        tall_columns = _axis_bias(b, b_lo, b_hi, tall_v, tall_decline_v) - tall_max[:, None]
        wide_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        tall_sums = wide_sums
        for key_row in range(lowest_row, highest_row + 1):
            key_token, key_valid = _key_row(
                key_row, key_col, first_row, first_col, n_major, n_minor, seq_len, width, TOPOLOGY
            )
            v = load_rows(v_base, key_token, key_valid, stride_vt, D, BLOCK_D)
            scores = _scores(
                q, k_base, key_token, key_valid, stride_kt, scale, key_row, key_col, first_row, first_col, n_major,
                n_minor, token, oldest, TOPOLOGY, HAS_FIRST_KEY, TILE_U, D, BLOCK_D, PRECISION,
            )
            a = site_row - key_row
            if WIDE:
                wide_rows = _axis_bias(a, a_lo, a_hi, wide_u, wide_decline_u)
                exponents = scores + wide_columns + wide_rows[:, None]
                p = tl.exp2(exponents)
                wide_sums += p
                wide_acc = dot_cast(p, v, PRECISION, wide_acc)
                if WITH_ENTROPY:
                    wide_spread += spread(p, exponents)
            if TALL:
                tall_rows = _axis_bias(a, a_lo, a_hi, tall_u, tall_decline_u)
                exponents = scores + tall_columns + tall_rows[:, None]
                p = tl.exp2(exponents)
                tall_sums += p
                tall_acc = dot_cast(p, v, PRECISION, tall_acc)
                if WITH_ENTROPY:
                    tall_spread += spread(p, exponents)
        wide_total += tl.sum(wide_sums, axis=1)
        tall_total += tl.sum(tall_sums, axis=1)
    return wide_acc, wide_total, wide_spread, tall_acc, tall_total, tall_spread


@triton.jit
def _write_flow(
    maximum, total, spread_total, lse_ptr, entropy_ptr, at, mask, WITH_LSE: tl.constexpr, WITH_ENTROPY: tl.constexpr
):
    if WITH_LSE:
        tl.store(lse_ptr + at, log_sum_exp(maximum, total), mask=mask)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + at, entropy(total, spread_total), mask=mask)


@triton.jit(do_not_specialize=[
    "n_major", "n_minor", "seq_len", "first_head", "heads", "group", "a_lo", "a_hi", "b_lo", "b_hi", "num_rows",
    "num_cols", "wide_u", "wide_v", "tall_u", "tall_v",
])
def cross_kernel(
    q_ptr, k_ptr, v_ptr, weights_ptr, decay_ptr, first_key_ptr, state_ptr, alpha_ptr, partials_ptr,
    out_ptr, lse_ptr, entropy_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_sb, stride_sh, stride_st, stride_ob, stride_oh, stride_ot,
    n_major, n_minor, seq_len, first_head, heads, group, scale,
    a_lo, a_hi, b_lo, b_hi, num_rows, num_cols, wide_u, wide_v, tall_u, tall_v,
    wide_unit_u, wide_unit_v, tall_unit_u, tall_unit_v,
    TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, NUM_PARTIALS: tl.constexpr,
    SHARED: tl.constexpr, TILE_U: tl.constexpr, TILE_V: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKEN_WEIGHTS: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, HAS_STATE: tl.constexpr,
    TOKEN_ALPHA: tl.constexpr, WITH_LSE: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """The cross flows of a chunk of heads, added to the line families' partial sums, then compounding.

    Grid: ``(tiles of TILE_U x TILE_V sites, heads of the chunk)``. The window is that of `CrossWindow`: ``wide`` is
    cross_u_to_v and ``tall`` cross_v_to_u, named for the usual radii; a unit is the inverse square of a radius.
    ``STREAMS`` without either flow leaves the sums and the compounding.
    """
    WIDE: tl.constexpr = ((STREAMS >> 6) & 1) != 0
    TALL: tl.constexpr = ((STREAMS >> 7) & 1) != 0
    BLOCK_M: tl.constexpr = TILE_U * TILE_V
    local_head = tl.program_id(1)
    global_head = (first_head + local_head).to(tl.int64)
    batch = global_head // heads
    head = global_head % heads
    kv_head = head // group

    tiles_v = tl.cdiv(num_cols, TILE_V)
    first_row = tl.program_id(0) // tiles_v * TILE_U
    first_col = tl.program_id(0) % tiles_v * TILE_V
    site = tl.arange(0, BLOCK_M)
    site_row, site_col = site // TILE_V, site % TILE_V
    token = (first_row + site_row).to(tl.int64) * n_minor + (first_col + site_col)
    valid = (first_row + site_row < num_rows) & (first_col + site_col < num_cols) & (token < seq_len)
    row = global_head * seq_len + token
    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if WIDE or TALL:
        q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, token, valid, stride_qt, D, BLOCK_D)
        k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
        v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
        wide_decline = bias_slope(tl.load(decay_ptr + head * 8 + 6), 1.0)
        tall_decline = bias_slope(tl.load(decay_ptr + head * 8 + 7), 1.0)
        lowest_row = -a_hi
        highest_row = TILE_U - 1 - a_lo
        if TOPOLOGY != PERIODIC:
            highest_row = tl.minimum(highest_row, num_rows - 1 - first_row)
            lowest_row = tl.maximum(lowest_row, -first_row)
        oldest = token
        if TOPOLOGY == CAUSAL:
            # Columns that lie beyond the end of a row are the beginning of the next: row -1 may hold the first keys.
            lowest_row = tl.maximum(-a_hi, -1 - first_row)
            oldest = tl.maximum(token - n_major * n_minor.to(tl.int64) + 1, 0)
            if HAS_FIRST_KEY:
                oldest = tl.maximum(oldest, oldest_key(first_key_ptr, batch, token, valid, seq_len))
        wide_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        tall_max = wide_max
        width = TILE_V - b_lo

        # First the maxima. They are taken over rows before the column's bias is added, which is the same in all.
        for first in range(-b_hi, width, BLOCK_N):
            key_col = first + tl.arange(0, BLOCK_N)
            b = site_col[:, None] - key_col[None, :]
            wide_best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
            tall_best = wide_best
            for key_row in range(lowest_row, highest_row + 1):
                key_token, key_valid = _key_row(
                    key_row, key_col, first_row, first_col, n_major, n_minor, seq_len, width, TOPOLOGY
                )
                scores = _scores(
                    q, k_base, key_token, key_valid, stride_kt, scale, key_row, key_col, first_row, first_col, n_major,
                    n_minor, token, oldest, TOPOLOGY, HAS_FIRST_KEY, TILE_U, D, BLOCK_D, PRECISION,
                )
                a = site_row - key_row
                if WIDE:
                    wide_rows = _axis_bias(a, a_lo, a_hi, wide_u, wide_decline * wide_unit_u)
                    wide_best = tl.maximum(wide_best, scores + wide_rows[:, None])
                if TALL:
                    tall_rows = _axis_bias(a, a_lo, a_hi, tall_u, tall_decline * tall_unit_u)
                    tall_best = tl.maximum(tall_best, scores + tall_rows[:, None])
            wide_columns = _axis_bias(b, b_lo, b_hi, wide_v, wide_decline * wide_unit_v)
            tall_columns = _axis_bias(b, b_lo, b_hi, tall_v, tall_decline * tall_unit_v)
            wide_max = tl.maximum(wide_max, tl.max(wide_best + wide_columns, axis=1))
            tall_max = tl.maximum(tall_max, tl.max(tall_best + tall_columns, axis=1))
        wide_max, tall_max = anchor(wide_max), anchor(tall_max)

        if SHARED:
            wide_acc, wide_total, wide_spread, tall_acc, tall_total, tall_spread = _attend(
                q, k_base, v_base, stride_kt, stride_vt, scale, token, oldest, site_row, site_col, first_row, first_col,
                n_major, n_minor, seq_len, lowest_row, highest_row, a_lo, a_hi, b_lo, b_hi, wide_u, wide_v, tall_u,
                tall_v, wide_decline * wide_unit_u, wide_decline * wide_unit_v, tall_decline * tall_unit_u,
                tall_decline * tall_unit_v, wide_max, tall_max,
                TOPOLOGY, HAS_FIRST_KEY, WIDE, TALL, TILE_U, TILE_V, BLOCK_N, D, BLOCK_D, WITH_ENTROPY, PRECISION,
            )
        else:
            wide_acc, wide_total, wide_spread, _, _, _ = _attend(
                q, k_base, v_base, stride_kt, stride_vt, scale, token, oldest, site_row, site_col, first_row, first_col,
                n_major, n_minor, seq_len, tl.maximum(lowest_row, -wide_u),
                tl.minimum(highest_row, TILE_U - 1 + wide_u), a_lo, a_hi, b_lo, b_hi, wide_u, wide_v, tall_u, tall_v,
                wide_decline * wide_unit_u, wide_decline * wide_unit_v, tall_decline * tall_unit_u,
                tall_decline * tall_unit_v, wide_max, tall_max,
                TOPOLOGY, HAS_FIRST_KEY, WIDE, False, TILE_U, TILE_V, BLOCK_N, D, BLOCK_D, WITH_ENTROPY, PRECISION,
            )
            _, _, _, tall_acc, tall_total, tall_spread = _attend(
                q, k_base, v_base, stride_kt, stride_vt, scale, token, oldest, site_row, site_col, first_row, first_col,
                n_major, n_minor, seq_len, tl.maximum(lowest_row, -tall_u),
                tl.minimum(highest_row, TILE_U - 1 + tall_u), a_lo, a_hi, b_lo, b_hi, wide_u, wide_v, tall_u, tall_v,
                wide_decline * wide_unit_u, wide_decline * wide_unit_v, tall_decline * tall_unit_u,
                tall_decline * tall_unit_v, wide_max, tall_max,
                TOPOLOGY, HAS_FIRST_KEY, False, TALL, TILE_U, TILE_V, BLOCK_N, D, BLOCK_D, WITH_ENTROPY, PRECISION,
            )
        gate_at = gate_rows(row, head, TOKEN_WEIGHTS) * 8 + 6
        if WIDE:
            gate = tl.load(weights_ptr + gate_at, mask=valid, other=0.0)
            y += wide_acc * (gate / wide_total)[:, None]
            _write_flow(wide_max, wide_total, wide_spread, lse_ptr, entropy_ptr, row * 8 + 6, valid,
                        WITH_LSE, WITH_ENTROPY)
        if TALL:
            gate = tl.load(weights_ptr + gate_at + 1, mask=valid, other=0.0)
            y += tall_acc * (gate / tall_total)[:, None]
            _write_flow(tall_max, tall_total, tall_spread, lse_ptr, entropy_ptr, row * 8 + 7, valid,
                        WITH_LSE, WITH_ENTROPY)

    for slot in tl.static_range(NUM_PARTIALS):
        partial = partials_ptr + (slot * tl.num_programs(1).to(tl.int64) + local_head) * seq_len * D
        y += load_rows(partial, token, valid, D, D, BLOCK_D)

    for stream in tl.static_range(8):
        if ((STREAMS >> stream) & 1) == 0:
            if WITH_LSE:
                tl.store(lse_ptr + row * 8 + stream, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=valid)
            if WITH_ENTROPY:
                tl.store(entropy_ptr + row * 8 + stream, tl.zeros([BLOCK_M], tl.float32), mask=valid)

    if HAS_STATE:
        state_base = state_ptr + batch * stride_sb + head * stride_sh
        state = load_rows(state_base, token, valid, stride_st, D, BLOCK_D).to(tl.float32)
        alpha = tl.load(alpha_ptr + gate_rows(row, head, TOKEN_ALPHA), mask=valid, other=0.0)
        y = state + alpha[:, None] * (y - state)
    store_rows(out_ptr + batch * stride_ob + head * stride_oh, token, valid, stride_ot, y, D, BLOCK_D)
