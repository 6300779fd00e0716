"""A U-Net whose convolutions wrap."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import FieldConfig
from ..model import FieldModel

LEVELS = 3
"""How many times the grid is halved."""


class _WrappedConvolution(nn.Conv2d):
    """A 3 x 3 convolution that wraps along the second axis, and along the first unless that is ``open``."""

    def __init__(self, channels: int, out_channels: int, *, open_rows: bool) -> None:
        super().__init__(channels, out_channels, 3, padding=(1, 0) if open_rows else 0, bias=False)
        self.wrap = (1, 1, 0, 0) if open_rows else (1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.wrap, mode="circular"))


def _convolutions(channels: int, out_channels: int, dropout: float, *, open_rows: bool) -> nn.Sequential:
    """Two convolutions, each followed by a normalisation over channels and points and by a GELU."""
    layers: list[nn.Module] = []
    for n in (channels, out_channels):
        layers += [
            _WrappedConvolution(n, out_channels, open_rows=open_rows),
            nn.GroupNorm(1, out_channels),
            nn.GELU(),
        ]
    return nn.Sequential(*layers, nn.Dropout(dropout))


class UNet(nn.Module):
    """The network of `UNetField`: ``[B, input_channels, H, W] -> [B, channels, H, W]``.

    Raises:
        ValueError: a side of ``grid`` cannot be halved `LEVELS` times.
    """

    def __init__(self, config: FieldConfig) -> None:
        super().__init__()
        if any(side % 2**LEVELS for side in config.grid):
            raise ValueError(f"grid must be two multiples of {2**LEVELS} for a U-Net, got {config.grid}")
        open_rows = config.topology == "cylinder"
        coarsest = config.ff_width or 4 * config.width
        # Channels double from the finest grid to the third. Most of the time goes into the finest, where multiples of 8
        # suit vector units; the other sizes are free, so that the number of parameters can be.
        sizes = [8 * max(1, round(coarsest / 32)), max(1, round(coarsest / 2)), coarsest]

        def convolutions(channels: int, out_channels: int) -> nn.Sequential:
            return _convolutions(channels, out_channels, config.dropout, open_rows=open_rows)

        self.down = nn.ModuleList(convolutions(n, m) for n, m in pairwise([config.input_channels, *sizes]))
        self.bottom = convolutions(sizes[-1], coarsest)
        self.widen = nn.ModuleList(nn.ConvTranspose2d(n, m, 2, stride=2) for m, n in pairwise([*sizes, coarsest]))
        self.up = nn.ModuleList(convolutions(2 * n, n) for n in sizes)
        self.head = nn.Conv2d(sizes[0], config.channels, 1)
        nn.init.zeros_(self.head.weight)  # the untrained model predicts that nothing changes
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, input_channels, H, W] -> [B, channels, H, W]``."""
        passed = []
        for convolutions in self.down:
            passed.append(convolutions(x))
            x = F.max_pool2d(passed[-1], 2)
        x = self.bottom(x)
        for level in reversed(range(LEVELS)):
            x = self.up[level](torch.cat((passed[level], self.widen[level](x)), 1))
        return self.head(x)


class UNetField(FieldModel):
    """A U-Net (Ronneberger et al. 2015) with circular padding, on the points of the grid.

    It has a GroupNorm of one group after every convolution, and GELU for ReLU, as in Gupta and Brandstetter (2022).
    There are about ``width`` channels on the finest grid, twice and four times as many on the next two, and no more
    than those on the coarsest.

    Rolls by ``2**LEVELS`` points commute with it; fewer do not, as pooling counts from the edge. On the cylinder,
    where the first axis is padded with zeros, those along the second axis do.

    Args:
        config: the architecture, of which it takes ``dropout``, and as the channels of the coarsest grid
            ``ff_width``, or ``4 * width`` where that is None; its ``network`` is not looked at.

    Raises:
        ValueError: a side of ``grid`` cannot be halved `LEVELS` times.
    """

    def __init__(self, config: FieldConfig) -> None:
        super().__init__(config, UNet(config))
