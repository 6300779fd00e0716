"""The operator as a PyTorch user would write it: the yardstick of precision, and the truth when run in float64.

Written from the operator's definition and sharing nothing with the library. Visibility is enumerated, displacement
by displacement, where the library tests pairs; attention is one masked SDPA call per stream, differentiated by
autograd.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_STREAMS = 8
DEFAULT_DECAY = (0, 0, 0, 0, 1, 1, 4, 4)


def _arc(stream: int, length: int) -> Iterator[int]:
    """Steps of a line stream, 0 <= k < L: the near half of the loop, the far half, or all of it."""
    for k in range(length):
        near, far = k <= length // 2, k == 0 or length - k <= length // 2
        if stream >= 4 or (near if stream % 2 == 0 else far):
            yield k


def _around(x: int, n: int) -> int:
    return min(x % n, n - x % n)


def _cross_rho_squared(abs_a: int, abs_b: int, radius_u: int, radius_v: int) -> float | None:
    if abs_a > radius_u or abs_b > radius_v:
        return None
    term_u = (abs_a / radius_u) ** 2 if radius_u else 0.0
    return term_u + ((abs_b / radius_v) ** 2 if radius_v else 0.0)


def _radii(lattice, stream: int) -> tuple[int, int]:
    narrow, broad = lattice.cross_radius
    return (narrow, broad) if stream == 6 else (broad, narrow)


def displacements(lattice, stream: int) -> dict[tuple[int, int], float]:
    """Visible ``(a, b)`` of a grid topology with their rho^2; on a cylinder a is signed, else both are reduced."""
    major, minor, cylinder = lattice.n_major, lattice.n_minor, lattice.topology == "cylinder"
    rows = range(1 - major, major) if cylinder else range(major)
    if stream >= 6:
        radii = _radii(lattice, stream)
        windows = {
            (a, b): _cross_rho_squared(abs(a) if cylinder else _around(a, major), _around(b, minor), *radii)
            for a in rows for b in range(minor)
        }
        return {site: rho_squared for site, rho_squared in windows.items() if rho_squared is not None}
    if stream in (2, 3):
        return {(0, k): (2 * math.pi * _around(k, minor) / minor) ** 2 for k in _arc(stream, minor)}
    slope = (0, 0, 0, 0, lattice.winding, -lattice.winding)[stream]
    if cylinder:
        arc = {0: range(major), 1: range(1 - major, 1)}.get(stream, rows)
        return {(a, slope * a % minor): (math.pi * abs(a) / major) ** 2 for a in arc}
    return {(k, slope * k % minor): (2 * math.pi * _around(k, major) / major) ** 2 for k in _arc(stream, major)}


def lags(lattice, stream: int, seq_len: int) -> dict[int, float]:
    """Visible lags of the causal topology below ``min(T, N)``, with their rho^2."""
    major, minor, winding = lattice.n_major, lattice.n_minor, lattice.winding
    window = min(seq_len, major * minor)
    if stream >= 6:
        low = (minor - 1) // 2
        found = {}
        for tau in range(window):
            b = (tau + low) % minor - low
            found[tau] = _cross_rho_squared((tau - b) // minor, abs(b), *_radii(lattice, stream))
        return {tau: rho_squared for tau, rho_squared in found.items() if rho_squared is not None}
    length = minor if stream in (2, 3) else major
    stride = (minor, minor, 1, 1, minor + winding, minor - winding)[stream]
    reach = range(min(length, -(-window // stride)))  # steps whose lag is below the window
    half = length // 2
    arc = {0: lambda k: k <= half, 1: lambda k: k == 0 or length - k <= half}
    keep = arc[stream % 2] if stream < 4 else lambda k: True
    return {k * stride: (math.pi * k / length) ** 2 for k in reach if keep(k)}


@functools.lru_cache(maxsize=64)
def geometry(lattice, stream: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """``visible`` ``[T, T]`` bool and ``rho_squared`` ``[T, T]`` float64; rows are queries, columns are keys."""
    visible = torch.zeros(seq_len, seq_len, dtype=torch.bool)
    rho_squared = torch.zeros(seq_len, seq_len, dtype=torch.float64)

    def show(query: Tensor, key: Tensor, value: float) -> None:
        visible[query, key] = True
        rho_squared[query, key] = value

    t = torch.arange(seq_len)
    if lattice.topology == "causal":
        for tau, value in lags(lattice, stream, seq_len).items():
            show(t[tau:], t[tau:] - tau, value)
    else:
        u, v = t // lattice.n_minor, t % lattice.n_minor
        for (a, b), value in displacements(lattice, stream).items():
            there = u - a
            if lattice.topology == "cylinder":
                on_board = (there >= 0) & (there < lattice.n_major)
            else:
                there, on_board = there % lattice.n_major, torch.ones_like(t, dtype=torch.bool)
            key = there * lattice.n_minor + (v - b) % lattice.n_minor
            show(t[on_board], key[on_board], value)
    return visible, rho_squared


def _biases(q: Tensor, lattice, decay: Tensor | None, first_key: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Per stream the additive bias ``[B or 1, H, T, T]`` in the parameters' dtype, -inf where not visible."""
    heads, seq_len = q.shape[1], q.shape[2]
    if decay is None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        decay = torch.tensor(DEFAULT_DECAY, dtype=wide, device=q.device).expand(heads, NUM_STREAMS)
    for stream in sorted(int(s) for s in lattice.streams):
        visible, rho_squared = (x.to(q.device) for x in geometry(lattice, stream, seq_len))
        if first_key is not None:
            t = torch.arange(seq_len, device=q.device)
            visible = (visible & (t >= torch.minimum(first_key.long(), t)[..., None]))[:, None]
        bias = -0.5 * decay[:, stream, None, None] * rho_squared.to(decay.dtype)
        yield stream, bias.masked_fill(~visible, -math.inf)


def attention(
    q, k, v, lattice, *, stream_weights=None, decay=None, scale=None, ema_state=None, ema_alpha=None, first_key=None
) -> Tensor:
    """`torus_attention` in q's dtype throughout."""
    y = torch.zeros_like(q)
    for stream, bias in _biases(q, lattice, decay, first_key):
        out_s = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype).expand(q.shape[0], -1, -1, -1), scale=scale, enable_gqa=True
        )
        if stream_weights is None:
            weight = 1 / NUM_STREAMS
        else:
            column = stream_weights[..., stream].to(q.dtype)
            weight = (column[None, :, None] if column.dim() == 1 else column)[..., None]
        y = y + weight * out_s
    if ema_state is None:
        return y
    alpha = ema_alpha.to(q.dtype)
    alpha = (alpha[None, :, None] if alpha.dim() == 1 else alpha)[..., None]
    return ema_state + alpha * (y - ema_state)


def statistics(q, k, lattice, *, decay=None, scale=None, first_key=None) -> tuple[Tensor, Tensor]:
    """``lse`` and ``entropy``, ``[B, H, T, 8]``, of the float64 softmaxes; -inf and 0 for streams left out."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    decay = None if decay is None else decay.double()
    lse = torch.full((*q.shape[:3], NUM_STREAMS), -math.inf, dtype=torch.float64, device=q.device)
    entropy = torch.zeros_like(lse)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for stream, bias in _biases(q, lattice, decay, first_key):
        scores = scale * (q @ k.mT) + bias
        lse[..., stream] = scores.logsumexp(dim=-1)
        entropy[..., stream] = torch.special.entr(scores.softmax(dim=-1)).sum(dim=-1)
    return lse, entropy
