"""Results of the study of precision: kept as JSON, shown as a table and as plots."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from . import environment
from .report import compact, reading
from .tables import Grid

KIND, FORMAT = "precision", 1

PLAIN = "sdpa"

GROUPS = {
    "output": ("out",),
    "token gradients": ("d_q", "d_k", "d_v", "d_state"),
    "parameter gradients": ("d_weights", "d_decay", "d_alpha"),
}
"""Results whose errors share a scale, by names of `benchmarks.accuracy.RESULTS`."""

SWEEPS = {
    "sites": "sites of a periodic lattice",
    "length": "length of a causal sequence",
    "score": "largest score",
    "decay": "decay of every stream",
    "depth": "depth of one stream below the others",
}
"""What the sweeps vary."""


@dataclass(frozen=True)
class Errors:
    """Errors of one group of results of one candidate at one point, a number for each seed.

    Attributes:
        candidate: `PLAIN` or a backend.
        largest: the largest error of any element, relative to the group's largest value.
        rms: the root mean square error, relative to the group's largest root mean square.
        share: the largest error of any tensor as a share of its budget: twice the error of `PLAIN`, and rounding.
    """

    sweep: str
    value: float
    dtype: str
    candidate: str
    group: str
    largest: tuple[float, ...]
    rms: tuple[float, ...]
    share: tuple[float, ...]


@dataclass
class PrecisionReport:
    """One run of the study.

    Attributes:
        machine: `benchmarks.environment.machine`.
        backends: those measured, in order.
        seeds: inputs for each point.
        sizes: of all points, in words.
    """

    machine: dict[str, Any]
    backends: list[str]
    seeds: int
    sizes: str
    errors: list[Errors] = field(default_factory=list)

    @property
    def candidates(self) -> dict[str, str]:
        """What plots and tables call those measured."""
        return {PLAIN: "SDPA"} | {name: name for name in self.backends}

    def dtypes(self) -> list[str]:
        """Those measured, in order."""
        return list(dict.fromkeys(e.dtype for e in self.errors))

    def sweeps(self) -> list[str]:
        """Those measured, in order."""
        return list(dict.fromkeys(e.sweep for e in self.errors))

    def of(self, sweep: str, dtype: str, candidate: str, group: str) -> list[Errors]:
        """The points of one curve, in order."""
        return [e for e in self.errors if (e.sweep, e.dtype, e.candidate, e.group) == (sweep, dtype, candidate, group)]

    def exceedances(self) -> list[str]:
        """A line for each point at which a backend exceeds the error budget on any seed."""
        return [f"over budget: {e.candidate}, {e.dtype}, {e.group}, {SWEEPS[e.sweep]} {e.value:g}: "
                f"{max(e.share):.2f} of the budget, SDPA {plain.largest[0]:.2e} and {e.candidate} {e.largest[0]:.2e} "
                "on the first seed"
                for e in self.errors if max(e.share) > 1 and e.candidate != PLAIN
                for plain in self.of(e.sweep, e.dtype, PLAIN, e.group) if plain.value == e.value]

    def save(self, path: Path) -> None:
        """Writes JSON, errors to three digits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"kind": KIND, "format": FORMAT} | dataclasses.asdict(self)
        for entry in fields["errors"]:
            entry |= {name: [float(f"{x:.3g}") for x in entry[name]] for name in ("largest", "rms", "share")}
        path.write_text(compact(fields) + "\n")

    @classmethod
    def load(cls, path: Path) -> PrecisionReport:
        """The report that `save` wrote.

        Raises:
            ReportError: the file does not hold one.
            OSError: the file cannot be read.
        """
        with reading(path, KIND, FORMAT) as fields:
            of_seeds = ("largest", "rms", "share")
            errors = [Errors(**entry | {name: tuple(entry[name]) for name in of_seeds})
                      for entry in fields.pop("errors")]
            return cls(**fields, errors=errors)


def _errors(curve: Sequence[Errors]) -> str:
    """RMS and largest error, by the medians over the seeds, where they are largest."""
    return " / ".join(f"{max(statistics.median(getattr(e, name)) for e in curve):.1e}" for name in ("rms", "largest"))


