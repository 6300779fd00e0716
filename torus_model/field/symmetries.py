"""The symmetries of a lattice, acting on fields: shifts, reflections and, on a square torus, transposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import FieldConfig


@dataclass(frozen=True)
class Symmetry:
    """One symmetry: first the transposition, then the reflections, then the shift.

    On the torus every combination maps the grid onto itself, the transposition where the grid is square. On the
    cylinder the first axis is open: it has no shift, its reflection exchanges the two ends (north and south), and
    that of the second axis runs around the globe the other way (east and west).

    Args:
        shifts: points by which the first and the second axis (H, W) are rolled.
        flips: whether each axis is reflected: point i becomes point n - 1 - i.
        transpose: whether the axes are exchanged, a reflection at the diagonal.
    """

    shifts: tuple[int, int] = (0, 0)
    flips: tuple[bool, bool] = (False, False)
    transpose: bool = False

    @property
    def orientation(self) -> int:
        """-1 for an odd number of reflections, the transposition among them, which turn left into right; else 1."""
        return (-1) ** (sum(self.flips) + self.transpose)


def random_symmetry(config: FieldConfig, generator: torch.Generator) -> Symmetry:
    """A symmetry of the configuration's grid, each as likely as any other."""
    rows, columns = config.grid
    is_open = config.topology == "cylinder"

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    return Symmetry(
        (draw(1 if is_open else rows), draw(columns)),
        (bool(draw(2)), bool(draw(2))),
        bool(draw(2)) if rows == columns and not is_open else False,
    )


def apply(symmetry: Symmetry, fields: Tensor, parity: Sequence[int]) -> Tensor:
    """The transformed fields.

    What a network is given must be transformed as a whole, the static fields with the frames: a shifted vorticity
    under the shifted forcing is again a solution, and under the old forcing it is not. The same holds for the
    reflections of a rotating globe: they are symmetries if its Coriolis parameter is among the static fields, with
    parity -1, because the mirror image of a globe rotates the other way.

    Args:
        symmetry: one of the grid of ``fields``.
        fields: ``[..., C, H, W]``, scalars and pseudo-scalars. Components of vectors, which reflections and
            transposition mix, are not supported.
        parity: for each of the C channels 1, or -1 for a pseudo-scalar, whose sign a reflection changes: vorticity,
            a stream function, the curl of a force.

    Returns:
        ``[..., C, H, W]``, H and W exchanged by a transposition.

    Raises:
        ValueError: ``parity`` does not fit the channels.
    """
    if len(parity) != fields.shape[-3] or any(sign not in (1, -1) for sign in parity):
        raise ValueError(f"parity must be 1 or -1 for each of {fields.shape[-3]} channels, got {tuple(parity)}")
    if symmetry.transpose:
        fields = fields.transpose(-2, -1)
    if axes := [axis for axis, flip in zip((-2, -1), symmetry.flips, strict=True) if flip]:
        fields = fields.flip(axes)
    fields = fields.roll(symmetry.shifts, (-2, -1))
    if symmetry.orientation == 1 or all(sign == 1 for sign in parity):
        return fields
    return fields * fields.new_tensor(parity)[:, None, None]
