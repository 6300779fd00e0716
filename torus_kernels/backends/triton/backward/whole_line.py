"""Backward of a line that one tile holds: all three gradients in one visit of its scores.

The tile owns the softmaxes, and ``delta`` comes from it: five products for the seven of queries and keys visited apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CAUSAL, line_steps, tokens_along
from ..primitives.parts import (
    accumulate_parts,
    cast_to_parts,
    dot_parts,
    scaled_parts,
    twice_to_parts,
    zero_parts,
)
from ..primitives.softmax import LOG2E, bias_slope
from ..primitives.tiles import hidden_zero
from .line import queries_of_line, visibility
from .operands import (
    ROW_NUMBERS,
    inverse,
    load_decay,
    load_stream,
    partial_of,
    probabilities,
    row_numbers_of,
    slot_of,
)


@triton.jit
def _row_sums(probs, d_probs, squared, gate, numbers, valid):
    """``delta`` of one stream, which is left for its gate's gradient, the gate over the total, and the line's
    ``sum rho^2 dS``.

    That last sum is taken as ``sum rho^2 P dP - delta * sum rho^2 P``, so that the tile of distances need not be kept.
    """
    normaliser = inverse(tl.sum(probs, axis=1))
    d_logits = probs * d_probs
    delta = normaliser * tl.sum(d_logits, axis=1)
    gate *= normaliser
    tl.store(numbers, delta, mask=valid)
    decay_sums = gate * (tl.sum(squared * d_logits, axis=1) - delta * tl.sum(squared * probs, axis=1))
    return delta, gate, tl.sum(decay_sums, axis=0)


@triton.jit
def visit_whole_line(
    operands, batch, head, heads, local_head, seq_len, scale, family, num_heads, line, shape, k, v, key_position,
    ARCS: tl.constexpr, FORM: tl.constexpr, TOPOLOGY: tl.constexpr, STREAMS: tl.constexpr, FULL_BLOCKS: tl.constexpr,
    FAMILIES: tl.constexpr, ACCUMULATE: tl.constexpr, GATES: tl.constexpr, HAS_FIRST_KEY: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes the gradient of the queries of one head; ``(d_k, d_v)`` and each stream's ``sum rho^2 dS``.

    ``shape`` is that of the line, as `line_of` gives it; FAMILIES are those that have slots.

    Rows of tiles are queries, along which softmaxes are summed.
    """
    loop, stride, slope, num_lines, length, _, unit, stream, start = shape
    token, valid, q, d_out, reach = queries_of_line(
        operands, batch, head, seq_len, line, shape, 0, ARCS, TOPOLOGY, HAS_FIRST_KEY, D, BLOCK_D, PARTS, BLOCK_M
    )
    if HAS_FIRST_KEY:
        reach = reach[:, None]
    position = tl.arange(0, BLOCK_M)
    products = dot_parts(q, k, PARTS, PRECISION)  # [BLOCK_M, BLOCK_N]
    visible, partner_visible, squared = visibility(
        line_steps(position, key_position, True), loop, reach, (key_position < length)[None, :], ARCS, FORM,
        FULL_BLOCKS, False, False,
    )
    numbers = row_numbers_of(operands, local_head, seq_len, token, stream)
    lse, gate = load_stream(operands, batch, head, heads, seq_len, token, valid, stream, STREAMS, GATES)
    probs = probabilities(
        products, scale * LOG2E, bias_slope(load_decay(operands, head, stream, STREAMS), unit), squared, lse[:, None],
        visible,
    )
    if ARCS:
        lse, partner_gate = load_stream(operands, batch, head, heads, seq_len, token, valid, stream + 1, STREAMS, GATES)
        partner_probs = probabilities(
            products, scale * LOG2E, bias_slope(load_decay(operands, head, stream + 1, STREAMS), unit), squared,
            lse[:, None], partner_visible,
        )
    d_probs = dot_parts(d_out, v, PARTS, PRECISION)
    if ARCS:
        partner_delta, partner_gate, partner_decay_sum = _row_sums(
            partner_probs, d_probs, squared, partner_gate, numbers + ROW_NUMBERS, valid
        )
    delta, gate, decay_sum = _row_sums(probs, d_probs, squared, gate, numbers, valid)
    if not ARCS:
        partner_decay_sum = 0.0
    weighted = gate[:, None] * probs
    d_scores = weighted * (d_probs - delta[:, None])
    if ARCS:
        partner_weighted = partner_gate[:, None] * partner_probs
        weighted += partner_weighted
        d_scores += partner_weighted * (d_probs - partner_delta[:, None])
    # The gradient that takes the score gradients twice comes first, and is written before the others are made: they
    # need the score gradients only rounded.
    weighted = weighted.to(k[0].dtype)
    d_q = twice_to_parts(d_scores, k, zero_parts(BLOCK_M, BLOCK_D, PARTS), PARTS, PRECISION, True)  # [BLOCK_M, D]
    zero = hidden_zero(seq_len)
    position = zero + tl.arange(0, BLOCK_M)
    place = tokens_along(line, position, stride, slope, num_lines, ARCS or TOPOLOGY == CAUSAL)
    d_q_base = partial_of(operands.d_q, slot_of(family + zero, FAMILIES), num_heads, local_head, seq_len, D)
    d_q = scaled_parts(d_q, scale, PARTS)
    accumulate_parts(d_q_base + start * D, place, position < length, d_q, ACCUMULATE, D, BLOCK_D, PARTS)
    nothing = zero_parts(BLOCK_N, BLOCK_D, PARTS)
    d_v = cast_to_parts(tl.trans(weighted), d_out, nothing, PARTS, PRECISION)
    d_k = cast_to_parts(tl.trans(d_scores.to(k[0].dtype)), q, nothing, PARTS, PRECISION)
    return d_k, d_v, decay_sum, partner_decay_sum
