"""Results of the study of dynamic training: kept as JSON, shown as a table and as plots."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import environment
from .report import compact, reading
from .tables import Grid

KIND, FORMAT = "dynamics", 1


@dataclass(frozen=True)
class Trained:
    """One run.

    Attributes:
        feature: what it shows; runs of a feature are compared with each other.
        name: of the run among them.
        points: the validation curve: steps, tokens, floating-point operations, bits per byte.
        series: what changed, after every step.
    """

    feature: str
    name: str
    seed: int
    points: tuple[tuple[float, float, float, float], ...]
    series: dict[str, tuple[float | None, ...]] = field(default_factory=dict)


@dataclass
class DynamicsReport:
    """One run of the study.

    Attributes:
        machine: `benchmarks.environment.machine`.
        settings: of all runs, in words.
        layers: of the first seed, by run: learning rate of a layer as a part of the top one's, and how far its weights
            moved, relative to their norm at the start; the embedding first.
        growth: largest difference of logits before and after growth, relative to the largest logit, by dtype and the
            largest over the seeds.
    """

    machine: dict[str, Any]
    settings: str
    runs: list[Trained] = field(default_factory=list)
    layers: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    growth: dict[str, float] = field(default_factory=dict)

    def of(self, feature: str) -> dict[str, list[Trained]]:
        """The runs of a feature by name, one for each seed, in order."""
        found: dict[str, list[Trained]] = {}
        for run in self.runs:
            if run.feature == feature:
                found.setdefault(run.name, []).append(run)
        return found

    def features(self) -> list[str]:
        """Those shown, in order."""
        return list(dict.fromkeys(run.feature for run in self.runs))

    def save(self, path: Path) -> None:
        """Writes JSON, numbers to four digits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(compact(_rounded({"kind": KIND, "format": FORMAT} | dataclasses.asdict(self))) + "\n")

    @classmethod
    def load(cls, path: Path) -> DynamicsReport:
        """The report that `save` wrote.

        Raises:
            ReportError: the file does not hold one.
            OSError: the file cannot be read.
        """
        with reading(path, KIND, FORMAT) as fields:
            runs = [Trained(**entry | {"points": tuple(map(tuple, entry["points"])),
                                       "series": {name: tuple(x) for name, x in entry["series"].items()}})
                    for entry in fields.pop("runs")]
            layers = {name: [tuple(pair) for pair in pairs] for name, pairs in fields.pop("layers").items()}
            return cls(**fields, runs=runs, layers=layers)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(x) if key != "machine" else x for key, x in value.items()}
    return [_rounded(x) for x in value] if isinstance(value, (list, tuple)) else value


def grid(report: DynamicsReport) -> Grid:
    """A row for each run: its steps, tokens and operations, and bits per byte as the mean and range over the seeds."""
    rows = []
    for feature in report.features():
        for name, runs in report.of(feature).items():
            steps, tokens, operations, _ = (statistics.mean(x) for x in zip(*(run.points[-1] for run in runs),
                                                                            strict=True))
            bits = [run.points[-1][3] for run in runs]
            spread = f" ({min(bits):.3f} - {max(bits):.3f})" if len(bits) > 1 else ""
            rows.append([feature, name, f"{steps:.0f}", f"{tokens / 1e3:.0f}", f"{operations / 1e12:.3f}",
                         f"{statistics.mean(bits):.3f}{spread}"])
    head = ["feature", "run", "steps", "thousand tokens", "TFLOP", "bits per byte"]
    return Grid("Dynamic training on small runs", head, rows, left=2)


def markdown(report: DynamicsReport) -> str:
    """The table of the documentation, and how it was measured."""
    seeds = len({run.seed for run in report.runs})
    over = f"mean and range over {seeds} seeds" if seeds > 1 else "of one seed: differences may be chance"
    differences = " and ".join(f"{difference:.1e} in {dtype}" for dtype, difference in report.growth.items())
    return (f"{grid(report).markdown()}\n\nBits per byte at the end, on text that is not trained on, {over}. "
            "Runs of this length say little of longer ones. Operations are six for each parameter and token, forward "
            f"and backward. Through growth the logits change by {differences}, relative to the largest logit. "
            f"{report.settings} "
            f"{environment.describe(report.machine)}.")


