"""Coherence over training: moving averages, the factors of an adaptive alpha, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from torus_kernels import Stream
from torus_kernels.lattice import NUM_STREAMS

from .coherence import MEASURES, WEIGHTS, Coherence, alpha_factor, measure_layers

if TYPE_CHECKING:
    from .lm import TorusLM

RATE = 0.1
"""Of the moving averages: a measurement counts for about ten."""

_PREFIX = "coherence."
"""Of the tensors in a checkpoint."""


@dataclass(frozen=True)
class CoherencePoint:
    """What was measured after one training step, a number for each layer.

    Attributes:
        step: training steps made before.
        comprehensibility, manageability, meaningfulness, score, cohesion: as in `Coherence`.
        alpha_factor: what alpha is multiplied by from the next step on, for each layer but the first, which compounds
            nothing; empty where it is not adaptive.
    """

    step: int
    comprehensibility: Sequence[float]
    manageability: Sequence[float]
    meaningfulness: Sequence[float]
    score: Sequence[float]
    cohesion: Sequence[float]
    alpha_factor: Sequence[float] = ()

    def mean(self, name: str) -> float:
        """A measure over the layers."""
        return statistics.fmean(getattr(self, name))


class CoherenceTracker(nn.Module):
    """Moving averages of the coherence of every layer; its buffers belong to the checkpoint of a run.

    Averages start from the first measurement and move by `RATE` with every further one; those of a pair of streams
    only where the pair could be compared.

    Args:
        layers: of the model.
    """

    measures: Tensor
    alignment: Tensor
    aligned: Tensor
    count: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.register_buffer("measures", torch.zeros(layers, len(WEIGHTS), dtype=torch.float64))
        self.register_buffer("alignment", torch.zeros(layers, NUM_STREAMS, NUM_STREAMS, dtype=torch.float64))
        self.register_buffer("aligned", torch.zeros(layers, NUM_STREAMS, NUM_STREAMS, dtype=torch.bool))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def update(self, layers: Sequence[Coherence]) -> None:
        """Takes in one measurement."""
        measures = torch.tensor([[getattr(layer, name) for name in WEIGHTS] for layer in layers], dtype=torch.float64)
        alignment = torch.stack([layer.alignment for layer in layers]).to(self.alignment)
        aligned = torch.stack([layer.aligned for layer in layers]).to(self.aligned.device)
        self.measures.lerp_(measures.to(self.measures), RATE if self.count > 0 else 1.0)
        rates = torch.full_like(self.alignment, RATE).masked_fill(~self.aligned, 1.0) * aligned
        self.alignment.lerp_(alignment, rates)
        self.aligned |= aligned
        self.count += 1

    def layers(self) -> list[Coherence]:
        """The averages."""
        return [Coherence(**dict(zip(WEIGHTS, measures, strict=True)), alignment=alignment, aligned=aligned)
                for measures, alignment, aligned in
                zip(self.measures.tolist(), self.alignment, self.aligned, strict=True)]

    def observe(self, model: TorusLM, step: int, tokens: Tensor, first_key: Tensor | None = None) -> CoherencePoint:
        """Measures a model, and sets the factors of an adaptive alpha by the averages.

        They hold for the steps to come: a mean over the sequence that is predicted would tell its beginning of its end.
        """
        layers = measure_layers(model, tokens, first_key)
        self.update(layers)
        factors: list[float] = []
        for block, layer in zip(model.blocks, self.layers(), strict=True):
            if block.attention.alpha_factor is not None:
                factors.append(alpha_factor(layer.score, layer.cohesion))
                block.attention.alpha_factor.fill_(factors[-1])
        return CoherencePoint(step, **{name: [getattr(layer, name) for layer in layers] for name in MEASURES},
                              alpha_factor=factors)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The averages under the names that they have in a checkpoint."""
        return {_PREFIX + name: x for name, x in self.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the averages from a checkpoint's tensors; a run that did not measure before begins anew."""
        found = {name.removeprefix(_PREFIX): x for name, x in tensors.items() if name.startswith(_PREFIX)}
        if found:
            self.load_state_dict(found)

    def write_plot(self, points: Sequence[CoherencePoint], path: Path) -> None:
        """Draws the measures over training, and the averaged alignment of the streams, as a PNG."""
        figure = Figure(figsize=(12, 6.5), layout="constrained")
        panels = figure.subplots(2, 3)
        for axes, name in zip(panels.flat, MEASURES, strict=False):
            draw_measure(axes, points, name)
        if any(point.alpha_factor for point in points):
            draw_measure(panels[1, 0], points, "alpha_factor", ls=":")
            panels[1, 0].set_title("score, and (dotted) factor of alpha")
        if points:
            panels[0, 0].legend(fontsize=7)
        self._draw_alignment(panels[1, 2])
        figure.suptitle("Cognitive coherence of the layers")
        figure.savefig(path, dpi=130)

    def _draw_alignment(self, axes: Axes) -> None:
        known = self.aligned.sum(0)
        mean = self.alignment.sum(0) / known.clamp(min=1)
        image = axes.imshow(mean.masked_fill(known == 0, torch.nan).numpy(force=True), vmin=0, vmax=1)
        names = [stream.name for stream in Stream]
        axes.set_xticks(range(NUM_STREAMS), names, rotation=90, fontsize=7)
        axes.set_yticks(range(NUM_STREAMS), names, fontsize=7)
        axes.set_title("alignment, mean over layers")
        axes.figure.colorbar(image, ax=axes)


def draw_measure(axes: Axes, points: Sequence[CoherencePoint], name: str, ls: str = "-") -> None:
    """A measure over training: a thin line for each layer, and their mean."""
    steps = [point.step for point in points]
    layers = max((len(point.score) for point in points), default=0)
    curves = list(zip(*(getattr(point, name) for point in points), strict=True))
    for layer, curve in enumerate(curves, layers - len(curves)):
        color = colormaps["viridis"](layer / max(1, layers - 1))
        axes.plot(steps, curve, color=color, lw=0.9, ls=ls, label=f"layer {layer}")
    if curves:
        axes.plot(steps, [point.mean(name) for point in points], color="black", lw=1.8, ls=ls, label="mean")
    axes.set(ylim=(0, 1), xlabel="step", title=name)
    axes.grid(alpha=0.3)
