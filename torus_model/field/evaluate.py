"""What a field model is worth: errors in one step and over a rollout, at the seam, and under shifts of the grid."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..attention import TorusAttention
from .config import FieldConfig
from .data import FieldData, FieldDataError, Windows
from .losses import relative_l2
from .model import FieldModel


@dataclass(frozen=True)
class FieldScores:
    """Scores of a model on trajectories that it was not trained on. Errors are relative L2 errors, means over samples.

    The rollout begins with the first ``history`` frames of a trajectory and runs to its end. A seam ratio is the root
    mean square error on the points within one patch of the grid's edges, divided by that on all others; on the
    cylinder, whose first axis really ends, only the edges of the second axis count. A model that cannot know where the
    grid was cut has a ratio of 1 but for chance. How much chance does to it says the deviation, the standard deviation
    of the ratio over all places, whole patches apart, where the grid could have been cut. None where every point lies
    at an edge.

    An equivariance error is ``||roll(predict(x)) - predict(roll(x))|| / ||predict(x) - last frame||``: a difference
    that should not be there as a part of the change that is predicted. ``patches`` are random rolls by whole patches,
    ``points`` by numbers of points that are no multiples of a patch (or any, where a patch is one point).

    Attributes:
        trajectories: how many were evaluated.
        one_step: over all windows of all trajectories.
        rollout: over all frames of a rollout together.
        rollout_steps: the same for each frame of it.
        persistence_one_step, persistence_rollout, persistence_rollout_steps: of the last given frame as prediction.
        seam_one_step, seam_rollout: seam ratio of the error in one step and in the last frame of the rollout.
        seam_one_step_deviation, seam_rollout_deviation: the deviations.
        seam_one_step_target, seam_rollout_target: seam ratio of the deviation of the true fields from their mean.
        equivariance_patches, equivariance_points: equivariance errors in float32.
        equivariance_patches_float64, equivariance_points_float64: the same in float64, on one sample.
        one_step_map, rollout_map: root mean square error at every point ``[H, W]``, each channel divided by its scale,
            in one step and in the last frame of the rollout.
    """

    trajectories: int
    one_step: float
    rollout: float
    rollout_steps: tuple[float, ...]
    persistence_one_step: float
    persistence_rollout: float
    persistence_rollout_steps: tuple[float, ...]
    seam_one_step: float | None
    seam_one_step_deviation: float | None
    seam_one_step_target: float | None
    seam_rollout: float | None
    seam_rollout_deviation: float | None
    seam_rollout_target: float | None
    equivariance_patches: float
    equivariance_points: float
    equivariance_patches_float64: float
    equivariance_points_float64: float
    one_step_map: Tensor = field(repr=False, compare=False)
    rollout_map: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the maps, as values that JSON can hold."""
        names = (f.name for f in dataclasses.fields(self) if not f.name.endswith("_map"))
        return {name: list(x) if isinstance(x := getattr(self, name), tuple) else x for name in names}


def check_fits(config: FieldConfig, data: FieldData, horizon: int = 1) -> None:
    """Raises FieldDataError where the data is not what the model takes, or shorter than ``history + horizon``."""
    static_channels = 0 if data.static is None else data.static.shape[1]
    for name, got, needed in (
        ("grid", data.grid, config.grid), ("channels", data.frames.shape[2], config.channels),
        ("static_channels", static_channels, config.static_channels),
    ):
        if got != needed:
            raise FieldDataError(f"the data has {name} = {got}, but the model needs {needed}")
    if data.frames.shape[1] < config.history + horizon:
        raise FieldDataError(f"the data has {data.frames.shape[1]} frames a trajectory, but the model needs "
                             f"{config.history} and {horizon} to predict")


