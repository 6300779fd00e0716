"""Decoding: the newest token against the ring of cached keys, a pass over parts of the keys and one that joins them.

A family of streams (the arcs of a loop, a spiral, the cross flows) is cut into parts, so that even one sequence
keeps a GPU busy. Every part leaves its streams' maximum, normaliser and weighted values; they are joined in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...lattice import TorusLattice
from .launching import on_device, rows
from .primitives.lattice import (
    CAUSAL,
    CLOCKWISE,
    COUNTER_CLOCKWISE,
    MINOR,
    NUM_FAMILIES,
    NUM_STREAMS,
    OPEN_PAST,
    arcs,
    cross_window,
    line_families,
    line_family,
    squared_step,
)
from .primitives.softmax import LOG2E, anchor, bias_slope, masked
from .primitives.tiles import block_d, load_rows

_CROSS = tl.constexpr(NUM_FAMILIES)
"""The cross flows, numbered behind the families of lines."""

_TILE = 8192
"""Elements of a block of keys."""

_KEYS_PER_PART = 128
_MAX_PARTS = 8
_WARPS = 8


@triton.jit
def _streams_of(family):
    """The first stream of a family, and whether it has a second."""
    first = tl.where(family <= CLOCKWISE, 2 * family, family + 2)
    return first, (family <= MINOR) | (family == _CROSS)


@triton.jit
def _line_keys(step, family, loop, stride, max_step, slope_0, slope_1):
    """Lags of the keys ``step`` steps back, and for both streams what is visible and the bias in base 2."""
    steps = step.to(tl.float32)
    forward, backward, squared = arcs(steps, loop, max_step, OPEN_PAST)
    in_reach = step <= max_step
    is_spiral = (family == CLOCKWISE) | (family == COUNTER_CLOCKWISE)
    unit = squared_step(loop, OPEN_PAST) * squared
    first = tl.where(is_spiral, in_reach, forward)
    return step.to(tl.int64) * stride, first, backward, slope_0 * unit, slope_1 * unit


@triton.jit
def _cross_keys(place, b_lo, width, n_minor, max_lag, radii, inverse_squares, slope_0, slope_1):
    """The same for places in the window of displacements ``(a, b)``, row by row."""
    a = place // width
    b = place % width + b_lo
    lag = a.to(tl.int64) * n_minor + b
    in_reach = (lag >= 0) & (lag <= max_lag)
    visible_0 = in_reach & (a <= radii[0]) & (tl.abs(b) <= radii[1])
    visible_1 = in_reach & (a <= radii[2]) & (tl.abs(b) <= radii[3])
    a_squared = a.to(tl.float32) * a.to(tl.float32)
    b_squared = b.to(tl.float32) * b.to(tl.float32)
    bias_0 = slope_0 * (a_squared * inverse_squares[0] + b_squared * inverse_squares[1])
    bias_1 = slope_1 * (a_squared * inverse_squares[2] + b_squared * inverse_squares[3])
    return lag, visible_0, visible_1, bias_0, bias_1


@triton.jit
def _accumulate(maximum, total, weighted, scores, visible, bias, values):
    """One stream's running softmax, with the keys of a block added."""
    scores = masked(scores - bias, visible)
    after = tl.maximum(maximum, tl.max(scores, axis=0))
    exponentials = tl.exp2(scores - anchor(after))
    kept = tl.exp2(maximum - anchor(after))
    weighted = weighted * kept + tl.sum(exponentials[:, None] * values, axis=0)
    return after, total * kept + tl.sum(exponentials, axis=0), weighted


@triton.jit
def _store_part(sums, values, place, maximum, total, weighted, D: tl.constexpr, BLOCK_D: tl.constexpr):
    tl.store(sums + 2 * place, maximum)
    tl.store(sums + 2 * place + 1, total)
    channel = tl.arange(0, BLOCK_D)
    tl.store(values + place * D + channel, weighted, mask=channel < D)