def _curves(axes: Axes, runs: dict[str, list[Trained]], x: int) -> None:
    """Validation curves of all seeds over steps (0), tokens (1) or operations (2)."""
    scale = {0: 1.0, 1: 1e3, 2: 1e12}[x]
    for place, (name, of_seeds) in enumerate(runs.items()):
        for run in of_seeds:
            axes.plot([p[x] / scale for p in run.points], [p[3] for p in run.points], color=f"C{place}", lw=1,
                      alpha=0.7, marker=".", ms=3, label=name if run is of_seeds[0] else None)
    axes.set(xlabel={0: "step", 1: "thousand tokens", 2: "TFLOP"}[x], ylabel="bits per byte")
    axes.legend(fontsize=7)


def _series(name: str, ylabel: str, log: bool = False) -> Callable[[Axes, dict[str, list[Trained]]], None]:
    """A panel of a series of every run over the steps, of the first seed."""
    def draw(axes: Axes, runs: dict[str, list[Trained]]) -> None:
        for place, (label, (first, *_)) in enumerate(runs.items()):
            if values := first.series.get(name):
                axes.plot(range(1, len(values) + 1), values, color=f"C{place}", lw=1, label=label)
        axes.set(xlabel="step", ylabel=ylabel)
        if log:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=7)

    return draw


def _noise(axes: Axes, runs: dict[str, list[Trained]]) -> None:
    for label, (first, *_) in runs.items():
        if values := first.series.get("noise scale"):
            steps = range(1, len(values) + 1)
            axes.plot(steps, values, color="0.6", lw=1, label=f"{label}: noise scale")
            axes.plot(steps, first.series["batch size"], color="C0", lw=1.5, label=f"{label}: batch size")
    axes.set(xlabel="step", ylabel="sequences")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=7)


def _layers(axes: Axes, layers: dict[str, list[tuple[float, float]]]) -> None:
    for place, (name, pairs) in enumerate(layers.items()):
        axes.plot(range(len(pairs)), [rate for rate, _ in pairs], color=f"C{place}", marker="o", ms=3, ls="--",
                  label=f"{name}: rate, as a part of the top one's")
        axes.plot(range(len(pairs)), [moved for _, moved in pairs], color=f"C{place}", marker="s", ms=3,
                  label=f"{name}: relative change of weights")
    count = max(map(len, layers.values()), default=0)
    axes.set_xticks(range(count), ["embedding", *(f"block {i}" for i in range(count - 1))], fontsize=7)
    axes.set_yscale("log")
    axes.legend(fontsize=7)


_PANELS: dict[str, tuple[Callable[[Axes, dict[str, list[Trained]]], None], int]] = {
    "schedules": (_series("rate", "learning rate"), 0),
    "layer-wise rates": (_series("rate", ""), 0),
    "curriculum": (_series("tokens per sequence", "tokens per sequence", log=True), 1),
    "batch size": (_noise, 1),
    "growth": (_series("parameters", "parameters", log=True), 2),
    "alpha": (_series("alpha", "mean alpha of all heads"), 0),
}
"""For each feature the panel that shows what changes, and what its validation curve is drawn over."""


def write_plots(report: DynamicsReport, what: Path, curves: Path) -> None:
    """Draws what changes in a run of each feature, and the validation curves of all runs, as two PNGs."""
    features = [feature for feature in report.features() if feature in _PANELS]
    for path, draw in ((what, _draw_change), (curves, _draw_curves)):
        figure = Figure(figsize=(12, 6.6), layout="constrained")
        for axes, feature in zip(figure.subplots(2, 3).flat, features, strict=False):
            draw(axes, report, feature)
            axes.set_title(feature, fontsize=10)
            axes.grid(alpha=0.2)
            axes.tick_params(labelsize=7)
        figure.suptitle(environment.describe(report.machine), fontsize=7, wrap=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def _draw_change(axes: Axes, report: DynamicsReport, feature: str) -> None:
    if feature == "layer-wise rates":
        _layers(axes, report.layers)
    else:
        _PANELS[feature][0](axes, report.of(feature))


def _draw_curves(axes: Axes, report: DynamicsReport, feature: str) -> None:
    _curves(axes, report.of(feature), _PANELS[feature][1])
