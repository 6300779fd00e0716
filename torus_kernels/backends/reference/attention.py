"""Torus attention by its definition: every stream is a dense softmax over a [T, T] mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import parameter_dtype
from ...lattice import NUM_STREAMS, Stream, TorusLattice


class _StreamAttention(NamedTuple):
    stream: Stream
    probs: Tensor  # [B, H, T, T], rows sum to one
    logits: Tensor  # [B, H, T, T], -inf where not visible
    rho_squared: Tensor  # [T, T]


def _per_token(gate: Tensor) -> Tensor:
    """A gate per head ``[H]`` or per token ``[B, H, T]``, made to broadcast against ``[B, H, T]``."""
    return gate[None, :, None] if gate.dim() == 1 else gate


def _stream_weight(weights: Tensor, stream: Stream) -> Tensor:
    return _per_token(weights[..., stream.index])[..., None]  # [B or 1, H, T or 1, 1]


def _group_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, Hkv, T, D] -> [B, H, T, D]``: head h reads key/value head ``h // (H / Hkv)``."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _ungroup_heads(x: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, T, D] -> [B, Hkv, T, D]``: sums over the heads of a group."""
    return x.unflatten(1, (kv_heads, -1)).sum(dim=2)


def _attend(
    q: Tensor, k: Tensor, decay: Tensor, first_key: Tensor | None, lattice: TorusLattice, scale: float
) -> Iterator[_StreamAttention]:
    """One stream at a time: ``softmax(scale * q.k - 0.5 * decay * rho^2)`` over the visible keys."""
    seq_len = q.shape[2]
    scores = scale * (q @ k.mT)  # [B, H, T, T]
    for stream in sorted(lattice.streams):
        visible, rho_squared = lattice.stream_geometry(stream, seq_len, q.device)
        if first_key is not None:
            t = torch.arange(seq_len, device=q.device)
            oldest = torch.minimum(first_key.to(torch.int64), t)  # [B, T]
            visible = (visible & (t >= oldest[..., None]))[:, None]  # [B, 1, T, T]
        rho_squared = rho_squared.to(q.dtype)
        logits = scores - 0.5 * decay[:, stream.index, None, None] * rho_squared
        logits = logits.masked_fill(~visible, float("-inf"))
        yield _StreamAttention(stream, logits.softmax(dim=-1), logits, rho_squared)


def _upcast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = parameter_dtype(q.dtype)
    heads = q.shape[1]
    return q.to(acc), _group_heads(k.to(acc), heads), _group_heads(v.to(acc), heads)


def _entropy(attention: _StreamAttention, lse: Tensor) -> Tensor:
    """``-sum p log p = lse - sum p * logit`` in nats; keys that are not visible add nothing."""
    weighted = (attention.probs * attention.logits).masked_fill(attention.logits == float("-inf"), 0.0)
    return (lse - weighted.sum(dim=-1)).clamp(min=0.0)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stream_weights: Tensor,
    decay: Tensor,
    ema_state: Tensor | None,
    ema_alpha: Tensor | None,
    first_key: Tensor | None,
    lattice: TorusLattice,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    entropy: Tensor | None,
) -> None:
    """Writes ``out`` ``[B, H, T, D]`` and, where given, ``lse`` and ``entropy`` ``[B, H, T, 8]``."""
    with torch.autocast(q.device.type, enabled=False):
        qf, kf, vf = _upcast(q, k, v)
        y = torch.zeros_like(qf)
        if lse is not None:
            lse.fill_(float("-inf"))
        if entropy is not None:
            entropy.zero_()
        for attention in _attend(qf, kf, decay, first_key, lattice, scale):
            y = y + _stream_weight(stream_weights, attention.stream) * (attention.probs @ vf)
            stream_lse = attention.logits.logsumexp(dim=-1)
            if lse is not None:
                lse[..., attention.stream.index] = stream_lse
            if entropy is not None:
                entropy[..., attention.stream.index] = _entropy(attention, stream_lse)
        if ema_state is not None and ema_alpha is not None:
            state = ema_state.to(y.dtype)
            y = state + _per_token(ema_alpha)[..., None] * (y - state)
        out.copy_(y)


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    stream_weights: Tensor,
    decay: Tensor,
    ema_state: Tensor | None,
    ema_alpha: Tensor | None,
    first_key: Tensor | None,
    lattice: TorusLattice,
    scale: float,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_weights: Tensor,
    d_decay: Tensor,
    d_state: Tensor | None,
    d_alpha: Tensor | None,
) -> None:
    """Writes all gradients, by the formulas of the operator's definition; recomputes the softmax, ignores ``lse``."""
    with torch.autocast(q.device.type, enabled=False):
        kv_heads = k.shape[1]
        qf, kf, vf = _upcast(q, k, v)
        d_out = d_out.to(qf.dtype)
        alpha = None if ema_alpha is None else _per_token(ema_alpha)[..., None]  # [B or 1, H, T or 1, 1]
        dy = d_out if alpha is None else alpha * d_out  # [B, H, T, D]
        d_probs = dy @ vf.mT  # [B, H, T, T]
        d_scores = torch.zeros_like(d_probs)
        d_values = torch.zeros_like(vf)
        token_d_weights = qf.new_zeros(*qf.shape[:3], NUM_STREAMS)
        d_decay.zero_()
        y_dot_d_out = qf.new_zeros(qf.shape[:3])
        for attention in _attend(qf, kf, decay, first_key, lattice, scale):
            index = attention.stream.index
            weight = _stream_weight(stream_weights, attention.stream)
            out_s = attention.probs @ vf  # O_s [B, H, T, D]
            delta = (dy * out_s).sum(dim=-1)  # [B, H, T]
            d_logits = weight * attention.probs * (d_probs - delta[..., None])  # dS_s
            d_scores += d_logits
            d_values += (weight * attention.probs).mT @ dy
            token_d_weights[..., index] = delta
            d_decay[:, index] = (-0.5 * attention.rho_squared * d_logits).sum(dim=(0, 2, 3))
            y_dot_d_out += weight[..., 0] * (d_out * out_s).sum(dim=-1)
        d_q.copy_(scale * (d_scores @ kf))
        d_k.copy_(_ungroup_heads(scale * (d_scores.mT @ qf), kv_heads))
        d_v.copy_(_ungroup_heads(d_values, kv_heads))
        d_weights.copy_(token_d_weights.sum(dim=(0, 2)) if stream_weights.dim() == 2 else token_d_weights)
        if (
            ema_state is not None and ema_alpha is not None and d_state is not None and d_alpha is not None
            and alpha is not None  # all or none
        ):
            token_d_alpha = y_dot_d_out - (d_out * ema_state.to(d_out.dtype)).sum(dim=-1)
            d_alpha.copy_(token_d_alpha.sum(dim=(0, 2)) if ema_alpha.dim() == 1 else token_d_alpha)
            d_state.copy_((1 - alpha) * d_out)
