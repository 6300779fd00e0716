"""Results of the comparison on periodic fields: kept as JSON, shown as a table."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import environment
from .report import reading
from .tables import Grid
from .timing import Spread, Timing, timings_of

KIND, FORMAT = "field", 2

OURS = "torus"

LABELS = {
    OURS: "torus attention",
    "loops": "torus, loops only",
    "windows": "shifted windows, seam mask",
    "windows-periodic": "shifted windows, periodic",
    "dense": "dense attention",
    "fourier": "Fourier neural operator",
    "unet": "U-Net, circular padding",
}
"""The networks that are compared, in the order of tables and plots."""

PUBLISHED = {"FNO": 0.1556, "FactFormer": 0.1214, "Transolver": 0.0900, "LaMO": 0.0460}
"""Relative L2 errors of the rollout that papers report for the task at viscosity 1e-5: 1000 trajectories of the public
dataset, 500 epochs, models of their own sizes. Other data, more of it and longer training than anything here."""


@dataclass(frozen=True)
class Trained:
    """One network trained from one seed.

    Attributes:
        network: a name of `LABELS`.
        scores: `torus_model.field.FieldScores.to_dict`.
        profile: root mean square error in one step on rings one patch wide, from the edge of the array to its middle,
            divided by that of all points.
        losses: mean training loss of each epoch.
    """

    network: str
    seed: int
    parameters: int
    scores: dict[str, Any]
    profile: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass
class FieldReport:
    """All that a comparison found.

    Attributes:
        machine: `environment.machine`.
        data: how the data was made.
        task: trajectories, grid, patch and the like: what all networks share.
        training: `FieldTrainConfig.to_dict`, the seed aside.
        steps_per_epoch: training steps in an epoch.
        models: `FieldConfig.to_dict` of each network.
        trained: the results.
        steps: times of one training step, all networks in the same rounds.
    """

    machine: dict[str, Any]
    data: dict[str, Any]
    task: dict[str, Any]
    training: dict[str, Any]
    steps_per_epoch: int
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: list[Trained] = field(default_factory=list)
    steps: dict[str, Timing] = field(default_factory=dict)

    @property
    def networks(self) -> list[str]:
        """Those with results, in the order of `LABELS`."""
        found = {trained.network for trained in self.trained}
        return [name for name in LABELS if name in found]

    def runs(self, network: str) -> list[Trained]:
        """One for each seed."""
        return [trained for trained in self.trained if trained.network == network]

    def scores(self, network: str, name: str) -> list[float]:
        """A score of `FieldScores` for each seed."""
        return [trained.scores[name] for trained in self.runs(network)]

    def save(self, path: Path) -> None:
        """Writes JSON.

        Raises:
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"kind": KIND, "format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> FieldReport:
        """The report of `save`.

        Raises:
            ReportError: the file holds none.
            OSError: it cannot be read.
        """
        with reading(path, KIND, FORMAT) as fields:
            fields["trained"] = [
                Trained(**{**x, "profile": tuple(x["profile"]), "losses": tuple(x["losses"])})
                for x in fields["trained"]
            ]
            fields["steps"] = timings_of(fields["steps"])
            return cls(**fields)


def _over_seeds(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The mean over seeds, and in parentheses the smallest and the largest."""
    mean = form(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({form(min(values))}-{form(max(values))})"


def _error(value: float) -> str:
    return f"{value:.3f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}" if value < 1e-3 else f"{value:.2f}"


def grid(report: FieldReport) -> Grid:
    """A row for each network: means over the seeds, with the smallest and the largest."""
    rows = []
    for network in report.networks:
        def column(name: str, form: Callable[[float], str], network: str = network) -> str:
            return _over_seeds(report.scores(network, name), form)

        seconds = "-"
        if network in report.steps:
            spread: Spread = report.steps[network].spread
            ratio = report.steps[network].ratio_to(report.steps[OURS]).median if OURS in report.steps else None
            seconds = f"{spread.median * report.steps_per_epoch:.1f} s"
            seconds += "" if ratio is None or network == OURS else f" ({ratio:.1f}x)"
        rows.append([
            LABELS[network], f"{report.runs(network)[0].parameters:,}", column("one_step", _error),
            column("rollout", _error), column("seam_one_step", _ratio), column("seam_rollout", _ratio),
            column("equivariance_patches", _small), column("equivariance_points", _small), seconds,
        ])
    rows.append([
        "no change (last frame)", "0", *(_error(report.trained[0].scores[f"persistence_{name}"])
                                         for name in ("one_step", "rollout")), "", "", "0", "0", "",
    ])
    return Grid("Periodic fields", (
        "network", "parameters", "relative L2, one step", "relative L2, rollout", "seam / elsewhere, one step",
        "seam / elsewhere, end of rollout", "equivariance error, rolls by patches", "by other numbers of points",
        "epoch",
    ), rows, left=1)


def describe(report: FieldReport) -> str:
    """What the table cannot say."""
    data, task, training = report.data, report.task, report.training
    seeds = sorted({trained.seed for trained in report.trained})
    ours = report.runs(OURS) or report.trained
    deviation = statistics.fmean(trained.scores["seam_one_step_deviation"] or 0.0 for trained in ours)
    return (
        f"2D Navier-Stokes, viscosity {data.get('viscosity', 'unknown')}, initial amplitude of the "
        f"{data.get('initial', 'data given')}, {task['train']} trajectories to train and "
        f"{task['test']} to test on, {task['grid'][0]}x{task['grid'][1]} points, patches of {task['patch']}x"
        f"{task['patch']}; {task['history']} frames in, {task['horizon']} out. {training['epochs']} epochs of "
        f"{report.steps_per_epoch} steps, AdamW, the same settings for all; "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}: means, in parentheses smallest and largest. Chance changes a seam "
        f"ratio by {deviation:.2f} (standard deviation over all places where the grid could have been cut). Periodic "
        "windows commute with rolls by whole windows, the U-Net with rolls by 8 points, the Fourier operator with all. "
        f"{_sizes(report)}Epoch: median step in rounds that run every network once, times the steps. "
        f"{environment.describe(report.machine)}."
        + (_published() if data.get("viscosity") == 1e-5 else "")
    )


def _sizes(report: FieldReport) -> str:
    if "fourier" not in report.networks:
        return ""
    fourier = report.models["fourier"]
    return f"Fourier operator: {fourier['ff_width']} channels, {fourier['modes']} modes. "


def _published() -> str:
    figures = ", ".join(f"{name} {error:.4f}" for name, error in PUBLISHED.items())
    return (f"\n\nPublished errors of the rollout on the public data at this viscosity, after 500 epochs on 1000 "
            f"trajectories and with models of other sizes, so not comparable with the table: {figures}.")


def markdown(report: FieldReport) -> str:
    """The table and what it is about."""
    return f"{grid(report).markdown()}\n\n{describe(report)}"
