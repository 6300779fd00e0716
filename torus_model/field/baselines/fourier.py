"""A Fourier neural operator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import FieldConfig
from ..model import FieldModel


def _padding(config: FieldConfig) -> int:
    """Rows of zeros that continue an open axis: the transform wraps, and would join its two edges."""
    return math.ceil(config.grid[0] / 8) if config.topology == "cylinder" else 0


def most_modes(config: FieldConfig) -> int:
    """The largest ``modes`` that the grid takes."""
    rows, columns = config.grid
    return min((rows + _padding(config)) // 2, columns // 2 + 1)


class SpectralConvolution(nn.Module):
    """Multiplies the lowest Fourier modes of a field by a complex matrix over its channels, and drops the others.

    ``weight`` ``[2 * modes, modes, width, width, 2]`` holds real and imaginary parts in its last dimension: an
    optimizer sees real numbers. The modes along the first axis are 0 to modes - 1, then -modes to -1; those along the
    second are 0 to modes - 1, since the field is real.

    Args:
        width: channels in and out.
        modes: retained modes per axis and sign.
    """

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        # As in the authors' code: uniform on [0, 1 / width^2].
        self.weight = nn.Parameter(torch.rand(2 * modes, modes, width, width, 2) / width**2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, width, H, W] -> [B, width, H, W]``."""
        rows, columns = x.shape[-2:]
        modes = self.modes
        # rfft2 and irfft2 axis by axis: along the first axis only the modes that are kept are transformed.
        spectrum = torch.fft.fft(torch.fft.rfft(x)[..., :modes], dim=-2)
        low = torch.cat((spectrum[..., :modes, :], spectrum[..., rows - modes :, :]), -2)  # [B, C, 2 * modes, modes]
        low = (low.permute(2, 3, 0, 1) @ torch.view_as_complex(self.weight)).permute(2, 3, 0, 1)
        gap = low.new_zeros(*low.shape[:2], rows - 2 * modes, modes)
        spectrum = torch.cat((low[..., :modes, :], gap, low[..., modes:, :]), -2)  # [B, C, H, modes]
        return torch.fft.irfft(torch.fft.ifft(spectrum, dim=-2), n=columns)


class FourierBlock(nn.Module):
    """A spectral convolution beside a pointwise linear map.

    Args:
        width: channels.
        modes: retained modes per axis and sign.
        dropout: probability on the output.
        activation: whether a GELU follows; the last block has none.
    """

    def __init__(self, width: int, modes: int, dropout: float, *, activation: bool) -> None:
        super().__init__()
        self.spectral = SpectralConvolution(width, modes)
        self.skip = nn.Conv2d(width, width, 1)
        self.activation = nn.GELU() if activation else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, width, H, W] -> [B, width, H, W]``."""
        return self.dropout(self.activation(self.spectral(x) + self.skip(x)))


class FourierNetwork(nn.Module):
    """The network of `FourierField`: ``[B, input_channels, H, W] -> [B, channels, H, W]``.

    Raises:
        ValueError: there are fewer modes on the grid than ``modes``.
    """

    def __init__(self, config: FieldConfig) -> None:
        super().__init__()
        self.padding = _padding(config)
        if config.modes > most_modes(config):
            raise ValueError(f"modes must be at most {most_modes(config)} on a {config.topology} grid of "
                             f"{config.grid[0]} x {config.grid[1]}, got {config.modes}")
        width = config.ff_width or config.width
        self.lift = nn.Conv2d(config.input_channels, width, 1)
        self.blocks = nn.Sequential(*(
            FourierBlock(width, config.modes, config.dropout, activation=layer < config.layers - 1)
            for layer in range(config.layers)
        ))
        self.projection = nn.Conv2d(width, 4 * width, 1)
        self.head = nn.Conv2d(4 * width, config.channels, 1)
        nn.init.zeros_(self.head.weight)  # the untrained model predicts that nothing changes
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, input_channels, H, W] -> [B, channels, H, W]``."""
        rows = x.shape[-2]
        x = self.blocks(F.pad(self.lift(x), (0, 0, 0, self.padding)))
        return self.head(F.gelu(self.projection(x[..., :rows, :])))


class FourierField(FieldModel):
    """A Fourier neural operator in two dimensions (FNO-2d: Li et al. 2021), on the points of the grid.

    It has no patches, and none of the two coordinate channels of the original: they would tell it where the grid was
    cut. Rolls by any number of points commute with it; on the cylinder, where the first axis is padded with zeros,
    those along the second axis.

    Args:
        config: the architecture, of which it takes ``layers``, ``modes``, ``dropout``, and as its channels
            ``ff_width``, or ``width`` where that is None; its ``network`` is not looked at.

    Raises:
        ValueError: there are fewer modes on the grid than ``modes``.
    """

    def __init__(self, config: FieldConfig) -> None:
        super().__init__(config, FourierNetwork(config))
