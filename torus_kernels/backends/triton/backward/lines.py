"""Backward of the line streams, keys first: a program owns a block of keys of one line and every query that sees it.

Where the block is the whole line it owns the softmaxes too. One visit of a score tile then gives all three gradients
with five products, and ``delta`` comes from the tile itself. Longer lines come here after `line_queries`, which has
left ``delta`` and the gradients of the queries.
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
from ..primitives.tiles import dot_cast, dot_transposed, dot_twice, hidden_zero, load_rows
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
def _along_queries(x, QUERIES_FIRST: tl.constexpr):
    """A vector of queries made to broadcast against a tile."""
    return x[:, None] if QUERIES_FIRST else x[None, :]


@triton.jit
def _row_sums(probs, d_probs, squared, gate, sums, valid, decay_sum, WHOLE_LINE: tl.constexpr):
    """``delta`` of one stream, its gate over its total, and what the rows of a whole line add to ``sum rho^2 dS``.

    That last sum is taken as ``sum rho^2 P dP - delta * sum rho^2 P``, so that the tile of distances need not be kept.
    """
    if WHOLE_LINE:
        normaliser = inverse(tl.sum(probs, axis=1))
        d_logits = probs * d_probs
        delta = normaliser * tl.sum(d_logits, axis=1)
        gate *= normaliser
        tl.store(sums, delta, mask=valid)
        decay_sum += gate * (tl.sum(squared * d_logits, axis=1) - delta * tl.sum(squared * probs, axis=1))
    else:
        delta = tl.load(sums, mask=valid, other=0.0)
        gate *= tl.load(sums + NUM_STREAMS, mask=valid, other=0.0)
    return delta, gate, decay_sum


@triton.jit
def _visit(
    operands, batch, head, heads, local_head, seq_len, scale, family, num_heads, line, shape, begin, k, v,
    key_position, d_k, d_v, decay_sum, partner_decay_sum,
    ARCS: tl.constexpr, FORM: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, WHOLE_LINE: tl.constexpr,
    FULL_BLOCKS: tl.constexpr, FAMILIES: tl.constexpr, ACCUMULATE: tl.constexpr, GATES: tl.constexpr,
    HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One block of queries of one head: what it adds to ``d_k``, ``d_v`` and the sums of ``rho^2 dS``.

    ``shape`` is that of the line, as `line_of` gives it; FAMILIES are those that have slots.
    """
    loop, stride, slope, num_lines, length, max_step, unit, stream, start = shape
    position = begin + tl.arange(0, BLOCK_M)
    valid = position < length
    place = tokens_along(line, position, stride, slope, num_lines, ARCS or TOPOLOGY == CAUSAL)
    token = start + place
    q = load_rows(line_base(operands.q, batch, head, start), place, valid, operands.q.token, D, BLOCK_D)  # [BLOCK_M, D]
    d_out = load_rows(line_base(operands.d_out, batch, head, start), place, valid, operands.d_out.token, D, BLOCK_D)
    reach = max_step
    if HAS_FIRST_KEY:
        oldest = oldest_key(operands.first_key, batch, token, valid, seq_len)
        reach = _along_queries(reach_of(oldest, line, stride, position, max_step), WHOLE_LINE)
    # Whole softmaxes are summed along rows of queries; otherwise rows of keys spare both products a transpose.
    if WHOLE_LINE:
        products = dot_transposed(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
        steps = line_steps(position, key_position)
    else:
        products = dot_transposed(k, q, PRECISION)  # [BLOCK_N, BLOCK_M]
        steps = -line_steps(key_position, position)
    on_line = _along_queries(key_position < length, not WHOLE_LINE)
    visible, partner_visible, squared = visibility(steps, loop, reach, on_line, ARCS, FORM, FULL_BLOCKS)
    sums = row_sums_of(operands, local_head, seq_len, token) + stream
    decay = operands.decay + head * NUM_STREAMS + stream
    lse, gate = load_stream(operands, batch, head, heads, seq_len, token, valid, stream, STREAMS, GATES)
    probs = probabilities(products, scale * LOG2E, bias_slope(tl.load(decay), unit), squared,
                          _along_queries(lse, WHOLE_LINE), visible)
    if ARCS:
        lse, partner_gate = load_stream(
            operands, batch, head, heads, seq_len, token, valid, stream + 1, STREAMS, GATES
        )
        partner_probs = probabilities(products, scale * LOG2E, bias_slope(tl.load(decay + 1), unit), squared,
                                      _along_queries(lse, WHOLE_LINE), partner_visible)
    d_probs = dot_transposed(d_out, v, PRECISION) if WHOLE_LINE else dot_transposed(v, d_out, PRECISION)
    if ARCS:
        partner_delta, partner_gate, partner_decay_sum = _row_sums(
            partner_probs, d_probs, squared, partner_gate, sums + 1, valid, partner_decay_sum, WHOLE_LINE
        )
    delta, gate, decay_sum = _row_sums(probs, d_probs, squared, gate, sums, valid, decay_sum, WHOLE_LINE)
    if ARCS and not WHOLE_LINE and k.dtype != tl.float32:
        # Fewer instructions than below, and more registers at once.
        weighted = gate[None, :] * probs + partner_gate[None, :] * partner_probs
        d_scores = weighted * d_probs - (
            (gate * delta)[None, :] * probs + (partner_gate * partner_delta)[None, :] * partner_probs
        )
    else:
        weighted = _along_queries(gate, WHOLE_LINE) * probs
        d_scores = weighted * (d_probs - _along_queries(delta, WHOLE_LINE))
        if ARCS:
            partner_weighted = _along_queries(partner_gate, WHOLE_LINE) * partner_probs
            weighted += partner_weighted
            d_scores += partner_weighted * (d_probs - _along_queries(partner_delta, WHOLE_LINE))
    if WHOLE_LINE:
        # The gradient that takes the score gradients twice comes first, and is written before the others are made: they
        # need the score gradients only rounded.
        weighted = weighted.to(k.dtype)
        d_q = scale * dot_twice(d_scores, k, PRECISION)  # [BLOCK_M, D]
        zero = hidden_zero(seq_len)
        position = begin + zero + tl.arange(0, BLOCK_M)
        place = tokens_along(line, position, stride, slope, num_lines, ARCS or TOPOLOGY == CAUSAL)
        d_q_base = partial_of(operands.d_q, slot_of(family + zero, FAMILIES), num_heads, local_head, seq_len, D)
        accumulate_rows(d_q_base + start * D, place, position < length, d_q, ACCUMULATE, D, BLOCK_D)
        d_v = dot_cast(tl.trans(weighted), d_out, PRECISION, d_v)
        d_k = dot_cast(tl.trans(d_scores.to(k.dtype)), q, PRECISION, d_k)
    else:
        d_v = dot_cast(weighted, d_out, PRECISION, d_v)
        d_k = dot_cast(d_scores, q, PRECISION, d_k)
    return d_k, d_v, decay_sum, partner_decay_sum


@triton.jit
def _keys_of_line(
    operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program, num_programs,
    family, line, block,
    ARCS: tl.constexpr, FORM: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, WHOLE_LINE: tl.constexpr,
    ONE_VISIT: tl.constexpr, FULL_BLOCKS: tl.constexpr, FAMILIES: tl.constexpr, ACCUMULATE: tl.constexpr,
    GATES: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    local_pair, num_pairs = tl.program_id(1), tl.num_programs(1)
    kv_heads = heads // group
    batch, kv_head = (first_pair + local_pair) // kv_heads, (first_pair + local_pair) % kv_heads
    shape = line_of(family, line, n_major, n_minor, winding, seq_len, ARCS, FORM, TOPOLOGY)
    _, stride, slope, num_lines, length, max_step, unit, stream, start = shape
    program = first_program + tl.program_id(0)

    first_key_position = 0 if WHOLE_LINE else block * BLOCK_N
    key_position = first_key_position + tl.arange(0, BLOCK_N)
    key_valid = key_position < length
    key_place = tokens_along(line, key_position, stride, slope, num_lines, ARCS or TOPOLOGY == CAUSAL)
    k = load_rows(line_base(operands.k, batch, kv_head, start), key_place, key_valid, operands.k.token, D, BLOCK_D)
    v = load_rows(line_base(operands.v, batch, kv_head, start), key_place, key_valid, operands.v.token, D, BLOCK_D)
    decay_sum = tl.zeros([BLOCK_M], tl.float32)
    if ONE_VISIT:
        # One query head and one block of queries: the sums need not live in registers while the tile is computed.
        d_k, d_v, decay_sum, partner_decay_sum = _visit(
            operands, batch, kv_head, heads, local_pair, seq_len, scale, family, num_pairs, line, shape, 0, k, v,
            key_position, None, None, decay_sum, decay_sum, ARCS, FORM, TOPOLOGY, STREAMS, WHOLE_LINE, FULL_BLOCKS,
            FAMILIES, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, BLOCK_M,
        )
        # What follows from the line's family is computed anew: it need not be held meanwhile.
        zero = hidden_zero(seq_len)
        family += zero
        _, _, _, _, _, _, unit, stream, _ = line_of(
            family, line, n_major + zero, n_minor + zero, winding, seq_len, ARCS, FORM, TOPOLOGY
        )
        store_decay_sums(operands, first_pair + local_pair, program, num_programs, stream,
                         unit * tl.sum(decay_sum, axis=0), unit * tl.sum(partner_decay_sum, axis=0))
    else:
        d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if FORM == OPEN_PAST:
            query_begin = first_key_position
            query_end = tl.minimum(length, first_key_position + BLOCK_N + max_step)
        else:
            query_begin = 0
            query_end = length
        for member in range(group):
            head = kv_head * group + member
            decay_sum = tl.zeros([BLOCK_M], tl.float32)
            partner_decay_sum = tl.zeros([BLOCK_M], tl.float32)
            for begin in range(query_begin, query_end, BLOCK_M):
                d_k, d_v, decay_sum, partner_decay_sum = _visit(
                    operands, batch, head, heads, local_pair * group + member, seq_len, scale, family,
                    num_pairs * group, line, shape, begin, k, v, key_position, d_k, d_v, decay_sum, partner_decay_sum,
                    ARCS, FORM, TOPOLOGY, STREAMS, WHOLE_LINE, FULL_BLOCKS, FAMILIES, ACCUMULATE, GATES, HAS_FIRST_KEY,
                    PRECISION, D, BLOCK_D, BLOCK_M,
                )
            if WHOLE_LINE:
                store_decay_sums(operands, batch * heads + head, program, num_programs, stream,
                                 unit * tl.sum(decay_sum, axis=0), unit * tl.sum(partner_decay_sum, axis=0))
    key_position = first_key_position + hidden_zero(seq_len) + tl.arange(0, BLOCK_N)
    key_place = tokens_along(line, key_position, stride, slope, num_lines, ARCS or TOPOLOGY == CAUSAL)
    slot = slot_of(family, FAMILIES)
    d_k_base = partial_of(operands.d_k, slot, num_pairs, local_pair, seq_len, D)
    d_v_base = partial_of(operands.d_v, slot, num_pairs, local_pair, seq_len, D)
    accumulate_rows(d_k_base + start * D, key_place, key_position < length, d_k, ACCUMULATE, D, BLOCK_D)
    accumulate_rows(d_v_base + start * D, key_place, key_position < length, d_v, ACCUMULATE, D, BLOCK_D)


@triton.jit(do_not_specialize=[
    "heads", "group", "seq_len", "n_major", "n_minor", "winding", "first_pair", "first_program", "num_programs",
])
def lines_by_keys(
    operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program, num_programs,
    FAMILIES: tl.constexpr, GRID_FAMILIES: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr,
    WHOLE_LINE: tl.constexpr, ONE_VISIT: tl.constexpr, FULL_BLOCKS: tl.constexpr, ACCUMULATE: tl.constexpr,
    GATES: tl.constexpr, HAS_FIRST_KEY: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: a block of keys of one line, for one key/value head and the query heads that read it.

    Grid: ``(line_programs(...), key/value heads of the chunk)``. FAMILIES have slots in the workspaces, GRID_FAMILIES
    are in the grid, and its programs are numbered from ``first_program`` on out of ``num_programs``.
    """
    family, line, block = line_program(
        tl.program_id(0), n_major, n_minor, winding, seq_len, TOPOLOGY, GRID_FAMILIES, BLOCK_N, 1
    )
    FORM: tl.constexpr = CLOSED if TOPOLOGY == PERIODIC else (OPEN_PAST if TOPOLOGY == CAUSAL else OPEN_BOTH)
    if family > MINOR:
        if GRID_FAMILIES & 12:
            _keys_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program,
                num_programs, family, line, block, False, FORM, TOPOLOGY, STREAMS, WHOLE_LINE, ONE_VISIT,
                FULL_BLOCKS, FAMILIES, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )
    elif (TOPOLOGY == CYLINDER) & (family == MINOR):
        if TOPOLOGY == CYLINDER and GRID_FAMILIES & 2:
            _keys_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program,
                num_programs, family, line, block, True, CLOSED, TOPOLOGY, STREAMS, WHOLE_LINE, ONE_VISIT,
                FULL_BLOCKS, FAMILIES, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )
    else:
        if GRID_FAMILIES & 3:
            _keys_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program,
                num_programs, family, line, block, True, FORM, TOPOLOGY, STREAMS, WHOLE_LINE, ONE_VISIT,
                FULL_BLOCKS, FAMILIES, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N,
            )
