"""Line streams: each program owns a block of queries on a run of parallel lines of one family."""

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
    arcs,
    before_end,
    line_family,
    line_length,
    line_program,
    line_start,
    line_steps,
    oldest_key,
    on_line,
    reach_of,
    squared_step,
    strand,
    tokens_along,
)
from ..primitives.parts import accumulate_parts, cast_to_parts, dot_parts, load_parts, store_parts, zero_parts
from ..primitives.softmax import bias_slope, mixed, mixing, spread, write_statistics
from ..primitives.tiles import head_of, hidden_zero
from .arcs import arc_biases, whole_arcs
from .bands import attend_bands


@triton.jit
def _biases(
    query_position, key_position, length, loop, reach, slope, partner_slope, FORM: tl.constexpr, ARCS: tl.constexpr
):
    """Biases of a family's streams ``[BLOCK_M, BLOCK_N]``, -inf where a key is not seen; a spiral has no partner."""
    steps = line_steps(query_position, key_position, True)
    exists = (key_position < length)[None, :]
    if ARCS:
        forward, backward, squared = arcs(steps, loop, reach, FORM)
        bias = tl.where(forward & exists, -slope * squared, float("-inf"))
        partner_bias = tl.where(backward & exists, -partner_slope * squared, float("-inf"))
    else:
        visible, squared = strand(steps, loop, reach, FORM)
        bias = tl.where(visible & exists, -slope * squared, float("-inf"))
        partner_bias = bias
    return bias, partner_bias


@triton.jit
def _softmax(exponents, WITH_ENTROPY: tl.constexpr):
    """``(exponentials, maximum, total, spread)`` of whole rows of a tile, all of which see a key; without entropy, the
    total for the spread."""
    maximum = tl.max(exponents, axis=1)
    exponents -= maximum[:, None]
    p = tl.exp2(exponents)
    total = tl.sum(p, axis=1)
    spread_total = spread(p, exponents) if WITH_ENTROPY else total
    return p, maximum, total, spread_total


@triton.jit
def _weights(p, factor, partner_p, partner_factor, ARCS: tl.constexpr):
    if ARCS:
        return p * factor[:, None] + partner_p * partner_factor[:, None]
    else:
        return p


@triton.jit
def _of_stream(numbers, head, stream, queries):
    """A number out of ``[H, 8]``; 0 of a stream that is left out, which has no queries, whatever its own is."""
    return tl.load(numbers + head * NUM_STREAMS + stream, mask=queries > 0, other=0.0)


@triton.jit
def _head_gate(weights_ptr, head, stream, queries, TOKEN_WEIGHTS: tl.constexpr):
    """Gate of all queries of a head; of no meaning where they have gates of their own."""
    if TOKEN_WEIGHTS:
        return 0.0
    else:
        return _of_stream(weights_ptr, head, stream, queries)


@triton.jit
def _gates(weights_ptr, row, stream, head_gate, valid, TOKEN_WEIGHTS: tl.constexpr):
    """Gates ``[BLOCK_M]`` of one stream at rows of ``[B, H, T]``."""
    if TOKEN_WEIGHTS:
        return tl.load(weights_ptr + row * NUM_STREAMS + stream, mask=valid, other=0.0)
    else:
        return tl.zeros(valid.shape, tl.float32) + head_gate


@triton.jit
def _rows(
    q_base, weights_ptr, line, start, position, queries, partner_queries, head_gate, partner_head_gate, stride, slope,
    num_lines, length, seq_len, stride_qt, global_head, stream,
    STRAIGHT: tl.constexpr, TOPOLOGY: tl.constexpr, EVEN: tl.constexpr, ARCS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PARTS: tl.constexpr, TOKEN_WEIGHTS: tl.constexpr,
):
    """Queries at positions of a line: ``(token, valid, q, gate, partner's gate)``, tokens counted from ``start`` and
    ``q`` in parts."""
    token = tokens_along(line, position, stride, slope, num_lines, STRAIGHT)
    valid = on_line(position, token, length, seq_len - start, TOPOLOGY, EVEN)
    q = load_parts(q_base + start * stride_qt, token, valid, stride_qt, D, BLOCK_D, PARTS)
    row = global_head * seq_len + start + token
    gate = _gates(weights_ptr, row, stream, head_gate, valid & (position < queries), TOKEN_WEIGHTS)
    partner_gate = gate
    if ARCS:
        partner_gate = _gates(
            weights_ptr, row, stream + 1, partner_head_gate, valid & (position < partner_queries), TOKEN_WEIGHTS
        )
    return token, valid, q, gate, partner_gate


