"""Backward of the line streams, keys first: a program owns a block of keys of one line and every query that sees it.

Where the block is the whole line, `whole_line` gives the gradient of the queries with those of keys and values. Longer
lines come here after `line_queries`, which has left that, and the numbers of the query rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import (
    CAUSAL,
    CLOSED,
    CYLINDER,
    MINOR,
    OPEN_BOTH,
    OPEN_PAST,
    PERIODIC,
    from_half,
    line_program,
    line_steps,
    tokens_along,
)
from ..primitives.parts import accumulate_parts, cast_to_parts, dot_parts, load_parts, zero_parts
from ..primitives.softmax import LOG2E, bias_slope
from ..primitives.tiles import hidden_zero
from .line import line_base, line_of, queries_of_line, visibility
from .operands import (
    ROW_NUMBERS,
    load_decay,
    load_row_numbers,
    partial_of,
    probabilities,
    row_numbers_of,
    slot_of,
    store_decay_sums,
)
from .whole_line import visit_whole_line


@triton.jit
def _visit(
    operands, batch, head, local_head, seq_len, scale, line, shape, begin, k, v, first_key_position, key_position, d_k,
    d_v,
    ARCS: tl.constexpr, FORM: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, FULL_BLOCKS: tl.constexpr,
    FULL_ROWS: tl.constexpr, HALFWAY: tl.constexpr, HAS_FIRST_KEY: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """What a block of queries of one head adds to ``d_k`` and ``d_v``; ``shape`` is that of the line, as of `line_of`.

    Tiles have rows of keys, which spares both products a transpose.
    """
    loop, _, _, _, length, _, unit, stream, _ = shape
    token, valid, q, d_out, reach = queries_of_line(
        operands, batch, head, seq_len, line, shape, begin, ARCS, TOPOLOGY, HAS_FIRST_KEY, D, BLOCK_D, PARTS,
        BLOCK_M,
    )
    if HAS_FIRST_KEY:
        reach = reach[None, :]
    products = dot_parts(k, q, PARTS, PRECISION)  # [BLOCK_N, BLOCK_M]
    # Counted from the block, places along its rows are the same for every block.
    TURNS: tl.constexpr = HALFWAY and not ARCS and FORM == CLOSED
    turn = from_half(begin, first_key_position, loop, BLOCK_N, TURNS)
    steps = line_steps(tl.arange(0, BLOCK_M), key_position - begin - turn, False)
    visible, partner_visible, squared = visibility(
        steps, loop, reach, (key_position < length)[:, None], ARCS, FORM, FULL_BLOCKS, k[0].dtype != tl.float32,
        TURNS,
    )
    numbers = row_numbers_of(operands, local_head, seq_len, token, stream)
    delta, lse, gate, gated_delta = load_row_numbers(numbers, valid, FULL_ROWS)
    probs = probabilities(
        products, scale * LOG2E, bias_slope(load_decay(operands, head, stream, STREAMS), unit), squared, lse[None, :],
        visible,
    )
    if ARCS:
        partner_delta, lse, partner_gate, partner_gated_delta = load_row_numbers(
            numbers + ROW_NUMBERS, valid, FULL_ROWS
        )
        partner_probs = probabilities(
            products, scale * LOG2E, bias_slope(load_decay(operands, head, stream + 1, STREAMS), unit), squared,
            lse[None, :], partner_visible,
        )
    d_probs = dot_parts(v, d_out, PARTS, PRECISION)
    weighted = gate[None, :] * probs
    if ARCS and k[0].dtype != tl.float32:
        # Fewer instructions than below, and more registers at once.
        weighted += partner_gate[None, :] * partner_probs
        d_scores = weighted * d_probs - (gated_delta[None, :] * probs + partner_gated_delta[None, :] * partner_probs)
    else:
        d_scores = weighted * (d_probs - delta[None, :])
        if ARCS:
            partner_weighted = partner_gate[None, :] * partner_probs
            weighted += partner_weighted
            d_scores += partner_weighted * (d_probs - partner_delta[None, :])
    d_v = cast_to_parts(weighted, d_out, d_v, PARTS, PRECISION)
    d_k = cast_to_parts(d_scores, q, d_k, PARTS, PRECISION)
    return d_k, d_v


@triton.jit
def _keys_of_line(
    operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program, num_programs,
    family, line, block,
    ARCS: tl.constexpr, FORM: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, WHOLE_LINE: tl.constexpr,
    GROUPED: tl.constexpr, FULL_BLOCKS: tl.constexpr, FULL_ROWS: tl.constexpr, HALFWAY: tl.constexpr,
    FAMILIES: tl.constexpr, ACCUMULATE: tl.constexpr, GATES: tl.constexpr, HAS_FIRST_KEY: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    local_pair, num_pairs = tl.program_id(1), tl.num_programs(1)
    kv_heads = heads // group
    batch, kv_head = (first_pair + local_pair) // kv_heads, (first_pair + local_pair) % kv_heads
    shape = line_of(family, line, n_major, n_minor, winding, seq_len, ARCS, FORM, TOPOLOGY)
    _, stride, slope, num_lines, length, max_step, unit, stream, start = shape

    first_key_position = 0 if WHOLE_LINE else block * BLOCK_N
    key_position = first_key_position + tl.arange(0, BLOCK_N)
    key_valid = key_position < length
    key_place = tokens_along(line, key_position, stride, slope, num_lines, ARCS or TOPOLOGY == CAUSAL)
    k_base, v_base = line_base(operands.k, batch, kv_head, start), line_base(operands.v, batch, kv_head, start)
    k = load_parts(k_base, key_place, key_valid, operands.k.token, D, BLOCK_D, PARTS)
    v = load_parts(v_base, key_place, key_valid, operands.v.token, D, BLOCK_D, PARTS)
    if WHOLE_LINE:
        # The sums need not live in registers while the tile is computed.
        d_k, d_v, decay_sum, partner_decay_sum = visit_whole_line(
            operands, batch, kv_head, heads, local_pair, seq_len, scale, family, num_pairs, line, shape, k, v,
            key_position, ARCS, FORM, TOPOLOGY, STREAMS, FULL_BLOCKS, FAMILIES, ACCUMULATE, GATES, HAS_FIRST_KEY,
            PRECISION, D, BLOCK_D, PARTS, BLOCK_M, BLOCK_N,
        )
        # What follows from the line's family is computed anew: it need not be held meanwhile.
        zero = hidden_zero(seq_len)
        family += zero
        _, _, _, _, _, _, unit, stream, _ = line_of(
            family, line, n_major + zero, n_minor + zero, winding, seq_len, ARCS, FORM, TOPOLOGY
        )
        store_decay_sums(operands, first_pair + local_pair, first_program + tl.program_id(0), num_programs, stream,
                         unit * decay_sum, unit * partner_decay_sum)
    else:
        d_k = zero_parts(BLOCK_N, BLOCK_D, PARTS)
        d_v = zero_parts(BLOCK_N, BLOCK_D, PARTS)
        if FORM == OPEN_PAST:
            query_begin = first_key_position
            query_end = tl.minimum(length, first_key_position + BLOCK_N + max_step)
        else:
            query_begin = 0
            query_end = length
        for member in range(group if GROUPED else 1):
            for begin in range(query_begin, query_end, BLOCK_M):
                d_k, d_v = _visit(
                    operands, batch, kv_head * group + member, local_pair * group + member, seq_len, scale, line, shape,
                    begin, k, v, first_key_position, key_position, d_k, d_v, ARCS, FORM, TOPOLOGY, STREAMS,
                    FULL_BLOCKS, FULL_ROWS, HALFWAY, HAS_FIRST_KEY, PRECISION, D, BLOCK_D, PARTS, BLOCK_M, BLOCK_N,
                )
    key_position = first_key_position + hidden_zero(seq_len) + tl.arange(0, BLOCK_N)
    key_place = tokens_along(line, key_position, stride, slope, num_lines, ARCS or TOPOLOGY == CAUSAL)
    slot = slot_of(family, FAMILIES)
    d_k_base = partial_of(operands.d_k, slot, num_pairs, local_pair, seq_len, D)
    d_v_base = partial_of(operands.d_v, slot, num_pairs, local_pair, seq_len, D)
    accumulate_parts(d_k_base + start * D, key_place, key_position < length, d_k, ACCUMULATE, D, BLOCK_D, PARTS)
    accumulate_parts(d_v_base + start * D, key_place, key_position < length, d_v, ACCUMULATE, D, BLOCK_D, PARTS)


@triton.jit(do_not_specialize=[
    "heads", "group", "seq_len", "n_major", "n_minor", "winding", "first_pair", "first_program", "num_programs",
])
def lines_by_keys(
    operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program, num_programs,
    FAMILIES: tl.constexpr, GRID_FAMILIES: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr,
    WHOLE_LINE: tl.constexpr, GROUPED: tl.constexpr, FULL_BLOCKS: tl.constexpr, FULL_ROWS: tl.constexpr,
    HALFWAY: tl.constexpr, ACCUMULATE: tl.constexpr, GATES: tl.constexpr, HAS_FIRST_KEY: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a block of keys of one line, for one key/value head and the query heads that read it.

    Grid: ``(line_programs(...), key/value heads of the chunk)``. FAMILIES have slots in the workspaces, GRID_FAMILIES
    are in the grid, and its programs are numbered from ``first_program`` on out of ``num_programs``. GROUPED where
    several query heads read a key; blocks of keys, FULL_BLOCKS, or of queries, FULL_ROWS, may divide every line,
    HALFWAY where `halfway` for closed ones.
    """
    family, line, block = line_program(
        tl.program_id(0), n_major, n_minor, winding, seq_len, TOPOLOGY, GRID_FAMILIES, BLOCK_N, 1
    )
    FORM: tl.constexpr = CLOSED if TOPOLOGY == PERIODIC else (OPEN_PAST if TOPOLOGY == CAUSAL else OPEN_BOTH)
    if family > MINOR:
        if GRID_FAMILIES & 12:
            _keys_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program,
                num_programs, family, line, block, False, FORM, TOPOLOGY, STREAMS, WHOLE_LINE, GROUPED,
                FULL_BLOCKS, FULL_ROWS, HALFWAY, FAMILIES, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D,
                PARTS, BLOCK_M, BLOCK_N,
            )
    elif (TOPOLOGY == CYLINDER) & (family == MINOR):
        if TOPOLOGY == CYLINDER and GRID_FAMILIES & 2:
            _keys_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program,
                num_programs, family, line, block, True, CLOSED, TOPOLOGY, STREAMS, WHOLE_LINE, GROUPED,
                FULL_BLOCKS, FULL_ROWS, HALFWAY, FAMILIES, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D,
                PARTS, BLOCK_M, BLOCK_N,
            )
    else:
        if GRID_FAMILIES & 3:
            _keys_of_line(
                operands, heads, group, seq_len, n_major, n_minor, winding, scale, first_pair, first_program,
                num_programs, family, line, block, True, FORM, TOPOLOGY, STREAMS, WHOLE_LINE, GROUPED,
                FULL_BLOCKS, FULL_ROWS, HALFWAY, FAMILIES, ACCUMULATE, GATES, HAS_FIRST_KEY, PRECISION, D, BLOCK_D,
                PARTS, BLOCK_M, BLOCK_N,
            )
