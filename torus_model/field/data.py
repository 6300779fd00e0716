"""Trajectories of fields: what a file holds, how it is read and written, its split, and windows of it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from . import formats
from .formats import FieldDataError
from .navier_stokes import classical_forcing

__all__ = ["FieldData", "FieldDataError", "Windows", "load_data", "save_data", "split"]

_FORMAT = "torus_model.field.data.1"

FORCINGS = {"classical": classical_forcing}
"""Forcings by the name that ``parameters["forcing"]`` and `load_data` give them; each maps ``n`` to ``[n, n]``."""


@dataclass(frozen=True)
class FieldData:
    """Trajectories of fields on a grid.

    Args:
        frames: ``[N, F, C, H, W]`` float32: trajectories, frames (oldest first), channels, grid.
        static: ``[N, S, H, W]`` float32, given fields that do not change over a trajectory, or ``[1, S, H, W]`` where
            all trajectories share them; None where there are none.
        parity: ``+1`` or ``-1`` for each channel: whether a reflection of the grid keeps its sign, or flips it as that
            of a pseudo-scalar such as vorticity. None for ``+1`` throughout.
        static_parity: the same for each static channel.
        parameters: how the data came about, in values that JSON can hold.

    Raises:
        FieldDataError: a tensor has the wrong shape or dtype, or a parity does not fit.
    """

    frames: Tensor
    static: Tensor | None = None
    parity: tuple[int, ...] | None = None
    static_parity: tuple[int, ...] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_tensor("frames", self.frames, "[N, F, C, H, W]")
        if self.static is not None:
            _check_tensor("static", self.static, "[N or 1, S, H, W]")
            if len(self.static) not in (1, len(self.frames)) or self.static.shape[2:] != self.frames.shape[3:]:
                raise FieldDataError(f"static must have 1 or {len(self.frames)} trajectories on the grid "
                                     f"{list(self.frames.shape[3:])} of frames, got {list(self.static.shape)}")
        static_channels = 0 if self.static is None else self.static.shape[1]
        for name, channels in (("parity", self.frames.shape[2]), ("static_parity", static_channels)):
            given = getattr(self, name)
            signs = (1,) * channels if given is None else tuple(given)
            if len(signs) != channels or any(sign not in (1, -1) for sign in signs):
                raise FieldDataError(f"{name} must be {channels} times +1 or -1, got {given}")
            object.__setattr__(self, name, signs)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def grid(self) -> tuple[int, int]:
        """``(H, W)``."""
        height, width = self.frames.shape[3:]
        return height, width

    def select(self, trajectories: slice | Tensor) -> FieldData:
        """Some of the trajectories, by a slice or an index tensor."""
        static = self.static
        if static is not None and len(static) > 1:
            static = static[trajectories]
        return dataclasses.replace(self, frames=self.frames[trajectories], static=static)


def split(data: FieldData, train: int, test: int) -> tuple[FieldData, FieldData]:
    """The first ``train`` and the last ``test`` trajectories, so that test sets agree where training sets differ.

    Raises:
        FieldDataError: there are not that many, or a number is below 1.
    """
    if train < 1 or test < 1 or train + test > len(data):
        raise FieldDataError(f"train and test must be at least 1 and together at most the {len(data)} trajectories "
                             f"of the data, got {train} and {test}")
    return data.select(slice(0, train)), data.select(slice(len(data) - test, None))


class Windows:
    """Every window of ``history + horizon`` consecutive frames of every trajectory, numbered by trajectory, then time.

    Args:
        data: the trajectories.
        history: frames that are given.
        horizon: frames that follow.

    Raises:
        FieldDataError: a number is below 1, or the trajectories are shorter than a window.
    """

    def __init__(self, data: FieldData, history: int, horizon: int = 1) -> None:
        if history < 1 or horizon < 1 or history + horizon > data.frames.shape[1]:
            raise FieldDataError(f"history and horizon must be at least 1 and together at most the "
                                 f"{data.frames.shape[1]} frames of a trajectory, got {history} and {horizon}")
        self.data, self.history, self.horizon = data, history, horizon
        self.per_trajectory = data.frames.shape[1] - history - horizon + 1

    def __len__(self) -> int:
        return len(self.data) * self.per_trajectory

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The windows of these numbers.

        Args:
            indices: ``[B]`` integers in ``range(len(self))``.

        Returns:
            The history ``[B, history, C, H, W]``, the static fields ``[B or 1, S, H, W]`` or None, and the frames that
            follow ``[B, horizon, C, H, W]``.
        """
        trajectory, start = indices // self.per_trajectory, indices % self.per_trajectory
        frames = self.data.frames[trajectory[:, None], start[:, None] + torch.arange(self.history + self.horizon)]
        static = self.data.static
        if static is not None and len(static) > 1:
            static = static[trajectory]
        return frames[:, :self.history], static, frames[:, self.history:]

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """All windows once, as `gather` returns them: shuffled by ``generator``, or in order without one."""
        count = len(self)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for indices in order.split(batch_size):
            yield self.gather(indices)


