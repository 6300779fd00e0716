"""One token of one layer as a PyTorch user would decode it: a dense cache under SDPA, or the visible slots gathered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torus_kernels import Stream, TorusLattice


class DenseCache:
    """A cache of ``num_slots`` tokens that are all attended to: what decoding costs without structure.

    Args:
        keys: ``[B, Hkv, num_slots, D]``, as values; written in place.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values, self._slot = keys, values, 0

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends a token and attends to all slots; q is ``[B, H, 1, D]``, k and v are ``[B, Hkv, 1, D]``.

        The queries of a group are rows of one product with their keys, which spares SDPA the repetition of the keys.
        """
        self._keys[:, :, self._slot : self._slot + 1] = k
        self._values[:, :, self._slot : self._slot + 1] = v
        self._slot = (self._slot + 1) % self._keys.shape[2]
        rows = q.unflatten(1, (self._keys.shape[1], -1)).squeeze(3)  # [B, Hkv, H / Hkv, D]
        return F.scaled_dot_product_attention(rows, self._keys, self._values).reshape(q.shape)


class GatheredCache:
    """The operator by a ring buffer from which the slots that any stream sees are gathered: keys and values once, one
    row of scores, eight softmaxes of it, and one product with their weighted sum.

    Args:
        keys: ``[B, Hkv, N, D]``, as values, by slot; written in place.
        length: tokens appended so far.
        decay: ``[H, 8]``.
    """

    def __init__(self, lattice: TorusLattice, keys: Tensor, values: Tensor, length: int, decay: Tensor) -> None:
        self._keys, self._values, self._length, self._num_slots = keys, values, length, lattice.num_sites
        lag = torch.arange(min(length + 1, lattice.num_sites))
        geometry = [lattice.lag_geometry(stream, lag) for stream in Stream]
        visible = torch.stack([seen for seen, _ in geometry])  # [8, lags]
        seen = visible.any(dim=0)
        self._lag = lag[seen]  # [U]
        rho_squared = torch.stack([distance for _, distance in geometry])[:, seen].to(decay.dtype)
        hidden = torch.zeros_like(rho_squared).masked_fill(~visible[:, seen], float("-inf"))
        bias = hidden - 0.5 * decay[:, :, None] * rho_squared  # [H, 8, U]
        self._bias = bias.unflatten(0, (keys.shape[1], -1))  # [Hkv, H / Hkv, 8, U]

    def step(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, state: Tensor, alpha: Tensor) -> Tensor:
        """Appends a token and attends to what it sees; as `torus_kernels.torus_attention_decode`, whose shapes these
        are: q and state ``[B, H, 1, D]``, k and v ``[B, Hkv, 1, D]``, weights ``[H, 8]``, alpha ``[H]``."""
        slot = self._length % self._num_slots
        self._keys[:, :, slot : slot + 1] = k
        self._values[:, :, slot : slot + 1] = v
        slots = (self._length - self._lag) % self._num_slots
        self._length += 1
        keys, values = self._keys.index_select(2, slots), self._values.index_select(2, slots)  # [B, Hkv, U, D]
        rows = q.unflatten(1, (keys.shape[1], -1)).squeeze(3)  # [B, Hkv, H / Hkv, D]
        scores = (rows * q.shape[-1] ** -0.5) @ keys.mT  # [B, Hkv, H / Hkv, U]
        probs = (scores[..., None, :] + self._bias).softmax(dim=-1)  # [B, Hkv, H / Hkv, 8, U]
        mixed = (weights.unflatten(0, (keys.shape[1], -1))[..., None, :] @ probs).squeeze(-2)
        y = (mixed.to(values.dtype) @ values).reshape(q.shape).to(alpha.dtype)
        return torch.lerp(state.to(alpha.dtype), y, alpha[:, None, None]).to(q.dtype)
