"""Results of the comparison of the language model's memory, positions and adaptive alpha: JSON, a table and a plot."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torus_model.coherence import MEASURES
from torus_model.coherence_tracking import CoherencePoint

from . import environment
from .report import compact, reading
from .tables import Grid

KIND, FORMAT = "coherence", 1

BASELINE, ADAPTIVE = "baseline", "adaptive alpha"

OPTIONS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    ADAPTIVE: {"adaptive_alpha": True},
    "momentum": {"ema_momentum": True},
    "3 time constants": {"ema_scales": 3},
    "sinusoids": {"sinusoidal_positions": True},
}
"""What is compared: fields of `torus_model.ModelConfig`, by what tables and plots call them."""


@dataclass(frozen=True)
class Trained:
    """One run.

    Attributes:
        option: of `OPTIONS`.
        parameters: learned numbers of the model.
        steps: training steps before each validation.
        bits_per_byte: of each validation.
        coherence: `CoherencePoint` s as fields.
    """

    option: str
    seed: int
    parameters: int
    steps: tuple[int, ...]
    bits_per_byte: tuple[float, ...]
    coherence: tuple[dict[str, Any], ...]

    def points(self) -> list[CoherencePoint]:
        """What was measured."""
        return [CoherencePoint(**fields) for fields in self.coherence]


@dataclass
class CoherenceReport:
    """One comparison.

    Attributes:
        machine: `benchmarks.environment.machine`.
        config: `TrainConfig.to_dict` of the baseline, the seed aside.
    """

    machine: dict[str, Any]
    config: dict[str, Any]
    trained: list[Trained] = field(default_factory=list)

    @property
    def options(self) -> list[str]:
        """Those with results, in the order of `OPTIONS`."""
        found = {trained.option for trained in self.trained}
        return [option for option in OPTIONS if option in found]

    def runs(self, option: str) -> list[Trained]:
        """One for each seed, in order."""
        return sorted((trained for trained in self.trained if trained.option == option), key=lambda run: run.seed)

    def save(self, path: Path) -> None:
        """Writes JSON, what was measured to five digits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"kind": KIND, "format": FORMAT} | dataclasses.asdict(self)
        fields["trained"] = [_rounded(entry) for entry in fields["trained"]]
        path.write_text(compact(fields) + "\n")

    @classmethod
    def load(cls, path: Path) -> CoherenceReport:
        """The report that `save` wrote.

        Raises:
            ReportError: the file does not hold one.
            OSError: the file cannot be read.
        """
        with reading(path, KIND, FORMAT) as fields:
            sequences = ("steps", "bits_per_byte", "coherence")
            trained = [Trained(**entry | {name: tuple(entry[name]) for name in sequences})
                       for entry in fields.pop("trained")]
            for run in trained:
                run.points()  # whose fields must be right, too
            return cls(**fields, trained=trained)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _beside_baseline(report: CoherenceReport, option: str) -> list[list[float]]:
    """Bits per byte more than the baseline of the same seed at every validation, for each seed that has one."""
    baseline = {run.seed: run.bits_per_byte for run in report.runs(BASELINE)}
    return [[ours - other for ours, other in zip(run.bits_per_byte, baseline[run.seed], strict=True)]
            for run in report.runs(option) if run.seed in baseline]


def _differences(report: CoherenceReport, option: str) -> str:
    """At the last validation: the mean, and the range over the seeds."""
    found = [differences[-1] for differences in _beside_baseline(report, option)]
    if option == BASELINE or not found:
        return "-"
    return f"{statistics.fmean(found):+.3f} ({min(found):+.3f} to {max(found):+.3f})"


def grid(report: CoherenceReport) -> Grid:
    """A row for each option: what the last validation and the last measurement found, as means over the seeds."""
    rows = []
    for option in report.options:
        runs = report.runs(option)
        last = [run.points()[-1] for run in runs]
        rows.append([
            option, f"{runs[0].parameters:,}", f"{statistics.fmean(run.bits_per_byte[-1] for run in runs):.3f}",
            _differences(report, option),
            *(f"{statistics.fmean(point.mean(name) for point in last):.2f}" for name in MEASURES),
        ])
    head = ["option", "parameters", "bits per byte", "beside the baseline", *MEASURES]
    return Grid("The language model with one option at a time", head, rows, left=1)


def markdown(report: CoherenceReport) -> str:
    """The table of the documentation, and how it was measured."""
    config = report.config
    model, baseline = config["model"], [run.bits_per_byte[-1] for run in report.runs(BASELINE)]
    return (f"{grid(report).markdown()}\n\nAfter {config['steps']} steps of {config['batch_size']} sequences of "
            f"{config['seq_len']} bytes; means over {len(baseline)} seeds, in parentheses the range of the differences "
            "from the baseline with the same seed, and so the same initial weights and batches. The baselines "
            f"themselves range over {max(baseline) - min(baseline):.3f} bits per byte. Measures are means "
            f"over the layers at the last measurement. Width {model['width']}, {model['layers']} layers, lattice "
            f"{model['n_major']} x {model['n_minor']}; text of {config['data'] or 'the Python standard library'}. "
            f"{environment.describe(report.machine)}.")


def write_plot(report: CoherenceReport, path: Path) -> None:
    """Bits per byte beside the baseline and the measures over training, a line for each option, as a PNG."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 3)
    for place, option in enumerate(report.options):
        runs = report.runs(option)
        if found := _beside_baseline(report, option):
            _draw(panels[0, 0], runs[0].steps, found, place, option)
        for axes, name in zip(panels.flat[1:], MEASURES, strict=True):
            _draw(axes, [point.step for point in runs[0].points()],
                  [[point.mean(name) for point in run.points()] for run in runs], place, option)
    panels[0, 0].set(title="validation beside the baseline", ylabel="bits per byte more", xlabel="step")
    for axes, name in zip(panels.flat[1:], MEASURES, strict=True):
        axes.set(title=f"{name}, mean over layers", xlabel="step", ylim=(0, 1))
    panels[0, 1].legend(fontsize=8)
    figure.suptitle(environment.describe(report.machine), fontsize=7, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw(
    axes: Axes, steps: Sequence[int], curves: Sequence[Sequence[float]], place: int, option: str
) -> None:
    """The mean over the seeds, and their range."""
    values = list(zip(*curves, strict=True))
    lowest, highest = [min(y) for y in values], [max(y) for y in values]
    axes.plot(steps, [statistics.fmean(y) for y in values], color=f"C{place}", lw=1.4, label=option)
    axes.fill_between(steps, lowest, highest, color=f"C{place}", alpha=0.15, lw=0)
    axes.grid(alpha=0.3)
