"""The two arcs of a closed loop of even length, folded so that either is a dense tile: one exponential for each score.

Of the keys congruent modulo half a loop a query sees one on its forward arc and one on its backward arc (see
`folded_steps`): these are the two halves of the keys, in an order that depends on the query. So the products of a
block of queries with both halves are exchanged element by element, each arc's softmax is one full tile, and the
weights are exchanged back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import folded_steps, on_line, tokens_along
from ..primitives.parts import cast_to_parts, dot_parts, load_parts, zero_parts
from ..primitives.softmax import masked, mixed, mixing, spread


@triton.jit
def _half_tokens(
    block_position, column, shift, stride, length, remaining, TOPOLOGY: tl.constexpr, EVEN: tl.constexpr
):
    """Tokens of the keys at ``block_position + column - shift`` and which of them exist."""
    position = block_position + column - shift
    position = tl.where(position < 0, position + length, position)
    position = tl.where(position >= length, position - length, position)
    token = tokens_along(0, position, stride, 0, 1, True)
    return token, on_line(position, token, length, remaining, TOPOLOGY, EVEN)


@triton.jit
def _nearer(offset, column):
    """What the nearer column's key is to the query: ``(forward, backward, own)``, see `folded_steps`."""
    query, key = offset[:, None], column[None, :]
    return query > key, query < key, query == key


@triton.jit
def arc_biases(offset, column, loop, decline, partner_decline, EVEN: tl.constexpr):
    """Biases ``[BLOCK_M, columns]`` of the forward and of the backward arc, -inf where there is no key."""
    half = (loop // 2).to(tl.float32)
    steps, partner_steps = folded_steps(offset, column, half)
    bias = -decline * (steps * steps)
    partner_bias = -partner_decline * (partner_steps * partner_steps)
    if not EVEN:
        exists = (column < half)[None, :]
        bias, partner_bias = masked(bias, exists), masked(partner_bias, exists)
    return bias, partner_bias


@triton.jit
def _product_with_keys(q, k_base, token, valid, stride_kt, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
                       PRECISION: tl.constexpr):
    return dot_parts(q, load_parts(k_base, token, valid, stride_kt, D, BLOCK_D, PARTS), PARTS, PRECISION)


@triton.jit
def _softmax(scores, own, bias, scale, WITH_ENTROPY: tl.constexpr):
    """One arc's ``(exponentials, own key's, maximum, total, spread)``; the bias of the query's ``own`` key is zero."""
    exponents = scores * scale + bias
    maximum = tl.maximum(tl.max(exponents, axis=1), own)
    exponents -= maximum[:, None]
    p = tl.exp2(exponents)
    p_own = tl.exp2(own - maximum)
    total = tl.sum(p, axis=1) + p_own
    spread_total = total
    if WITH_ENTROPY:
        spread_total = spread(p, exponents) + tl.where(p_own > 0, p_own * (own - maximum), 0.0)
    return p, p_own, maximum, total, spread_total


@triton.jit
def whole_arcs(
    q, k_base, v_base, stride_kt, stride_vt, offset, offset_again, bias, partner_bias, gate, partner_gate,
    block_position, column, stride, length, remaining, loop, scale,
    TOPOLOGY: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """Both arcs of a line whose half fits one block: their partial sum, then both softmaxes:
    ``(y, maximum, total, spread, partner's maximum, total, spread)``."""
    half = loop // 2
    token0, valid0 = _half_tokens(block_position, column, 0, stride, length, remaining, TOPOLOGY, EVEN)
    token1, valid1 = _half_tokens(block_position, column, half, stride, length, remaining, TOPOLOGY, EVEN)
    scores0 = _product_with_keys(q, k_base, token0, valid0, stride_kt, D, BLOCK_D, PARTS, PRECISION)
    scores1 = _product_with_keys(q, k_base, token1, valid1, stride_kt, D, BLOCK_D, PARTS, PRECISION)
    forward, backward, own = _nearer(offset, column)
    own_score = tl.sum(tl.where(own, scores0, 0.0), axis=1) * scale
    p, p_own, maximum, total, spread_total = _softmax(
        tl.where(forward, scores0, scores1), own_score, bias, scale, WITH_ENTROPY
    )
    partner_p, partner_p_own, partner_maximum, partner_total, partner_spread = _softmax(
        tl.where(backward, scores0, scores1), own_score, partner_bias, scale, WITH_ENTROPY
    )
    factor, partner_factor, norm = mixing(gate, total, partner_gate, partner_total, True, q[0].dtype)
    forward, _, own = _nearer(offset_again, column)
    partner_p *= partner_factor[:, None]
    # Half a loop away lies one key for both.
    p = p * factor[:, None] + tl.where(own, partner_p, 0.0)
    p_own = (p_own * factor + partner_p_own * partner_factor)[:, None]
    v = load_parts(v_base, token0, valid0, stride_vt, D, BLOCK_D, PARTS)
    weights = tl.where(own, p_own, tl.where(forward, p, partner_p))
    y = cast_to_parts(weights, v, zero_parts(BLOCK_M, BLOCK_D, PARTS), PARTS, PRECISION)
    v = load_parts(v_base, token1, valid1, stride_vt, D, BLOCK_D, PARTS)
    y = cast_to_parts(tl.where(forward, partner_p, p), v, y, PARTS, PRECISION)
    y = mixed(y, norm, True, q[0].dtype, PARTS)
    return y, maximum, total, spread_total, partner_maximum, partner_total, partner_spread