def save_data(path: str | os.PathLike, data: FieldData) -> None:
    """Writes a safetensors file; a crash leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written.
        TypeError: ``data.parameters`` holds what JSON cannot.
    """
    path = Path(path)
    tensors = {"frames": data.frames} | ({} if data.static is None else {"static": data.static})
    about = {"parity": data.parity, "static_parity": data.static_parity, "parameters": data.parameters}
    texts = {"format": _FORMAT} | {key: json.dumps(value) for key, value in about.items()}
    try:
        with replacing(path) as temporary:
            save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary, metadata=texts)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def load_data(path: str | os.PathLike, forcing: str | None = None) -> FieldData:
    """Reads a file of `save_data`, or vorticity in the public layout of the neural-operator datasets.

    Args:
        path: ``.safetensors``; or ``.mat`` or ``.npy`` as `torus_model.field.formats.read_public` takes them.
        forcing: of a public file, the forcing that made it, a name of `FORCINGS`; it becomes the static channel. A file
            of `save_data` carries its own.

    Raises:
        FieldDataError: the file is not there, not complete, or holds something else; or ``forcing`` does not fit it.
    """
    path = Path(path)
    if forcing is not None and forcing not in FORCINGS:
        raise FieldDataError(f"forcing must be one of {', '.join(FORCINGS)}, got {forcing!r}")
    if not path.is_file():
        raise FieldDataError(f"no file at {path}")
    if path.suffix in formats.PUBLIC_SUFFIXES:
        frames = formats.read_public(path)[:, :, None]  # [N, F, 1, H, W]
        return _vorticity(frames, forcing, {"source": path.name, "forcing": forcing})
    if path.suffix != ".safetensors":
        raise FieldDataError(f"{path} must end in .safetensors, {' or '.join(formats.PUBLIC_SUFFIXES)}")
    if forcing is not None:
        raise FieldDataError(f"{path} carries its own static fields, but forcing is {forcing!r}: that is for "
                             f"{' and '.join(formats.PUBLIC_SUFFIXES)} files")
    return _load_safetensors(path)


def vorticity_data(frames: Tensor, parameters: Mapping[str, Any]) -> FieldData:
    """Vorticity ``[N, F, H, W]`` with the forcing that ``parameters["forcing"]`` names, or None, as static channel."""
    return _vorticity(frames[:, :, None].float(), parameters["forcing"], dict(parameters))


def _vorticity(frames: Tensor, forcing: str | None, parameters: dict[str, Any]) -> FieldData:
    if forcing is None:
        return FieldData(frames, parity=(-1,), parameters=parameters)
    if frames.shape[3] != frames.shape[4]:
        raise FieldDataError(f"forcing {forcing} needs a square grid, got {list(frames.shape[3:])}")
    static = FORCINGS[forcing](frames.shape[-1]).float()[None, None]  # [1, 1, H, W]
    return FieldData(frames, static, parity=(-1,), static_parity=(-1,), parameters=parameters)


def _load_safetensors(path: Path) -> FieldData:
    try:
        with safe_open(path, framework="pt") as content:
            texts = content.metadata() or {}
            if texts.pop("format", None) != _FORMAT:
                raise FieldDataError(f"{path} is not a file of field data")
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
        return FieldData(**tensors, **{key: json.loads(text) for key, text in texts.items()})
    except (SafetensorError, json.JSONDecodeError, TypeError, OSError) as error:
        raise FieldDataError(f"{path} cannot be read as field data: {' '.join(str(error).split())}") from error


def _check_tensor(name: str, x: Tensor, layout: str) -> None:
    if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
        raise FieldDataError(f"{name} must be finite everywhere")
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.ndim != layout.count(",") + 1 or x.numel() == 0:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FieldDataError(f"{name} must be float32 {layout}, not empty, got {got}")
