"""Pictures of predicted fields, with the lines along which the grid was cut in their middle and dashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

_DPI = 120
_NAMES = ("truth", "prediction", "error")
_CAPTION = "dashed: where the grid was cut"


def write_rollout(path: Path, truth: Tensor, predicted: Tensor, steps: Sequence[int], topology: str) -> None:
    """Draws truth, prediction and error side by side, a row for each of some steps, as a PNG.

    Args:
        path: of the PNG.
        truth, predicted: ``[steps, H, W]``, one channel of all frames of a rollout.
        steps: those to draw, counted from 1.
        topology: of the grid.
    """
    figure = Figure(figsize=(8.4, 0.6 + 2.5 * len(steps)), layout="constrained")
    grid = figure.subplots(len(steps), len(_NAMES), squeeze=False)
    limits = _limits(truth, predicted)
    images: list[AxesImage] = []
    for row, step in zip(grid, steps, strict=True):
        images = [_draw(axes, x, limit, topology) for axes, x, limit
                  in zip(row, _panels(truth, predicted, step), limits, strict=True)]
        row[0].set_ylabel(f"step {step}")
    _finish(figure, grid, images)
    figure.savefig(path, dpi=_DPI)


def write_animation(
    path: Path, truth: Tensor, predicted: Tensor, topology: str, frames_per_second: float = 2.0
) -> None:
    """Draws truth, prediction and error side by side, all steps of a rollout, as an animated GIF.

    Args:
        path: of the GIF.
        truth, predicted: ``[steps, H, W]``, one channel.
        topology: of the grid.
        frames_per_second: speed.
    """
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(_NAMES), squeeze=False)
    images = [_draw(axes, x, limit, topology) for axes, x, limit
              in zip(grid[0], _panels(truth, predicted, 1), _limits(truth, predicted), strict=True)]
    _finish(figure, grid, images)
    label = grid[0, 0].set_ylabel("")
    writer = PillowWriter(fps=frames_per_second)
    with writer.saving(figure, path, dpi=_DPI):
        for step in range(1, len(truth) + 1):
            for image, x in zip(images, _panels(truth, predicted, step), strict=True):
                image.set_data(_centred(x, topology))
            label.set_text(f"step {step}")
            writer.grab_frame()


def write_errors_over_time(path: Path, errors: Mapping[str, Sequence[float]]) -> None:
    """Draws relative L2 errors over the steps of a rollout, a curve for each name, as a PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", ms=4, label=name)
    axes.set(xlabel="step", ylabel="relative L2 error", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=_DPI)


def write_error_maps(path: Path, maps: Mapping[str, Tensor], topology: str) -> None:
    """Draws root mean square errors over many samples at every point, ``[H, W]`` each, as a PNG.

    A model that knows where the grid was cut shows it along the dashed lines.
    """
    figure = Figure(figsize=(0.6 + 4.2 * len(maps), 3.8), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        image = _draw(axes, x, x.max().item(), topology, signed=False)
        axes.set_title(name)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.supxlabel(_CAPTION, fontsize="small")
    figure.savefig(path, dpi=_DPI)


def _panels(truth: Tensor, predicted: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    return truth[step - 1], predicted[step - 1], (predicted - truth)[step - 1]


def _limits(truth: Tensor, predicted: Tensor) -> tuple[float, float, float]:
    """Largest value of each panel's colour scale: one for truth and prediction, one for the error, for all steps."""
    values = truth.abs().max().item()
    return values, values, (predicted - truth).abs().max().item()


def _centred(x: Tensor, topology: str) -> np.ndarray:
    """``[H, W]`` rolled so that the closed axes are cut where the picture has its middle."""
    rows, columns = x.shape
    return x.roll((0 if topology == "cylinder" else rows // 2, columns // 2), (0, 1)).numpy(force=True)


def _draw(axes: Axes, x: Tensor, limit: float, topology: str, signed: bool = True) -> AxesImage:
    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "magma", "vmin": 0}
    image = axes.imshow(_centred(x, topology), origin="lower", interpolation="nearest", **colours)
    rows, columns = x.shape
    line = {"color": "0.2" if signed else "w", "lw": 0.8, "ls": (0, (4, 4))}
    axes.axvline(columns // 2 - 0.5, **line)
    if topology != "cylinder":
        axes.axhline(rows // 2 - 0.5, **line)
    axes.set(xticks=[], yticks=[])
    return image


def _finish(figure: Figure, grid: Sequence[Sequence[Axes]], images: Sequence[AxesImage]) -> None:
    """Titles, and the two colour bars: truth and prediction share one."""
    for axes, name in zip(grid[0], _NAMES, strict=True):
        axes.set_title(name)
    bar = {"location": "bottom", "pad": 0.02}
    figure.colorbar(images[0], ax=[axes for row in grid for axes in row[:2]], **bar, shrink=0.5, aspect=40)
    figure.colorbar(images[2], ax=[row[2] for row in grid], **bar, shrink=0.9)
    figure.supxlabel(_CAPTION, fontsize="small")