@triton.jit
def _write_statistics(
    lse_ptr, entropy_ptr, start, position, token, valid, queries, partner_queries, seq_len, global_head, stream,
    maximum, total, spread_total, partner_maximum, partner_total, partner_spread,
    ARCS: tl.constexpr, WITH_LSE: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):
    """Leaves the statistics of a block of queries, of each of its streams."""
    at = (global_head * seq_len + start + token) * NUM_STREAMS + stream
    write_statistics(
        maximum, total, spread_total, lse_ptr, entropy_ptr, at, valid & (position < queries), WITH_LSE, WITH_ENTROPY
    )
    if ARCS:
        write_statistics(
            partner_maximum, partner_total, partner_spread, lse_ptr, entropy_ptr, at + 1,
            valid & (position < partner_queries), WITH_LSE, WITH_ENTROPY,
        )


@triton.jit
def _whole_line(
    q, k_base, v_base, stride_kt, stride_vt, line, key_position, bias, partner_bias, gate, partner_gate, stride, slope,
    num_lines, length, remaining, scale,
    STRAIGHT: tl.constexpr, TOPOLOGY: tl.constexpr, ARCS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """Streams of a line that fits one block of keys, by one product with K and one with V; returns as `whole_arcs`."""
    key_token = tokens_along(line, key_position, stride, slope, num_lines, STRAIGHT)
    key_valid = on_line(key_position, key_token, length, remaining, TOPOLOGY, EVEN)
    k = load_parts(k_base, key_token, key_valid, stride_kt, D, BLOCK_D, PARTS)
    v = load_parts(v_base, key_token, key_valid, stride_vt, D, BLOCK_D, PARTS)
    scores = dot_parts(q, k, PARTS, PRECISION) * scale
    p, maximum, total, spread_total = _softmax(scores + bias, WITH_ENTROPY)
    partner_p, partner_maximum, partner_total, partner_spread = p, maximum, total, spread_total
    if ARCS:
        partner_p, partner_maximum, partner_total, partner_spread = _softmax(scores + partner_bias, WITH_ENTROPY)
    dtype: tl.constexpr = v[0].dtype
    factor, partner_factor, norm = mixing(gate, total, partner_gate, partner_total, ARCS, dtype)
    weights = _weights(p, factor, partner_p, partner_factor, ARCS)
    y = cast_to_parts(weights, v, zero_parts(BLOCK_M, BLOCK_D, PARTS), PARTS, PRECISION)
    y = mixed(y, norm, ARCS, dtype, PARTS)
    return y, maximum, total, spread_total, partner_maximum, partner_total, partner_spread


@triton.jit
def _run_of_lines(
    q_base, k_base, v_base, weights_ptr, decay_ptr, first_key_ptr, partial_base, lse_ptr, entropy_ptr,
    stride_qt, stride_kt, stride_vt, n_major, n_minor, winding, seq_len, scale, batch, head, global_head,
    family, first_line, block,
    TOPOLOGY: tl.constexpr, FORM: tl.constexpr, ARCS: tl.constexpr, STREAMS: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, HALFWAY: tl.constexpr, FOLD: tl.constexpr, BLOCK_C: tl.constexpr,
    LINES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, TOKEN_WEIGHTS: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, WITH_LSE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """The partial sum ``sum_s g_s O_s`` of one family for a block of positions on a run of lines.

    Where a line fits one block of keys (``WHOLE``) the streams share its products with K and V. Otherwise the run is of
    one line, and each stream visits the keys that it sees in a pass of its own.
    """
    loop, stride, slope, num_lines, length, max_step = line_family(
        family, n_major, n_minor, winding, seq_len, TOPOLOGY
    )
    STRAIGHT: tl.constexpr = ARCS or TOPOLOGY == CAUSAL
    stream = tl.where(family < 2, 2 * family, family + 2)
    # A stream that is left out has no queries.
    queries = tl.where(((STREAMS >> stream) & 1) != 0, length, 0)
    unit = squared_step(loop, FORM)
    decline = bias_slope(_of_stream(decay_ptr, head, stream, queries), unit)
    head_gate = _head_gate(weights_ptr, head, stream, queries, TOKEN_WEIGHTS)
    partner_decline = decline
    partner_queries = queries
    partner_head_gate = head_gate
    if ARCS:
        partner_queries = tl.where(((STREAMS >> (stream + 1)) & 1) != 0, length, 0)
        partner_decline = bias_slope(_of_stream(decay_ptr, head, stream + 1, partner_queries), unit)
        partner_head_gate = _head_gate(weights_ptr, head, stream + 1, partner_queries, TOKEN_WEIGHTS)

    query_position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    reach = tl.minimum(query_position, max_step)
    if not WHOLE:
        line = first_line
        start = line_start(family, line, n_minor, STRAIGHT, TOPOLOGY)
        length = line_length(line, length, stride, seq_len, TOPOLOGY)
        query_token, query_valid, q, gate, partner_gate = _rows(
            q_base, weights_ptr, line, start, query_position, queries, partner_queries, head_gate, partner_head_gate,
            stride, slope, num_lines, length, seq_len, stride_qt, global_head, stream, STRAIGHT, TOPOLOGY, EVEN, ARCS,
            D, BLOCK_D, PARTS, TOKEN_WEIGHTS,
        )
        if HAS_FIRST_KEY:
            oldest = oldest_key(first_key_ptr, batch, start + query_token, query_valid, seq_len)
            reach = reach_of(oldest, line, stride, query_position, max_step)
        (y, maximum, total, spread_total, partner_maximum, partner_total, partner_spread) = attend_bands(
            q, k_base + start * stride_kt, v_base + start * stride_vt, partial_base + start * D, stride_kt, stride_vt,
            line, block * BLOCK_M, query_token, query_valid, reach, decline, partner_decline, queries, partner_queries,
            gate, partner_gate, max_step, stride, slope, num_lines, length, loop, scale, STRAIGHT, TOPOLOGY,
            FORM, ARCS, EVEN, HALFWAY, HAS_FIRST_KEY, BLOCK_M, BLOCK_N, D, BLOCK_D, PARTS, WITH_ENTROPY,
            PRECISION,
        )
        query_position += hidden_zero(seq_len)
        query_token = tokens_along(line, query_position, stride, slope, num_lines, STRAIGHT)
        query_valid = before_end(query_position, length, EVEN)
        if ARCS and PARTS > 1:
            tl.debug_barrier()  # another thread may have written the first arc's
            accumulate_parts(partial_base + start * D, query_token, query_valid, y, True, D, BLOCK_D, PARTS)
        else:
            store_parts(partial_base + start * D, query_token, query_valid, D, y, D, BLOCK_D, PARTS)
        _write_statistics(
            lse_ptr, entropy_ptr, start, query_position, query_token, query_valid, queries, partner_queries, seq_len,
            global_head, stream, maximum, total, spread_total, partner_maximum,
            partner_total, partner_spread, ARCS, WITH_LSE, WITH_ENTROPY,
        )
    else:
        key_position = tl.arange(0, BLOCK_N)
        column = tl.arange(0, BLOCK_C)
        offset = tl.arange(0, BLOCK_M)
        # The same for every line of the run, but for packed documents.
        if ARCS and FOLD:
            bias, partner_bias = arc_biases(offset, column, loop, decline, partner_decline, EVEN)
        else:
            bias, partner_bias = _biases(
                query_position, key_position, length, loop, reach[:, None], decline, partner_decline, FORM, ARCS
            )
        for line in range(first_line, tl.minimum(first_line + LINES, num_lines)):
            # Tokens count from the first of the line, pointers and lengths too.
            # Not a multiple of the line for the compiler: it would carry each pointer from line to line by itself.
            start = line_start(family, tl.maximum(line, 0), n_minor, STRAIGHT, TOPOLOGY)
            k_line, v_line = k_base + start * stride_kt, v_base + start * stride_vt
            query_token, query_valid, q, gate, partner_gate = _rows(
                q_base, weights_ptr, line, start, query_position, queries, partner_queries, head_gate,
                partner_head_gate, stride, slope, num_lines, length, seq_len, stride_qt, global_head, stream, STRAIGHT,
                TOPOLOGY, EVEN, ARCS, D, BLOCK_D, PARTS, TOKEN_WEIGHTS,
            )
            if ARCS and FOLD:
                # Zeros that the compiler cannot see through: it would hold every comparison of offsets in registers.
                line_offset, line_offset_again = offset + tl.minimum(line, 0), offset - tl.minimum(line, 0)
                (y, maximum, total, spread_total, partner_maximum, partner_total, partner_spread) = whole_arcs(
                    q, k_line, v_line, stride_kt, stride_vt, line_offset, line_offset_again, bias, partner_bias,
                    gate, partner_gate, block * BLOCK_M, column, stride, length, seq_len - start, loop, scale,
                    TOPOLOGY, EVEN, BLOCK_M, D, BLOCK_D, PARTS, WITH_ENTROPY, PRECISION,
                )
            else:
                if HAS_FIRST_KEY:
                    oldest = oldest_key(first_key_ptr, batch, start + query_token, query_valid, seq_len)
                    reach = reach_of(oldest, line, stride, query_position, max_step)
                    bias, partner_bias = _biases(
                        query_position, key_position, length, loop, reach[:, None], decline, partner_decline, FORM, ARCS
                    )
                (y, maximum, total, spread_total, partner_maximum, partner_total, partner_spread) = _whole_line(
                    q, k_line, v_line, stride_kt, stride_vt, line, key_position, bias, partner_bias, gate,
                    partner_gate, stride, slope, num_lines, length, seq_len - start, scale, STRAIGHT, TOPOLOGY, ARCS,
                    EVEN, BLOCK_M, D, BLOCK_D, PARTS, WITH_ENTROPY, PRECISION,
                )
            store_parts(partial_base + start * D, query_token, query_valid, D, y, D, BLOCK_D, PARTS)
            _write_statistics(
                lse_ptr, entropy_ptr, start, query_position, query_token, query_valid, queries, partner_queries,
                seq_len, global_head, stream, maximum, total, spread_total, partner_maximum, partner_total,
                partner_spread, ARCS, WITH_LSE, WITH_ENTROPY,
            )


@triton.jit(do_not_specialize=["n_major", "n_minor", "winding", "seq_len", "first_head", "heads", "group"])
def lines_kernel(
    q_ptr, k_ptr, v_ptr, weights_ptr, decay_ptr, first_key_ptr, partials_ptr, lse_ptr, entropy_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    n_major, n_minor, winding, seq_len, first_head, heads, group, scale,
    TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, FAMILIES: tl.constexpr, GRID_FAMILIES: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, HALFWAY: tl.constexpr, FOLD: tl.constexpr, BLOCK_C: tl.constexpr,
    LINES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, TOKEN_WEIGHTS: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, WITH_LSE: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """Partial sums of the line families in ``GRID_FAMILIES`` for a chunk of heads.

    Grid: ``(line_programs(...), heads of the chunk)``; heads of all batch elements are counted through, from
    ``first_head``. ``partials`` is ``[families present, heads of the chunk, T, D]`` float32, ``scale`` that of the
    scores times log2(e), ``group`` the query heads of a key/value head.
    """
    local_head = tl.program_id(1)
    batch, head, global_head = head_of(first_head + local_head, heads)
    kv_head = (head.to(tl.int32) // group).to(tl.int64)
    family, first_line, block = line_program(
        tl.program_id(0), n_major, n_minor, winding, seq_len, TOPOLOGY, GRID_FAMILIES, BLOCK_M, LINES
    )
    slot = 0
    for candidate in tl.static_range(4):
        if (FAMILIES >> candidate) & 1:
            slot += (candidate < family).to(tl.int32)
    q_base = q_ptr + batch * stride_qb + head * stride_qh
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    partial_base = partials_ptr + (slot.to(tl.int64) * tl.num_programs(1) + local_head) * seq_len * D
    # The form of the open axis; the minor axis is closed on a cylinder too.
    FORM: tl.constexpr = OPEN_PAST if TOPOLOGY == CAUSAL else (OPEN_BOTH if TOPOLOGY == CYLINDER else CLOSED)
    if family >= 2:
        if GRID_FAMILIES & 12:
            _run_of_lines(
                q_base, k_base, v_base, weights_ptr, decay_ptr, first_key_ptr, partial_base, lse_ptr, entropy_ptr,
                stride_qt, stride_kt, stride_vt, n_major, n_minor, winding, seq_len, scale, batch, head, global_head,
                family, first_line, block, TOPOLOGY, FORM, False, STREAMS, WHOLE, EVEN, HALFWAY, FOLD, BLOCK_C,
                LINES, BLOCK_M, BLOCK_N, D, BLOCK_D, PARTS, TOKEN_WEIGHTS, HAS_FIRST_KEY, WITH_LSE, WITH_ENTROPY,
                PRECISION,
            )
    elif (TOPOLOGY == CYLINDER) and (family == MINOR):
        if GRID_FAMILIES & 2:
            _run_of_lines(
                q_base, k_base, v_base, weights_ptr, decay_ptr, first_key_ptr, partial_base, lse_ptr, entropy_ptr,
                stride_qt, stride_kt, stride_vt, n_major, n_minor, winding, seq_len, scale, batch, head, global_head,
                family, first_line, block, TOPOLOGY, CLOSED, True, STREAMS, WHOLE, EVEN, HALFWAY, FOLD, BLOCK_C,
                LINES, BLOCK_M, BLOCK_N, D, BLOCK_D, PARTS, TOKEN_WEIGHTS, HAS_FIRST_KEY, WITH_LSE, WITH_ENTROPY,
                PRECISION,
            )
    else:
        if GRID_FAMILIES & 3:
            _run_of_lines(
                q_base, k_base, v_base, weights_ptr, decay_ptr, first_key_ptr, partial_base, lse_ptr, entropy_ptr,
                stride_qt, stride_kt, stride_vt, n_major, n_minor, winding, seq_len, scale, batch, head, global_head,
                family, first_line, block, TOPOLOGY, FORM, True, STREAMS, WHOLE, EVEN, HALFWAY, FOLD, BLOCK_C,
                LINES, BLOCK_M, BLOCK_N, D, BLOCK_D, PARTS, TOKEN_WEIGHTS, HAS_FIRST_KEY, WITH_LSE, WITH_ENTROPY,
                PRECISION,
            )