_UNSPECIALISED = ["n_major", "n_minor", "winding", "sites", "written", "newest", "newest_slot", "a_count", "width"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def decode_kernel(
    q, q_strides, keys, keys_strides, values, values_strides, decay, first_key, sums, weighted_values,
    families, stream_mask, heads, group, scale, n_major, n_minor, winding, sites, written, newest, newest_slot,
    a_count, width, b_lo, radii, inverse_squares,
    HAS_FIRST_KEY: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: a part of one family's keys for one query.

    ``families`` lists the families present, four bits each; ``sums`` ``[B * H, 8, PARTS, 2]`` takes maxima and
    normalisers, ``weighted_values`` ``[B * H, 8, PARTS, D]`` the sums of values; ``written`` is the number of slots
    that hold a token, ``newest`` the position of the query and ``newest_slot`` where its key is.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    family = ((families >> (4 * (tl.program_id(1) // PARTS))) & 15).to(tl.int32)
    part = tl.program_id(1) % PARTS
    first, has_second = _streams_of(family)
    slope_0 = bias_slope(tl.load(decay + head * NUM_STREAMS + first), 1.0)
    slope_1 = bias_slope(tl.load(decay + head * NUM_STREAMS + first + has_second.to(tl.int32)), 1.0)

    max_lag = written.to(tl.int64) - 1
    if HAS_FIRST_KEY:
        oldest = tl.maximum(tl.minimum(tl.load(first_key + batch).to(tl.int64), newest), 0)
        max_lag = tl.minimum(max_lag, newest - oldest)
    loop, stride, _, _, _, max_step = line_family(family, n_major, n_minor, winding, written, CAUSAL)
    max_step = tl.minimum(max_step, max_lag // stride).to(tl.int32)
    count = tl.where(family == _CROSS, a_count * width, max_step + 1)
    count_0 = tl.where(((stream_mask >> first) & 1) != 0, count, 0)
    count_1 = tl.where(has_second & (((stream_mask >> (first + 1)) & 1) != 0), count, 0)

    q_row = q + batch * q_strides[0] + head * q_strides[1]
    channel = tl.arange(0, BLOCK_D)
    query = tl.load(q_row + channel, mask=channel < D, other=0.0).to(tl.float32) * scale
    key_ring = keys + batch * keys_strides[0] + head // group * keys_strides[1]
    value_ring = values + batch * values_strides[0] + head // group * values_strides[1]
    maximum_0 = tl.full([], float("-inf"), tl.float32)
    maximum_1 = tl.full([], float("-inf"), tl.float32)
    total_0 = tl.zeros([], tl.float32)
    total_1 = tl.zeros([], tl.float32)
    weighted_0 = tl.zeros([BLOCK_D], tl.float32)
    weighted_1 = tl.zeros([BLOCK_D], tl.float32)
    share = tl.cdiv(tl.cdiv(count, PARTS), BLOCK_N) * BLOCK_N
    for start in range(part * share, tl.minimum(count, (part + 1) * share), BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        if family == _CROSS:
            lag, visible_0, visible_1, bias_0, bias_1 = _cross_keys(
                place, b_lo, width, n_minor, max_lag, radii, inverse_squares, slope_0, slope_1)
        else:
            lag, visible_0, visible_1, bias_0, bias_1 = _line_keys(
                place, family, loop, stride, max_step, slope_0, slope_1)
        visible_0 = visible_0 & (place < count_0)
        visible_1 = visible_1 & (place < count_1)
        slot = newest_slot - lag
        slot = tl.where(slot < 0, slot + sites, slot)
        seen = visible_0 | visible_1
        key = load_rows(key_ring, slot, seen, keys_strides[2], D, BLOCK_D).to(tl.float32)
        value = load_rows(value_ring, slot, seen, values_strides[2], D, BLOCK_D).to(tl.float32)
        scores = tl.sum(key * query[None, :], axis=1)
        maximum_0, total_0, weighted_0 = _accumulate(
            maximum_0, total_0, weighted_0, scores, visible_0, bias_0, value)
        maximum_1, total_1, weighted_1 = _accumulate(
            maximum_1, total_1, weighted_1, scores, visible_1, bias_1, value)
    place = (row * NUM_STREAMS + first) * PARTS + part
    _store_part(sums, weighted_values, place, maximum_0, total_0, weighted_0, D, BLOCK_D)
    if has_second:
        _store_part(sums, weighted_values, place + PARTS, maximum_1, total_1, weighted_1, D, BLOCK_D)


@triton.jit
def join_kernel(
    sums, weighted_values, weights, weights_strides, state, state_strides, alpha, alpha_strides, out, out_strides,
    stream_mask, heads, HAS_STATE: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One program: the parts of all streams of one query, their mixing and compounding."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    channel = tl.arange(0, BLOCK_D)
    there = channel < D
    parts = tl.arange(0, PARTS)
    y = tl.zeros([BLOCK_D], tl.float32)
    for stream in range(NUM_STREAMS):
        if ((stream_mask >> stream) & 1) != 0:
            place = (row * NUM_STREAMS + stream) * PARTS + parts
            maximum = tl.load(sums + 2 * place)
            total = tl.load(sums + 2 * place + 1)
            values = tl.load(weighted_values + place[:, None] * D + channel[None, :], mask=there[None, :], other=0.0)
            share = tl.exp2(maximum - anchor(tl.max(maximum, axis=0)))
            weight = tl.load(weights + batch * weights_strides[0] + head * weights_strides[1] + stream)
            y += weight * (tl.sum(values * share[:, None], axis=0) / tl.sum(total * share, axis=0))
    if HAS_STATE:
        rate = tl.load(alpha + batch * alpha_strides[0] + head * alpha_strides[1])
        before = tl.load(state + batch * state_strides[0] + head * state_strides[1] + channel, mask=there, other=0.0)
        y = before.to(tl.float32) + rate * (y - before.to(tl.float32))
    target = out + batch * out_strides[0] + head * out_strides[1] + channel
    tl.store(target, y.to(out.dtype.element_ty), mask=there)


def _gate_strides(gate: Tensor, per_head: int) -> tuple[int, int]:
    """Strides over batch and heads of a contiguous gate, of ``per_head`` dimensions where it is the same for every
    batch element."""
    return (0, gate.stride(0)) if gate.dim() == per_head else gate.stride()[:2]


def attention_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    stream_weights: Tensor,
    decay: Tensor,
    ema_state: Tensor | None,
    ema_alpha: Tensor | None,
    first_key: Tensor | None,
    lattice: TorusLattice,
    scale: float,
    length: int,
    out: Tensor,
) -> None:
    """Writes ``out`` ``[B, H, 1, D]``, the newest of ``length`` tokens against rings ``[B, Hkv, N, D]``."""
    batch, heads, _, head_dim = q.shape
    q, keys, values = rows(q), rows(keys), rows(values)
    stream_weights = stream_weights.contiguous()
    sites, stream_mask = lattice.num_sites, lattice.spec[-1]
    lines, window = line_families(lattice, sites), cross_window(lattice, sites)
    families = [line.family for line in lines]
    counts = [line.max_step + 1 for line in lines]
    a_count = width = b_lo = 0
    radii, inverse_squares = (0, 0, 0, 0), (0.0, 0.0, 0.0, 0.0)
    if window is not None:
        a_count, width, b_lo = window.a_hi + 1, window.b_hi - window.b_lo + 1, window.b_lo
        radii, inverse_squares = window.radii, window.inverse_squares
        families.append(NUM_FAMILIES)
        counts.append(a_count * width)
    parts = min(triton.next_power_of_2(triton.cdiv(max(counts), _KEYS_PER_PART)), _MAX_PARTS)
    padded = block_d(head_dim)
    num_rows = batch * heads
    sums = q.new_empty((num_rows, NUM_STREAMS.value, parts, 2), dtype=torch.float32)
    weighted_values = q.new_empty((num_rows, NUM_STREAMS.value, parts, head_dim), dtype=torch.float32)
    options = {"PARTS": parts, "D": head_dim, "BLOCK_D": padded, "num_warps": _WARPS, "enable_fp_fusion": True}
    has_state = ema_state is not None
    state = rows(ema_state) if has_state else q
    alpha = ema_alpha.contiguous() if has_state else decay
    with on_device(q):
        decode_kernel[(num_rows, len(families) * parts)](
            q, q.stride()[:2], keys, keys.stride()[:3], values, values.stride()[:3], decay.contiguous(),
            q if first_key is None else first_key.contiguous(), sums, weighted_values,
            sum(family << 4 * place for place, family in enumerate(families)), stream_mask, heads,
            heads // keys.shape[1], scale * LOG2E.value, lattice.n_major, lattice.n_minor, lattice.winding, sites,
            min(length, sites), length - 1, (length - 1) % sites, a_count, width, b_lo, radii, inverse_squares,
            HAS_FIRST_KEY=first_key is not None, BLOCK_N=min(_KEYS_PER_PART, _TILE // padded), **options,
        )
        join_kernel[(num_rows,)](
            sums, weighted_values, stream_weights, _gate_strides(stream_weights, 2), state, state.stride()[:2],
            alpha, _gate_strides(alpha, 1), out, out.stride()[:2], stream_mask, heads, HAS_STATE=has_state, **options,
        )
