"""Plots of a report."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from . import environment
from .candidates import OPERATOR
from .report import Report, columns, factor, label, milliseconds


def write_timings(report: Report, path: Path) -> None:
    """Median times with quartiles on a logarithmic axis, and their ratios to the operator, as a PNG."""
    cases, names = report.cases(), columns(report)
    figure = Figure(figsize=(9, 2 + 0.22 * (len(names) + 1) * len(cases)), layout="constrained")
    axes = figure.subplots()
    step = 0.8 / len(names)
    for place, name in enumerate(names):
        rows = [(row, case, timings[name].spread) for row, case in enumerate(cases)
                if name in (timings := report.timings(case))]
        y = [row + (place - (len(names) - 1) / 2) * step for row, _, _ in rows]
        spreads = [spread for _, _, spread in rows]
        axes.errorbar(
            [s.median * 1e3 for s in spreads], y,
            xerr=[[(s.median - s.lower) * 1e3 for s in spreads], [(s.upper - s.median) * 1e3 for s in spreads]],
            fmt="o", ms=5, capsize=2, color=f"C{place}", label=label(name, report.backend),
        )
        for height, (_, case, spread) in zip(y, rows, strict=True):
            ratio = "" if name == OPERATOR else f", {factor(report.ratio(case, name).median)}"
            axes.annotate(f"{milliseconds(spread.median)} ms{ratio}", (spread.upper * 1e3, height), (5, 0),
                          textcoords="offset points", va="center", fontsize=7)
    for row in range(1, len(cases)):
        axes.axhline(row - 0.5, color="0.85", lw=0.8)
    axes.set_yticks(range(len(cases)), [f"{c.workload}, {c.dtype}\n{c.direction}" for c in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds: median and quartiles; factor: times as long as the operator")
    axes.set_title(environment.describe(report.machine), fontsize=7, wrap=True)
    axes.grid(axis="x", which="both", alpha=0.2)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
