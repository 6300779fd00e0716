"""Rotary positions along a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

ROTARY_BASE = 10000.0


def sequence_rope(*tensors: Tensor, offset: int = 0) -> tuple[Tensor, ...]:
    """Rotary positions of a sequence (Su et al. 2021, section 3.2.2): at position t the pair of channels
    ``(i, i + D/2)`` turns by ``t * ROTARY_BASE**(-2i/D)``.

    Args:
        tensors: queries, keys: each ``[..., T, D]``, D even, of one dtype.
        offset: position of the first token.

    Returns:
        The tensors, turned.
    """
    steps, channels = tensors[0].shape[-2:]
    device, dtype = tensors[0].device, tensors[0].dtype
    # In float64: at position 10**9 an angle is still right to 1e-7.
    rate = ROTARY_BASE ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)  # [D / 2]
    angle = torch.arange(offset, offset + steps, device=device)[:, None] * rate  # [T, D / 2]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    turned = []
    for x in tensors:
        first, second = x.chunk(2, dim=-1)
        turned.append(torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1))
    return tuple(turned)
