"""The softmax in base 2: scores arrive multiplied by log2(e), so that exponentials are single instructions.

Every stream has its own maximum and its own normaliser: under a shared maximum a stream whose scores lie far below
the other's would vanish without a sign.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .parts import scaled_parts

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def finite(x):
    """The number itself, or for an infinite one the furthest that is not; NaN stays NaN."""
    return tl.clamp(x, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bias_slope(decay, squared_unit):
    """What a squared distance, in squared units, is multiplied by and subtracted from a score in base 2: finite, so
    that a distance of zero gives zero whatever the decay."""
    return finite(decay * (0.5 * LOG2E) * squared_unit)


@triton.jit
def masked(scores, visible):
    """Scores where visible, -inf elsewhere."""
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def anchor(maximum):
    """A row's maximum as exponents are taken from it: 0 in a row that sees nothing (yet), which then sums to 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def spread(exponentials, exponents):
    """``sum e * (x - max)`` of each row in base 2, the part of the entropy that keys add; masked keys add nothing."""
    return tl.sum(tl.where(exponentials > 0, exponentials * exponents, 0.0), axis=1)


@triton.jit
def accumulate(scores, offsets, maximum, total, spread_total, BLOCKS: tl.constexpr, WITH_SPREAD: tl.constexpr):
    """A step of a softmax that goes on over blocks, from ``(-inf, 0, 0)``: BLOCKS of one size at once, in tuples.

    A block's offset is added to its scores: a number or one for each row ``[BLOCK_M]``. Returns the blocks'
    exponentials, what sums of earlier ones are to be multiplied by, and the three, updated.
    """
    new_maximum = maximum
    maxima = ()
    for block in tl.static_range(BLOCKS):
        maxima += (tl.max(scores[block], axis=1),)
        new_maximum = tl.maximum(new_maximum, maxima[block] + offsets[block])
    anchored = anchor(new_maximum)
    kept = tl.exp2(maximum - anchored)
    exponentials = ()
    if WITH_SPREAD:
        spread_total = kept * (spread_total + total * (anchor(maximum) - anchored))
    for block in tl.static_range(BLOCKS):
        # At most zero, which a sum rounded twice may not be where biases are very large.
        shift = tl.minimum(offsets[block] - anchored, -maxima[block])
        exponents = scores[block] + shift[:, None]
        exponentials += (tl.exp2(exponents),)
        if WITH_SPREAD:
            spread_total += spread(exponentials[block], exponents)
    added = exponentials[0]
    for block in tl.static_range(1, BLOCKS):
        added += exponentials[block]
    total = kept * total + tl.sum(added, axis=1)
    return exponentials, kept, new_maximum, total, spread_total


@triton.jit
def over(gate, total, dtype: tl.constexpr):
    """``gate / total`` for a total of at least 1, to what tokens of that dtype need: a square of an inverse root takes
    three instructions for the nine of a division, and is right to 22 bits."""
    if dtype == tl.float32:
        return gate / total
    else:
        root = tl.rsqrt(total)
        return gate * (root * root)


@triton.jit
def mixing(gate, total, partner_gate, partner_total, PAIR: tl.constexpr, dtype: tl.constexpr):
    """Factors of two streams' exponentials, and what `mixed` multiplies their common product with V by.

    A stream without a partner leaves everything to the last. Numbers of float16 do not reach far enough down for what
    small gates multiply: there the larger gate of a row is left too.
    """
    if not PAIR:
        factor = over(gate, total, dtype)
        return factor, factor, factor
    if dtype == tl.float16:
        norm = tl.maximum(tl.abs(gate), tl.abs(partner_gate))
        norm = tl.where(norm == 0, 1.0, norm)
        return over(gate / norm, total, dtype), over(partner_gate / norm, partner_total, dtype), norm
    return over(gate, total, dtype), over(partner_gate, partner_total, dtype), gate  # which `mixed` does not look at


@triton.jit
def mixed(y, norm, PAIR: tl.constexpr, dtype: tl.constexpr, PARTS: tl.constexpr):
    """The partial sum: the product with V, in parts, of exponentials times factors by `mixing`."""
    if PAIR and dtype != tl.float16:
        return y
    return scaled_parts(y, norm[:, None], PARTS)


@triton.jit
def log_sum_exp(maximum, total):
    """Log-sum-exp in nats from an anchored maximum and a normaliser, both in base 2."""
    return (maximum + tl.log2(total)) * LN2


@triton.jit
def entropy(total, spread_total):
    """Entropy in nats, at least 0; NaN stays NaN."""
    nats = (tl.log2(total) - spread_total / total) * LN2
    return tl.where(nats < 0, 0.0, nats)


@triton.jit
def write_statistics(
    maximum, total, spread_total, lse_ptr, entropy_ptr, at, mask, WITH_LSE: tl.constexpr, WITH_ENTROPY: tl.constexpr
):
    """Writes a stream's log-sum-exp and entropy, each where it is asked for."""
    if WITH_LSE:
        tl.store(lse_ptr + at, log_sum_exp(maximum, total), mask=mask)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + at, entropy(total, spread_total), mask=mask)
