"""Plots of the comparison on periodic fields, as PNG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from .field_report import LABELS, OURS, FieldReport, describe


def _colour(network: str) -> str:
    return f"C{list(LABELS).index(network)}"


def _mean(rows: list[tuple[float, ...]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def write_seam(report: FieldReport, path: Path) -> None:
    """The seam: error at the edge of the array over error elsewhere, and error by distance from the edge."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    networks = report.networks
    for place, network in enumerate(networks):
        values = report.scores(network, "seam_one_step")
        bars.barh(place, statistics.fmean(values) - 1, left=1, color=_colour(network), alpha=0.8)
        bars.plot(values, [place] * len(values), "k.", ms=4)
        bars.annotate(f"{statistics.fmean(values):.2f}", (max(1, *values), place), (5, 0),
                      textcoords="offset points", va="center", fontsize=8)
        profile = _mean([trained.profile for trained in report.runs(network)])
        lines.plot(range(1, 1 + len(profile)), profile, marker="o", ms=3, color=_colour(network), label=LABELS[network],
                   lw=2.5 if network == OURS else 1.2)
    chance = [trained.scores["seam_one_step_deviation"] for trained in report.runs(OURS) or report.trained]
    chance = statistics.fmean(value for value in chance if value is not None) if any(chance) else 0.0
    bars.axvspan(1 - 2 * chance, 1 + 2 * chance, color="0.85", zorder=0,
                 label="chance: two standard deviations,\nwere the grid cut elsewhere")
    bars.axvline(1, color="0.3", lw=0.8)
    bars.set_yticks(range(len(networks)), [LABELS[n] for n in networks])
    bars.invert_yaxis()
    bars.margins(x=0.12)
    bars.set(xlabel="error at the seam / error elsewhere, one step", title="A seam has more than 1")
    bars.legend(fontsize=7, loc="lower right")
    lines.axhline(1, color="0.3", lw=0.8)
    lines.set(xlabel="ring of patches, from the edge of the array", ylabel="error / mean error",
              title="Where the errors are")
    lines.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def write_errors(report: FieldReport, path: Path) -> None:
    """Errors in one step and over the rollout, and the training curves."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    bars, rollout, training = figure.subplots(1, 3)
    networks = report.networks
    for place, network in enumerate(networks):
        for offset, score, alpha in ((-0.2, "one_step", 0.9), (0.2, "rollout", 0.5)):
            values = report.scores(network, score)
            bars.barh(place + offset, statistics.fmean(values), 0.38, color=_colour(network), alpha=alpha)
            bars.plot(values, [place + offset] * len(values), "k.", ms=4)
        steps = _mean([tuple(trained.scores["rollout_steps"]) for trained in report.runs(network)])
        rollout.plot(range(1, 1 + len(steps)), steps, color=_colour(network), label=LABELS[network], marker="o", ms=3)
        losses = _mean([trained.losses for trained in report.runs(network)])
        training.plot(range(1, 1 + len(losses)), losses, color=_colour(network))
    persistence = report.trained[0].scores["persistence_rollout_steps"]
    rollout.plot(range(1, 1 + len(persistence)), persistence, color="0.5", ls=":", label="no change")
    bars.set_yticks(range(len(networks)), [LABELS[n] for n in networks])
    bars.invert_yaxis()
    bars.set(xlabel="relative L2 error: one step (dark), rollout (light)", title="Error on test trajectories")
    rollout.set(xlabel="frames into the rollout", ylabel="relative L2 error", title="Autoregressive rollout")
    rollout.legend(fontsize=7)
    training.set(xlabel="epoch", ylabel="relative L2 loss", title="Training", yscale="log")
    figure.supxlabel(describe(report).splitlines()[0], fontsize=6, wrap=True)
    figure.savefig(path, dpi=150)


def write_maps(maps: Mapping[str, Tensor], path: Path) -> None:
    """Root mean square error in one step at every point ``[H, W]`` of each network, each divided by its mean.

    The arrays are rolled by half, so that the seam, where there is one, crosses the middle of the pictures.
    """
    figure = Figure(figsize=(2.2 * len(maps) + 0.8, 2.8), layout="constrained")
    row = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (network, error) in zip(row, maps.items(), strict=True):
        half = (error.shape[0] // 2, error.shape[1] // 2)
        centred = (error / error.square().mean().sqrt()).roll(half, (0, 1)).numpy()
        image = axes.imshow(centred, cmap="viridis", vmin=0.6, vmax=1.6)
        axes.set(xticks=[], yticks=[])
        axes.set_title(LABELS[network], fontsize=7)
    figure.colorbar(image, ax=row, label="error / mean error")
    figure.suptitle("Error by place; the edges of the array are moved to the middle", fontsize=8)
    figure.savefig(path, dpi=150)
