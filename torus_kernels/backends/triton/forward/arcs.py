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
from ..primitives.softmax import anchor, mixing, spread
from ..primitives.tiles import dot_cast, dot_transposed, load_rows


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
def _exchange(offset, column):
    """``(near, ends)``: where the forward key is in the query's own half, and where the arcs' steps are 0 and H."""
    wide = column.to(tl.float32)
    return offset[:, None] >= wide[None, :], offset[:, None] == wide[None, :]


@triton.jit
def forward_bias(offset, column, loop, decline):
    """Bias ``[BLOCK_M, columns]`` of the forward arc, -inf where there is no key."""
    half = (loop // 2).to(tl.float32)
    step = folded_steps(offset, column, half)
    return tl.where((column < half)[None, :], -decline * (step * step), float("-inf"))


@triton.jit
def backward_bias(offset, column, loop, decline):
    """The same of the backward arc."""
    half = (loop // 2).to(tl.float32)
    behind = half - folded_steps(offset, column, half)
    return tl.where((column < half)[None, :], -decline * (behind * behind), float("-inf"))


@triton.jit
def _product_with_keys(q, k_base, token, valid, stride_kt, D: tl.constexpr, BLOCK_D: tl.constexpr,
                       PRECISION: tl.constexpr):
    return dot_transposed(q, load_rows(k_base, token, valid, stride_kt, D, BLOCK_D), PRECISION)


@triton.jit
def whole_arcs(
    q, k_base, v_base, stride_kt, stride_vt, offset, offset_again, bias, partner_bias, decline, gate, partner_gate,
    block_position, column, stride, length, remaining, loop, scale,
    TOPOLOGY: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both arcs of a line whose half fits one block: their partial sum, then both softmaxes:
    ``(y, maximum, total, spread, partner's maximum, total, spread)``."""
    half = loop // 2
    near, ends = _exchange(offset, column)
    token0, valid0 = _half_tokens(block_position, column, 0, stride, length, remaining, TOPOLOGY, EVEN)
    token1, valid1 = _half_tokens(block_position, column, half, stride, length, remaining, TOPOLOGY, EVEN)
    scores0 = _product_with_keys(q, k_base, token0, valid0, stride_kt, D, BLOCK_D, PRECISION)
    scores1 = _product_with_keys(q, k_base, token1, valid1, stride_kt, D, BLOCK_D, PRECISION)
    scores = tl.where(near, scores0, scores1)
    partner_scores = tl.where(near, scores1, scores0)
    # The forward arc's last step, H, is the backward arc's first, and the other way round.
    wide_half = half.to(tl.float32)
    last = tl.sum(tl.where(ends, partner_scores, 0.0), axis=1) * scale - decline * (wide_half * wide_half)
    partner_last = tl.sum(tl.where(ends, scores, 0.0), axis=1) * scale
    exponents = scores * scale + bias
    maximum = anchor(tl.maximum(tl.max(exponents, axis=1), last))
    exponents -= maximum[:, None]
    p = tl.exp2(exponents)
    p_last = tl.exp2(last - maximum)
    total = tl.sum(p, axis=1) + p_last
    partner_exponents = partner_scores * scale + partner_bias
    partner_maximum = anchor(tl.maximum(tl.max(partner_exponents, axis=1), partner_last))
    partner_exponents -= partner_maximum[:, None]
    partner_p = tl.exp2(partner_exponents)
    partner_p_last = tl.exp2(partner_last - partner_maximum)
    partner_total = tl.sum(partner_p, axis=1) + partner_p_last
    spread_total, partner_spread = total, partner_total
    if WITH_ENTROPY:
        spread_total = spread(p, exponents) + tl.where(p_last > 0, p_last * (last - maximum), 0.0)
        partner_spread = spread(partner_p, partner_exponents) + tl.where(
            partner_p_last > 0, partner_p_last * (partner_last - partner_maximum), 0.0
        )
    near, ends = _exchange(offset_again, column)
    factor, partner_factor, norm = mixing(gate, total, partner_gate, partner_total, True)
    forward = p * factor[:, None] + tl.where(ends, (partner_p_last * partner_factor)[:, None], 0.0)
    backward = partner_p * partner_factor[:, None] + tl.where(ends, (p_last * factor)[:, None], 0.0)
    v = load_rows(v_base, token0, valid0, stride_vt, D, BLOCK_D)
    y = dot_cast(tl.where(near, forward, backward), v, PRECISION)
    v = load_rows(v_base, token1, valid1, stride_vt, D, BLOCK_D)
    y = dot_cast(tl.where(near, backward, forward), v, PRECISION, y)
    return y * norm[:, None], maximum, total, spread_total, partner_maximum, partner_total, partner_spread
