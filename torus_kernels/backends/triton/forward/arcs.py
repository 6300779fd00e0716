"""The two arcs of a loop of even length, folded so that either is a dense tile: one exponential for each score.

Of the keys congruent modulo half a loop a query sees one on its forward arc and one on its backward arc (see
`folded_steps`). Where the line is closed these are the two halves of the keys, in an order that depends on the query;
where it is open they are two of three neighbouring blocks. So the products of a block of queries with these blocks
of keys are exchanged element by element, each arc's softmax is one full tile, and the weights are exchanged back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives.lattice import CLOSED, folded_steps, on_line, tokens_along
from ..primitives.softmax import accumulate, accumulate_one, anchor, mixing, spread
from ..primitives.tiles import dot_cast, dot_transposed, load_rows


@triton.jit
def _block_tokens(
    block_position, column, shift, stride, length, remaining,
    TOPOLOGY: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr,
):
    """Tokens of the keys at ``block_position + column - shift`` and which of them exist."""
    position = block_position + column - shift
    if FORM == CLOSED:
        position = tl.where(position < 0, position + length, position)
        position = tl.where(position >= length, position - length, position)
    token = tokens_along(0, position, stride, 0, 1, True)
    valid = on_line(position, token, length, remaining, TOPOLOGY, EVEN)
    if FORM != CLOSED:
        valid = valid & (position >= 0)
    return token, valid


@triton.jit
def _key_tokens(
    block_position, column, half, stride, length, remaining,
    TOPOLOGY: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr,
):
    """`_block_tokens` of the three blocks of keys; of a closed line the third is the first."""
    token0, valid0 = _block_tokens(block_position, column, 0, stride, length, remaining, TOPOLOGY, FORM, EVEN)
    token1, valid1 = _block_tokens(block_position, column, half, stride, length, remaining, TOPOLOGY, FORM, EVEN)
    token2, valid2 = token0, valid0
    if FORM != CLOSED:
        token2, valid2 = _block_tokens(
            block_position, column, 2 * half, stride, length, remaining, TOPOLOGY, FORM, EVEN
        )
    return token0, valid0, token1, valid1, token2, valid2


@triton.jit
def _exchange(offset, column):
    """``(near, ends)``: where the forward key is in the query's own block, and where the arcs' steps are 0 and H."""
    wide = column.to(tl.float32)
    return offset[:, None] >= wide[None, :], offset[:, None] == wide[None, :]


@triton.jit
def arc_biases(offset, column, loop, reach, decline, partner_decline, FORM: tl.constexpr):
    """Biases ``[BLOCK_M, columns]`` of the forward and of the backward arc, -inf where there is no visible key."""
    half = (loop // 2).to(tl.float32)
    step = folded_steps(offset, column, half)
    exists = (column < half)[None, :]
    if FORM == CLOSED:
        behind = half - step
        partner_exists = exists
    else:
        behind = half + step
        within = reach.to(tl.float32)[:, None]
        partner_exists = exists & (behind <= within)
        exists = exists & (step <= within)
    forward = tl.where(exists, -decline * (step * step), float("-inf"))
    backward = tl.where(partner_exists, -partner_decline * (behind * behind), float("-inf"))
    return forward, backward


@triton.jit
def _last_bias(score, decline, half, reach, FORM: tl.constexpr):
    """The score of the forward arc's last step, H, with its bias; -inf where it is out of reach."""
    wide_half = half.to(tl.float32)
    score -= decline * (wide_half * wide_half)
    if FORM != CLOSED:
        score = tl.where(half <= reach, score, float("-inf"))
    return score


