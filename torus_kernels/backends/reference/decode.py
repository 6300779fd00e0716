"""Decoding by its definition: every stream is a masked softmax over the written slots of the ring."""

from __future__ import annotations

import torch
from torch import Tensor

from ...lattice import TorusLattice
from .attention import _per_token, _stream_weight, _upcast


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
    with torch.autocast(q.device.type, enabled=False):
        slots = min(length, lattice.num_sites)  # those written
        newest = length - 1
        lag = (newest - torch.arange(slots, device=q.device)) % lattice.num_sites  # position p is in slot p mod N
        hidden = torch.zeros_like(lag, dtype=torch.bool)
        if first_key is not None:
            oldest = first_key.to(torch.int64).clamp(max=newest)  # [B, 1]
            hidden = (newest - lag < oldest)[:, None, None]  # [B, 1, 1, slots]
        qf, kf, vf = _upcast(q, keys[:, :, :slots], values[:, :, :slots])
        scores = scale * (qf @ kf.mT)  # [B, H, 1, slots]
        y = torch.zeros_like(qf)
        for stream in sorted(lattice.streams):
            visible, rho_squared = lattice.lag_geometry(stream, lag)
            logits = scores - 0.5 * decay[:, stream.index, None, None] * rho_squared.to(qf.dtype)
            probs = logits.masked_fill(hidden | ~visible, float("-inf")).softmax(dim=-1)
            y = y + _stream_weight(stream_weights, stream) * (probs @ vf)
        if ema_state is not None and ema_alpha is not None:
            state = ema_state.to(y.dtype)
            y = state + _per_token(ema_alpha)[..., None] * (y - state)
        out.copy_(y)
