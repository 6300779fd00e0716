"""Additive sinusoidal positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LONGEST_PERIOD = 10000.0
"""Base of the geometric progression of wavelengths, from 2 pi to ``2 pi * LONGEST_PERIOD`` (Vaswani et al. 2017)."""


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sinusoidal encoding of positions (Vaswani et al. 2017, section 3.5)::

        PE(pos, 2i)     = sin(pos / 10000**(2i / width))
        PE(pos, 2i + 1) = cos(pos / 10000**(2i / width))

    Args:
        positions: integers of any shape ``[...]``; any size, the angles are float64.
        width: channels, an even number.

    Returns:
        ``[..., width]`` float64.
    """
    even = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64)
    angles = positions[..., None].double() * LONGEST_PERIOD ** (-even / width)  # [..., width / 2]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class SinusoidalPositions(nn.Module):
    """Adds `sinusoids` times a learned gain to the embedding of tokens.

    The position of token t is ``offset + t - first_key[t]``: it counts from the first token that this one may see, so
    that documents in one sequence, and texts padded on the left, are each encoded as they would be alone.

    Args:
        width: size of the embedding, an even number.
        gain: where the gain starts. With the standard deviation of the embedding, positions and tokens have the ratio
            that they have in Vaswani et al. 2017, whose embeddings are scaled to variance 1 (section 3.4).
    """

    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.width = width
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor, *, offset: int = 0, first_key: Tensor | None = None) -> Tensor:
        """``x + gain * PE(positions)``, ``[B, T, width]`` in the dtype of x.

        Args:
            x: embedded tokens ``[B, T, width]``.
            offset: position of the first token.
            first_key: ``[B, T]``, as in `TorusLM`.
        """
        positions = offset + torch.arange(x.shape[1], device=x.device)
        if first_key is not None:
            positions = (positions - first_key).clamp(min=0)  # [B, T]; padding before the first key is not looked at
        return x + self.gain * sinusoids(positions, self.width).to(x.dtype)