def _worst_ratio(curve: Sequence[Errors], plain: Sequence[Errors]) -> float:
    """The largest ratio of RMS errors at any point, by the medians over the seeds; infinite beside an exact result."""
    ratios = [(statistics.median(e.rms), statistics.median(p.rms)) for e, p in zip(curve, plain, strict=True)]
    return max(0.0 if ours == 0 else ours / other if other else float("inf") for ours, other in ratios)


def grid(report: PrecisionReport) -> Grid:
    """A row for each sweep, dtype and group: the errors where they are largest, and how they compare at every point."""
    head = ["varied", "dtype", "result", *report.candidates.values()]
    rows = []
    for sweep in report.sweeps():
        for dtype in report.dtypes():
            for group in GROUPS:
                plain = report.of(sweep, dtype, PLAIN, group)
                curves = [report.of(sweep, dtype, candidate, group) for candidate in report.backends]
                rows.append([sweep, dtype, group, _errors(plain), *(
                    f"{_errors(curve)} ({_worst_ratio(curve, plain):.2g}x)" if curve else "-" for curve in curves)])
    return Grid("Relative errors against float64", head, rows, left=3)


def markdown(report: PrecisionReport) -> str:
    """The table of the documentation, and how it was measured."""
    over = report.exceedances()
    budget = (f"{len(over)} points exceed the error budget (twice SDPA's error, and rounding)." if over else
              "No point exceeds the error budget (twice SDPA's error, and rounding).")
    varied = "; ".join(f"*{name}*: {text}" for name, text in SWEEPS.items())
    return (f"{grid(report).markdown()}\n\nErrors against float64 on the same numbers, RMS / largest, relative to the "
            "largest RMS and the largest value in the group of results. Shown is the point of the sweep where they are "
            f"largest, as the median over {report.seeds} seeds; in parentheses the largest ratio of the RMS error to "
            "that of SDPA at any point. SDPA is called once a stream with the stream's mask, in the same dtype, and "
            f"mixed in float32. {varied}. {budget} {report.sizes}. {environment.describe(report.machine)}.")


_STYLES = {"output": "-", "token gradients": "--", "parameter gradients": ":"}


def write_plot(report: PrecisionReport, statistic: str, path: Path) -> None:
    """Errors over what is varied, a row of panels for each sweep and a column for each dtype, as a PNG.

    Args:
        statistic: ``"rms"`` or ``"largest"``.
    """
    sweeps, dtypes = report.sweeps(), report.dtypes()
    figure = Figure(figsize=(1 + 4 * len(dtypes), 1.2 + 2.6 * len(sweeps)), layout="constrained")
    panels = figure.subplots(len(sweeps), len(dtypes), squeeze=False, sharey="col")
    for row, sweep in zip(panels, sweeps, strict=True):
        for axes, dtype in zip(row, dtypes, strict=True):
            axes.axhline(torch.finfo(getattr(torch, dtype)).eps, color="0.6", lw=0.8, zorder=0)
            for place, (candidate, label) in enumerate(report.candidates.items()):
                color, width = ("0.55", 3.0) if candidate == PLAIN else (f"C{place - 1}", 1.3)
                for group, style in _STYLES.items():
                    curve = report.of(sweep, dtype, candidate, group)
                    middle = [statistics.median(getattr(e, statistic)) for e in curve]
                    spread = [[m - min(getattr(e, statistic)) for m, e in zip(middle, curve, strict=True)],
                              [max(getattr(e, statistic)) - m for m, e in zip(middle, curve, strict=True)]]
                    axes.errorbar([e.value for e in curve], middle, yerr=spread, ls=style, color=color, lw=width,
                                  elinewidth=0.8, marker=".", ms=4, label=f"{label}: {group}")
            values = sorted({e.value for e in report.errors if e.sweep == sweep})
            if values[0] == 0:
                axes.set_xscale("symlog", linthresh=1)
            else:
                axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_yscale("log")
            axes.grid(alpha=0.2)
            axes.set_xlabel(SWEEPS[sweep], fontsize=8)
            axes.tick_params(labelsize=7)
            if sweep == sweeps[0]:
                axes.set_title(dtype, fontsize=10)
        row[0].set_ylabel("relative " + ("RMS" if statistic == "rms" else "largest") + " error", fontsize=8)
    figure.suptitle(environment.describe(report.machine), fontsize=7, wrap=True)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8,
                  ncols=len(report.candidates), title="grey level: the dtype's epsilon; median and range over seeds",
                  title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