@triton.jit
def _fold(q, k_base, token0, valid0, token1, valid1, token2, valid2, stride_kt, near,
          FORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Products of the queries with the keys of the forward and of the backward arc."""
    scores0 = dot_transposed(q, load_rows(k_base, token0, valid0, stride_kt, D, BLOCK_D), PRECISION)
    scores1 = dot_transposed(q, load_rows(k_base, token1, valid1, stride_kt, D, BLOCK_D), PRECISION)
    forward = tl.where(near, scores0, scores1)
    if FORM == CLOSED:
        backward = tl.where(near, scores1, scores0)
    else:
        scores2 = dot_transposed(q, load_rows(k_base, token2, valid2, stride_kt, D, BLOCK_D), PRECISION)
        backward = tl.where(near, scores1, scores2)
    return forward, backward


@triton.jit
def _unfold(forward, backward, near, v_base, token0, valid0, token1, valid1, token2, valid2, stride_vt, y,
            FORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """``y`` plus the product of both arcs' weights with V."""
    v0 = load_rows(v_base, token0, valid0, stride_vt, D, BLOCK_D)
    v1 = load_rows(v_base, token1, valid1, stride_vt, D, BLOCK_D)
    if FORM == CLOSED:
        y = dot_cast(tl.where(near, forward, backward), v0, PRECISION, y)
        y = dot_cast(tl.where(near, backward, forward), v1, PRECISION, y)
    else:
        v2 = load_rows(v_base, token2, valid2, stride_vt, D, BLOCK_D)
        y = dot_cast(tl.where(near, forward, 0.0), v0, PRECISION, y)
        y = dot_cast(tl.where(near, backward, forward), v1, PRECISION, y)
        y = dot_cast(tl.where(near, 0.0, backward), v2, PRECISION, y)
    return y


@triton.jit
def whole_arcs(
    q, k_base, v_base, stride_kt, stride_vt, offset, offset_again, bias, partner_bias, decline, reach,
    gate, partner_gate, block_position, column, stride, length, remaining, loop, scale,
    TOPOLOGY: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """Both arcs of a line whose half fits one block: their product with V to be multiplied by ``norm``, then both
    softmaxes: ``(y, norm, maximum, total, spread, partner's maximum, total, spread)``."""
    half = loop // 2
    near, ends = _exchange(offset, column)
    token0, valid0, token1, valid1, token2, valid2 = _key_tokens(
        block_position, column, half, stride, length, remaining, TOPOLOGY, FORM, EVEN
    )
    scores, partner_scores = _fold(q, k_base, token0, valid0, token1, valid1, token2, valid2, stride_kt, near,
                                   FORM, D, BLOCK_D, PRECISION)
    last = _last_bias(tl.sum(tl.where(ends, partner_scores, 0.0), axis=1) * scale, decline, half, reach, FORM)
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
    # Either arc's last key is the other arc's first.
    forward = p * factor[:, None] + tl.where(ends, (partner_p_last * partner_factor)[:, None], 0.0)
    backward = partner_p * partner_factor[:, None] + tl.where(ends, (p_last * factor)[:, None], 0.0)
    y = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    y = _unfold(forward, backward, near, v_base, token0, valid0, token1, valid1, token2, valid2, stride_vt, y,
                FORM, D, BLOCK_D, PRECISION)
    return y, norm, maximum, total, spread_total, partner_maximum, partner_total, partner_spread


@triton.jit
def blocked_arcs(
    q, k_base, v_base, stride_kt, stride_vt, offset, decline, partner_decline, reach,
    gate, partner_gate, block_position, stride, length, remaining, loop, scale,
    TOPOLOGY: tl.constexpr, FORM: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):
    """`whole_arcs` in two passes over blocks of half a line: the normalisers, then the product with V."""
    half = loop // 2
    maximum = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    spread_total = total
    partner_maximum, partner_total, partner_spread = maximum, total, total
    last, partner_last = total, total
    for first in range(0, half, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        bias, partner_bias = arc_biases(offset, column, loop, reach, decline, partner_decline, FORM)
        near, ends = _exchange(offset, column)
        token0, valid0, token1, valid1, token2, valid2 = _key_tokens(
            block_position, column, half, stride, length, remaining, TOPOLOGY, FORM, False
        )
        scores, partner_scores = _fold(q, k_base, token0, valid0, token1, valid1, token2, valid2, stride_kt, near,
                                       FORM, D, BLOCK_D, PRECISION)
        last += tl.sum(tl.where(ends, partner_scores, 0.0), axis=1) * scale
        partner_last += tl.sum(tl.where(ends, scores, 0.0), axis=1) * scale
        _, _, maximum, total, spread_total = accumulate(
            scores * scale + bias, 0.0, maximum, total, spread_total, WITH_ENTROPY
        )
        _, _, partner_maximum, partner_total, partner_spread = accumulate(
            partner_scores * scale + partner_bias, 0.0, partner_maximum, partner_total, partner_spread, WITH_ENTROPY
        )
    last = _last_bias(last, decline, half, reach, FORM)
    maximum, total, spread_total = accumulate_one(last, maximum, total, spread_total, WITH_ENTROPY)
    partner_maximum, partner_total, partner_spread = accumulate_one(
        partner_last, partner_maximum, partner_total, partner_spread, WITH_ENTROPY
    )
    maximum, partner_maximum = anchor(maximum), anchor(partner_maximum)
    p_last, partner_p_last = tl.exp2(last - maximum), tl.exp2(partner_last - partner_maximum)
    factor, partner_factor, norm = mixing(gate, total, partner_gate, partner_total, True)
    p_last *= factor
    partner_p_last *= partner_factor
    y = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    for first in range(0, half, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        bias, partner_bias = arc_biases(offset, column, loop, reach, decline, partner_decline, FORM)
        near, ends = _exchange(offset, column)
        token0, valid0, token1, valid1, token2, valid2 = _key_tokens(
            block_position, column, half, stride, length, remaining, TOPOLOGY, FORM, False
        )
        scores, partner_scores = _fold(q, k_base, token0, valid0, token1, valid1, token2, valid2, stride_kt, near,
                                       FORM, D, BLOCK_D, PRECISION)
        p = tl.exp2(scores * scale + bias - maximum[:, None])
        partner_p = tl.exp2(partner_scores * scale + partner_bias - partner_maximum[:, None])
        forward = p * factor[:, None] + tl.where(ends, partner_p_last[:, None], 0.0)
        backward = partner_p * partner_factor[:, None] + tl.where(ends, p_last[:, None], 0.0)
        y = _unfold(forward, backward, near, v_base, token0, valid0, token1, valid1, token2, valid2, stride_vt, y,
                    FORM, D, BLOCK_D, PRECISION)
    return y, norm, maximum, total, spread_total, partner_maximum, partner_total, partner_spread
