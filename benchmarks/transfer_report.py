"""Results of the study of transfer: kept as JSON, shown as a table and as plots."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import environment
from .report import compact, reading
from .tables import Grid

KIND, FORMAT = "transfer", 1

TUNING, DISTILLATION, COMPRESSION, EXPERTS = "fine-tuning", "distillation", "compression", "experts"


@dataclass(frozen=True)
class Outcome:
    """One variant of one feature, against what it starts from or stands beside.

    Attributes:
        before: bits per byte of the model to compare with, on the same text.
        after: those of the variant, one for each seed.
        bytes_before, bytes_after: weights of the two in a checkpoint.
        learning: parameters that were trained.
        steps: for how long; 0 where nothing was.
    """

    feature: str
    variant: str
    before: float
    after: tuple[float, ...]
    bytes_before: int
    bytes_after: int
    learning: int
    steps: int


@dataclass(frozen=True)
class Curve:
    """A training run of a variant.

    Attributes:
        steps: where it was validated.
        bits: bits per byte there.
        load: the largest part of a step's tokens that one expert got, of a quarter with four experts that are used
            alike, as the mean over the layers; empty without experts.
    """

    feature: str
    variant: str
    seed: int
    steps: tuple[int, ...]
    bits: tuple[float, ...]
    load: tuple[float, ...] = ()


@dataclass
class TransferReport:
    """One run of the study.

    Attributes:
        machine: `benchmarks.environment.machine`.
        setting: models, texts and training in words.
        experts: how many there are in a mixture.
    """

    machine: dict[str, Any]
    setting: str
    experts: int
    outcomes: list[Outcome] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes JSON, bits to five digits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"kind": KIND, "format": FORMAT} | dataclasses.asdict(self)
        for entry in (*fields["outcomes"], *fields["curves"]):
            entry |= {name: [float(f"{x:.5g}") for x in entry[name]] for name in ("after", "bits", "load")
                      if name in entry}
            entry |= {"before": float(f"{entry['before']:.5g}")} if "before" in entry else {}
        path.write_text(compact(fields) + "\n")

    @classmethod
    def load(cls, path: Path) -> TransferReport:
        """The report that `save` wrote.

        Raises:
            ReportError: the file does not hold one.
            OSError: the file cannot be read.
        """
        with reading(path, KIND, FORMAT) as fields:
            outcomes = [Outcome(**entry | {"after": tuple(entry["after"])}) for entry in fields.pop("outcomes")]
            curves = [Curve(**entry | {name: tuple(entry[name]) for name in ("steps", "bits", "load")})
                      for entry in fields.pop("curves")]
            return cls(**fields, outcomes=outcomes, curves=curves)


def _bits(values: Sequence[float]) -> str:
    """The mean, and where there are several the smallest and the largest."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def grid(report: TransferReport) -> Grid:
    """A row for each variant."""
    head = ["feature", "variant", "steps", "parameters trained", "bits per byte before", "after", "bytes before",
            "after"]
    rows = [[x.feature, x.variant, f"{x.steps:,}", f"{x.learning:,}", f"{x.before:.3f}", _bits(x.after),
             f"{x.bytes_before:,}", f"{x.bytes_after:,} ({x.bytes_after / x.bytes_before:.2f}x)"]
            for x in report.outcomes]
    return Grid("Transfer: loss and size of the weights, before and after", head, rows, left=2)


def markdown(report: TransferReport) -> str:
    """The table of the documentation, and how it was measured."""
    return (f"{grid(report).markdown()}\n\nBits per byte on the validation part; where several seeds were trained the "
            "mean, in parentheses the smallest and the largest. Bytes are those of the weights in a checkpoint. "
            "*Before* is, for fine-tuning, the base model on the text of the row; for distillation the teacher; for "
            f"compression the base model; for experts the dense model of the same active size. {report.setting} "
            f"{environment.describe(report.machine)}.")


def _draw_curves(axes: Axes, report: TransferReport, feature: str, values: str) -> None:
    colors: dict[str, str] = {}
    for curve in report.curves:
        if curve.feature == feature and getattr(curve, values):
            color = colors.setdefault(curve.variant, f"C{len(colors)}")
            is_first = curve.variant not in axes.get_legend_handles_labels()[1]
            axes.plot(curve.steps, getattr(curve, values), color=color, marker=".", ms=4, lw=1.2,
                      label=curve.variant if is_first else None)
    axes.set_xlabel("step")


def _draw_compression(axes: Axes, report: TransferReport) -> None:
    for x in report.outcomes:
        if x.feature == COMPRESSION:
            is_tuned = x.steps > 0
            axes.plot(x.bytes_after / 1e6, statistics.fmean(x.after), "s" if is_tuned else "o", ms=6,
                      color="C1" if is_tuned else "C0")
            axes.annotate(x.variant.replace(", trained on", ""), (x.bytes_after / 1e6, statistics.fmean(x.after)),
                          (0, 7) if is_tuned else (0, -12), textcoords="offset points", fontsize=6, ha="center")
    base = next((x for x in report.outcomes if x.feature == COMPRESSION), None)
    if base is not None:
        axes.axhline(base.before, color="0.6", lw=0.8, ls="--")
        axes.axvline(base.bytes_before / 1e6, color="0.6", lw=0.8, ls="--")
    axes.set_xlabel("megabytes of weights in the file (dashed: the base model)")
    axes.margins(x=0.15, y=0.12)


def write_plot(report: TransferReport, path: Path) -> None:
    """Training curves, loss over size, and the load of experts, as a PNG."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    tuning, distilled, compressed, experts = figure.subplots(2, 2).flat
    _draw_curves(tuning, report, TUNING, "bits")
    _draw_curves(distilled, report, DISTILLATION, "bits")
    for axes, feature in ((tuning, TUNING), (distilled, DISTILLATION)):  # random weights begin far above
        axes.set_ylim(top=1.02 * max(curve.bits[1] for curve in report.curves if curve.feature == feature))
    _draw_compression(compressed, report)
    _draw_curves(experts, report, EXPERTS, "load")
    experts.axhline(1 / report.experts, color="0.6", lw=0.8, ls="--")
    experts.set_ylim(0, 1)
    for axes, title, label in (
        (tuning, "Fine-tuning on prose", "bits per byte"),
        (distilled, "Distillation into a smaller model", "bits per byte"),
        (compressed, "Compression: circles at once, squares after more steps", "bits per byte"),
        (experts, "Largest load of an expert (dashed: all alike)", "part of the tokens"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.suptitle(environment.describe(report.machine), fontsize=7, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
