"""Configuration of a model of fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torus_kernels import TorusLattice

from ..checks import check_heads, check_numbers, check_positive_integers


@dataclass(frozen=True)
class FieldConfig:
    """Everything that determines a model of fields; which kernels compute it is not part of it.

    Args:
        network: what computes the next frame, a name of `torus_model.field.NETWORKS`.
        grid: ``(H, W)``, points of the field along each axis; multiples of ``patch``.
        channels: fields that are predicted (C).
        static_channels: given fields that do not change over a trajectory (S), such as a forcing.
        history: frames that the model sees.
        patch: side of the square of points that makes a token; 1 for a token per point.
        width: size of the tokens' embedding; channels of networks without tokens, unless ``ff_width`` says otherwise.
        layers: number of blocks.
        heads: attention heads; ``width / heads`` must be a multiple of 8 up to 256.
        ff_width: hidden size of the feed-forward layers, None for ``4 * width``; channels of the Fourier network, None
            for ``width``; channels of the U-Net's coarsest grid, None for ``4 * width``.
        topology: ``"periodic"``, or ``"cylinder"`` where the first axis (H) is open.
        winding, cross_radius, streams: of the `TorusLattice` of patches. ``streams`` are names; None for all eight.
        token_gated: stream weights from each token; otherwise one set per head.
        window: side of the attention windows, in tokens; of the windowed networks only.
        modes: retained Fourier modes per axis and sign; of the Fourier network only.
        dropout: probability on the output of each branch of a block.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    network: str = "torus"
    grid: tuple[int, int] = (64, 64)
    channels: int = 1
    static_channels: int = 0
    history: int = 10
    patch: int = 4
    width: int = 96
    layers: int = 4
    heads: int = 4
    ff_width: int | None = None
    topology: str = "periodic"
    winding: int = 1
    cross_radius: tuple[int, int] = (3, 7)
    streams: tuple[str, ...] | None = None
    token_gated: bool = True
    window: int = 4
    modes: int = 12
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_integers(
            self, "channels", "history", "patch", "width", "layers", "heads", "window", "modes", optional=("ff_width",)
        )
        if isinstance(self.static_channels, bool) or not isinstance(self.static_channels, int):
            raise TypeError(f"static_channels must be an integer, got {self.static_channels!r}")
        if self.static_channels < 0:
            raise ValueError(f"static_channels must not be negative, got {self.static_channels}")
        if self.topology not in ("periodic", "cylinder"):
            raise ValueError(f"topology of a field must be periodic or cylinder, got {self.topology!r}")
        if len(self.grid) != 2 or any(side < 1 or side % self.patch for side in self.grid):
            raise ValueError(f"grid must be two multiples of patch = {self.patch}, got {self.grid}")
        check_heads(self.width, self.heads)
        check_numbers(self, "dropout", where=lambda x: 0 <= x < 1, needs="at least 0 and below 1")
        lattice = self.lattice  # checks the lattice's fields
        # One form for each value, whatever collection it came in: configurations compare and travel through JSON.
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "cross_radius", lattice.cross_radius)
        if self.streams is not None:
            object.__setattr__(self, "streams", tuple(s.name for s in sorted(lattice.streams)))

    @property
    def lattice(self) -> TorusLattice:
        """The lattice of patches: the first axis of the grid is the major loop, the second the minor."""
        rows, columns = (side // self.patch for side in self.grid)
        return TorusLattice(rows, columns, self.topology, self.winding, self.cross_radius, self.streams)

    @property
    def input_channels(self) -> int:
        """Channels that a network sees at each point: every frame of the history, and the static fields."""
        return self.history * self.channels + self.static_channels

    def to_dict(self) -> dict[str, Any]:
        """Fields as values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FieldConfig:
        """The configuration of `to_dict`, also after a way through JSON.

        Raises:
            TypeError, ValueError: a field is unknown or wrong.
        """
        return cls(**fields)
