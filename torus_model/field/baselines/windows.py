"""Shifted windows, with the mask that turns the edges of the array into a seam, and without."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...block import AttentionBlock
from ..config import FieldConfig
from ..model import FieldModel, LatticeTransformer
from .dense import DenseAttention


def _side_of_edge(length: int, shift: int, *, edge: bool) -> Tensor:
    """Of each place along an axis rolled by ``-shift``: whether it holds a token from across the edge, ``[length]``."""
    return (torch.arange(length) >= length - shift) & edge


class WindowAttention(DenseAttention):
    """Multi-head attention within square windows of ``config.window`` tokens a side.

    In a ``shifted`` layer the windows lie half a window further along both axes, except along an axis that one
    window spans. Those that reach over the edge of the array hold its last and its first tokens; along an axis with
    an edge, ``edges = (rows, columns)``, these do not see each other.

    Args:
        config: sizes; ``window`` must divide both sides of the lattice.
        shifted: whether the windows are shifted.
        edges: whether the rows, and the columns, end at the edge of the array.

    Raises:
        ValueError: ``window`` does not divide the lattice.
    """

    def __init__(self, config: FieldConfig, *, shifted: bool, edges: tuple[bool, bool]) -> None:
        super().__init__(config)
        self.window = window = config.window
        self.shape = (self.lattice.n_major, self.lattice.n_minor)
        if any(side % window for side in self.shape):
            raise ValueError(f"window must divide the lattice of {self.shape[0]} x {self.shape[1]} patches, "
                             f"got {window}")
        self.shifts = tuple(window // 2 if shifted and side > window else 0 for side in self.shape)
        mask = None
        if any(shift > 0 and edge for shift, edge in zip(self.shifts, edges, strict=True)):
            row, column = (
                _side_of_edge(side, shift, edge=edge)
                for side, shift, edge in zip(self.shape, self.shifts, edges, strict=True)
            )
            region = (2 * row[:, None] + column).unflatten(1, (-1, window)).unflatten(0, (-1, window))
            region = region.transpose(1, 2).reshape(-1, window**2)  # [windows, window^2]
            mask = region[:, :, None] == region[:, None, :]
        self.register_buffer("mask", mask, persistent=False)

    def _roll(self, x: Tensor, direction: int) -> Tensor:
        """``x`` ``[B, T, width]`` rolled by the shifts."""
        if not any(self.shifts):
            return x
        grid = x.unflatten(1, self.shape)
        return grid.roll([direction * shift for shift in self.shifts], (1, 2)).flatten(1, 2)

    def _split(self, x: Tensor) -> Tensor:
        """``[B, H, T, D] -> [B * H, windows, window^2, D]``."""
        window = self.window
        grid = x.unflatten(2, (self.shape[0] // window, window, self.shape[1] // window, window))
        return grid.transpose(3, 4).flatten(4, 5).flatten(2, 3).flatten(0, 1)

    def _merge(self, x: Tensor) -> Tensor:
        """The inverse of `_split`."""
        window = self.window
        grid = x.unflatten(2, (window, window)).unflatten(1, (self.shape[0] // window, self.shape[1] // window))
        return grid.transpose(2, 3).flatten(1, 4).unflatten(0, (-1, self.heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, H, T, D] -> [B, H, T, D]``; windows take the place of heads, where SDPA broadcasts the mask."""
        q, k, v = map(self._split, (q, k, v))
        return self._merge(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask))

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        """As in `DenseAttention`.

        Tokens are rolled before they are given positions. Scores depend on displacements within a window alone, and
        where a roll would change one, across the open edge of a cylinder, the mask hides it.
        """
        out, state = super().forward(self._roll(x, -1))
        return self._roll(out, 1), state


class WindowField(FieldModel):
    """A transformer of shifted windows (Swin: Liu et al. 2021); every second block is shifted by half a window.

    With ``wrap=False`` the shifted windows are masked at the edges of the array, as in Swin, whose images end there.
    The same mask on a closed axis is a seam: weather models have carried it along the longitude (NVIDIA physicsnemo,
    issue 1599, in Pangu-Weather and FengWu, against Pangu-Weather's paper). No roll commutes with that model.

    With ``wrap=True`` windows reach over every closed edge unmasked: along both axes, or on the cylinder along the
    second. Rolls by whole windows along these axes commute with that model.

    Args:
        config: the architecture; its ``network`` is not looked at.
        wrap: whether windows wrap.

    Raises:
        ValueError: ``window`` does not divide the lattice.
    """

    def __init__(self, config: FieldConfig, *, wrap: bool) -> None:
        edges = (not wrap or config.topology == "cylinder", not wrap)
        super().__init__(config, LatticeTransformer(config, (
            AttentionBlock(
                config.width, WindowAttention(config, shifted=layer % 2 == 1, edges=edges),
                ff_width=config.ff_width, dropout=config.dropout,
            )
            for layer in range(config.layers)
        )))