def batches(
    model: FieldModel, data: FieldData, batch_size: int, horizon: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """All windows of the data in order, as `Windows.gather` returns them, on the model's device.

    Without a ``horizon`` a window is a whole trajectory.
    """
    history = model.config.history
    windows = Windows(data, history, data.frames.shape[1] - history if horizon is None else horizon)
    device = next(model.parameters()).device
    for batch in windows.batches(batch_size):
        yield tuple(x if x is None else x.to(device) for x in batch)  # type: ignore[misc]  # of three


@torch.inference_mode()
def one_step_error(model: FieldModel, data: FieldData, *, batch_size: int) -> float:
    """Relative L2 error of the next frame, the mean over all windows; the model may be in training mode."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for history, static, target in batches(model, data, batch_size, horizon=1):
        total += relative_l2(model(history, static), target[:, 0]).item() * len(target)
        count += len(target)
    model.train(was_training)
    return total / count


def seam_mask(config: FieldConfig) -> Tensor:
    """Points within one patch of the edges where the grid was cut, ``[H, W]`` bool."""
    rows, columns = config.grid
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[:, :config.patch] = mask[:, -config.patch:] = True
    if config.topology == "periodic":
        mask[:config.patch] = mask[-config.patch:] = True
    return mask


def seam_ratio(squares: Tensor, config: FieldConfig) -> float | None:
    """Root mean square at the seam divided by that elsewhere.

    Args:
        squares: mean squares ``[H, W]``.
        config: grid, patch and topology.
    """
    mask = seam_mask(config).to(squares.device)
    if mask.all():
        return None
    elsewhere = squares[~mask].mean().sqrt().item()
    return squares[mask].mean().sqrt().item() / elsewhere if elsewhere > 0 else None


def seam_deviation(squares: Tensor, config: FieldConfig) -> float | None:
    """Standard deviation of `seam_ratio` over the places where the grid could have been cut, whole patches apart."""
    rows, columns = config.grid
    row_shifts = range(0, rows, config.patch) if config.topology == "periodic" else (0,)
    ratios = [
        seam_ratio(squares.roll((down, right), (0, 1)), config)
        for down in row_shifts for right in range(0, columns, config.patch)
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.pstdev(known) if known else None


@torch.inference_mode()
def equivariance_error(
    model: FieldModel, history: Tensor, static: Tensor | None, shifts: tuple[int, int]
) -> float:
    """``||roll(predict(x)) - predict(roll(x))|| / ||predict(x) - last frame||``, the norms over the whole batch.

    Args:
        model: in evaluation mode.
        history: ``[B, history, C, H, W]``.
        static: ``[B or 1, S, H, W]``, or None; rolled with the history.
        shifts: points by which the two axes are rolled.
    """
    def roll(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.roll(shifts, (-2, -1))

    predicted = model(history, static)
    difference = (roll(predicted) - model(roll(history), roll(static))).norm().item()
    change = (predicted - history[:, -1]).norm().item()
    return difference / change if change > 0 else (0.0 if difference == 0 else float("inf"))


class _ErrorSums:
    """Sums over samples of predictions of one kind: squares at every point, each channel divided by its scale."""

    def __init__(self, model: FieldModel) -> None:
        self._scale = model.frame_scale.double()[:, None, None]  # [C, 1, 1]
        self._count = 0
        self._target = self._scale.new_zeros(model.config.channels, *model.config.grid)
        self._target_square, self._error = torch.zeros_like(self._target), self._scale.new_zeros(model.config.grid)

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """``[B, C, H, W]`` each."""
        error, target = (predicted - target).double() / self._scale, target.double() / self._scale
        self._count += len(target)
        self._error += error.square().sum((0, 1))
        self._target += target.sum(0)
        self._target_square += target.square().sum(0)

    @property
    def mean_square_error(self) -> Tensor:
        """``[H, W]``, the sum over channels."""
        return self._error / self._count

    @property
    def target_variance(self) -> Tensor:
        """Mean square deviation from each channel's mean over samples and points, ``[H, W]``, the sum over channels."""
        mean = (self._target / self._count).mean((-2, -1), keepdim=True)  # [C, 1, 1]
        squares = (self._target_square - 2 * mean * self._target) / self._count + mean.square()
        return squares.sum(0).clamp(min=0)


@torch.inference_mode()
def evaluate(
    model: FieldModel, data: FieldData, *, batch_size: int = 8, progress: bool = False, seed: int = 0
) -> FieldScores:
    """Scores of a model in evaluation mode.

    Args:
        model: on any device.
        data: trajectories to test on.
        batch_size: windows, or trajectories of a rollout, at a time.
        progress: show a progress bar on stderr, on a terminal.
        seed: of the rolls.

    Raises:
        FieldDataError: the data does not fit the model, or its trajectories are no longer than a history.
    """
    config = model.config
    check_fits(config, data)
    was_training = model.training
    model.eval()
    horizon = data.frames.shape[1] - config.history
    with tqdm(total=2 * len(data) * horizon, unit="frames", disable=None if progress else True) as bar:
        single, count, totals = _ErrorSums(model), 0, torch.zeros(2, dtype=torch.float64)
        for history, static, target in batches(model, data, batch_size, horizon=1):
            predicted, target = model(history, static), target[:, 0]
            single.add(predicted, target)
            totals += len(target) * torch.stack(
                [relative_l2(x, target).cpu() for x in (predicted, history[:, -1])]
            )
            count += len(target)
            bar.update(len(target))
        one_step = (totals / count).tolist()

        last, totals = _ErrorSums(model), torch.zeros(2, 1 + horizon, dtype=torch.float64)
        for history, static, target in batches(model, data, batch_size):
            predicted = model.rollout(history, horizon, static)  # [B, horizon, C, H, W]
            last.add(predicted[:, -1], target[:, -1])
            totals += len(target) * torch.stack(
                [_rollout_errors(x, target) for x in (predicted, history[:, -1:].expand_as(target))]
            )
            bar.update(target.shape[0] * horizon)
        rollout, rollout_steps = (totals / len(data))[:, 0].tolist(), (totals / len(data))[:, 1:].tolist()

    history, static, _ = next(batches(model, data, batch_size=min(4, batch_size)))
    generator = torch.Generator().manual_seed(seed)
    rolls = {kind: [_random_roll(config, kind, generator) for _ in range(_ROLLS)] for kind in ("patches", "points")}
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if isinstance(module, TorusAttention):
            module.backend = None  # a backend that was forced may not have float64
    one = history[:1].double(), None if static is None else static[:1].double()
    equivariance = {
        f"equivariance_{kind}{suffix}": _mean([equivariance_error(network, *inputs, roll) for roll in rolls[kind]])
        for suffix, network, inputs in (("", model, (history, static)), ("_float64", exact, one))
        for kind in rolls
    }
    model.train(was_training)
    return FieldScores(
        trajectories=len(data),
        one_step=one_step[0], rollout=rollout[0], rollout_steps=tuple(rollout_steps[0]),
        persistence_one_step=one_step[1], persistence_rollout=rollout[1],
        persistence_rollout_steps=tuple(rollout_steps[1]),
        seam_one_step=seam_ratio(single.mean_square_error, config),
        seam_one_step_deviation=seam_deviation(single.mean_square_error, config),
        seam_one_step_target=seam_ratio(single.target_variance, config),
        seam_rollout=seam_ratio(last.mean_square_error, config),
        seam_rollout_deviation=seam_deviation(last.mean_square_error, config),
        seam_rollout_target=seam_ratio(last.target_variance, config),
        **equivariance,
        one_step_map=single.mean_square_error.sqrt().cpu(),
        rollout_map=last.mean_square_error.sqrt().cpu(),
    )


_ROLLS = 4
"""Random rolls of each kind; their equivariance errors are averaged."""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _rollout_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Relative L2 of all frames together, then of each, ``[1 + horizon]``."""
    steps = [relative_l2(p, t) for p, t in zip(predicted.unbind(1), target.unbind(1), strict=True)]
    return torch.stack([relative_l2(predicted, target), *steps]).cpu()


def _random_roll(config: FieldConfig, kind: str, generator: torch.Generator) -> tuple[int, int]:
    """A roll that moves something along every axis that is closed, see `FieldScores`."""
    whole = kind == "patches" or config.patch == 1

    def draw(side: int) -> int:
        candidates = [shift for shift in range(1, side) if (shift % config.patch == 0) == whole]
        return candidates[int(torch.randint(len(candidates), (), generator=generator))]

    rows, columns = config.grid
    return 0 if config.topology == "cylinder" else draw(rows), draw(columns)
