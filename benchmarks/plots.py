"""Plots of reports, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from . import environment
from .candidates import FORWARD, OPERATOR
from .report import Report
from .tables import factor, milliseconds, roof, tokens_of
from .timing import Spread


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def write_timings(report: Report, path: Path) -> None:
    """Median times with quartiles on a logarithmic axis, and their ratios to the operator."""
    cases, names = report.cases(), report.columns()
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
            fmt="o", ms=5, capsize=2, color=f"C{place}", label=report.labels[name],
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
    _save(figure, path)


def _panels(report: Report, columns: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    """A panel for each of ``columns``, under the line of the machine."""
    figure = Figure(figsize=(max(6, 4.5 * len(columns)), 4.5), layout="constrained")
    panels = dict(zip(columns, figure.subplots(1, len(columns), squeeze=False)[0], strict=True))
    figure.suptitle(environment.describe(report.machine), fontsize=7, wrap=True)
    for title, axes in panels.items():
        axes.set_title(title, fontsize=9)
        axes.grid(which="both", alpha=0.2)
    return figure, panels


def _plain_numbers(axes: Axes) -> None:
    """Ticks of logarithmic axes as numbers and not as powers."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            for formatted in (axis.set_major_formatter, axis.set_minor_formatter):
                formatted(LogFormatter(minor_thresholds=(1.5, 0.6), labelOnlyBase=False))


def _curve(axes: Axes, x: Sequence[float], spreads: Sequence[Spread], scale: float, **style: Any) -> None:
    y = [spread.median * scale for spread in spreads]
    error = [[(s.median - s.lower) * scale for s in spreads], [(s.upper - s.median) * scale for s in spreads]]
    axes.errorbar(x, y, yerr=error, marker="o", ms=4, capsize=2, **style)


def write_roofline(report: Report, path: Path) -> None:
    """FLOP/s of the operator over its arithmetic intensity, a panel for each dtype, under what the machine reaches."""
    dtypes = list(dict.fromkeys(line.case.dtype for line in report.roofline))
    workloads = list(dict.fromkeys(line.case.workload for line in report.roofline))
    figure, panels = _panels(report, dtypes)
    for dtype, axes in panels.items():
        lines = [line for line in report.roofline if line.case.dtype == dtype]
        intensities = [line.flops / line.bytes for line in lines]
        gemm, copy = lines[0].gemm, lines[0].copy
        corners = [min(*intensities, gemm / copy) / 1.5, gemm / copy, max(*intensities, gemm / copy) * 1.5]
        axes.plot(corners, [min(gemm, copy * x) / 1e9 for x in corners], color="0.4",
                  label=f"matrix product {gemm / 1e9:.0f} GFLOP/s,\ncopy {copy / 1e9:.1f} GB/s")
        for line, intensity in zip(lines, intensities, strict=True):
            reached = line.flops / report.timings(line.case)[OPERATOR].spread.median
            axes.plot(intensity, reached / 1e9, "o" if line.case.direction == FORWARD else "s",
                      color=f"C{workloads.index(line.case.workload)}",
                      label=f"{line.case.workload}, {line.case.direction}: {reached / roof(line):.0%}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(5e-10 * gemm, axes.get_ylim()[0]))
        axes.set(xlabel="FLOP per byte of tokens", ylabel="GFLOP/s")
        _plain_numbers(axes)
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    _save(figure, path)


def write_growth(report: Report, path: Path) -> None:
    """Time per token over the number of tokens, a panel for each dtype and direction."""
    groups = list(dict.fromkeys((case.dtype, case.direction) for case in report.cases()))
    sizes = sorted({tokens_of(case.workload) for case in report.cases()})
    figure, panels = _panels(report, [", ".join(group) for group in groups])
    for group, axes in zip(groups, panels.values(), strict=True):
        for place, name in enumerate(report.columns()):
            points = [(tokens_of(case.workload), timing.spread) for case in report.cases()
                      if (case.dtype, case.direction) == group and (timing := report.timings(case).get(name))]
            spreads = [Spread(s.median / n, s.lower / n, s.upper / n) for n, s in points]
            _curve(axes, [n for n, _ in points], spreads, 1e6, color=f"C{place}", label=report.labels[name])
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="tokens", ylabel="microseconds a token")
        _plain_numbers(axes)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.legend(fontsize=7)
    _save(figure, path)


def write_threads(report: Report, path: Path) -> None:
    """Speedup over the number of threads, a panel for each workload."""
    workloads = list(dict.fromkeys(case.workload for case in report.cases()))
    figure, panels = _panels(report, workloads)
    names = [name.partition("@") for name in report.columns()]
    for workload, axes in panels.items():
        for place, case in enumerate(case for case in report.cases() if case.workload == workload):
            timings = report.timings(case)
            for candidate in dict.fromkeys(name for name, _, _ in names):
                counts = [int(count) for name, _, count in names if name == candidate]
                first = timings[f"{candidate}@{counts[0]}"]
                ratios = [first.ratio_to(timings[f"{candidate}@{count}"]) for count in counts]
                is_operator = candidate == OPERATOR
                _curve(axes, counts, ratios, 1.0, color=f"C{place}", ls="-" if is_operator else ":",
                       label=f"{case.dtype}, {case.direction}" if is_operator else None)
        counts = sorted({int(count) for _, _, count in names})
        axes.plot(counts, [count / counts[0] for count in counts], color="0.7", zorder=0)
        axes.set(xlabel="threads; dotted: one dense SDPA; grey: ideal", ylabel="times as fast", xticks=counts)
        axes.legend(fontsize=7)
    _save(figure, path)


def write_decode(report: Report, path: Path) -> None:
    """Time of a token by candidate, a panel for each dtype."""
    dtypes = list(dict.fromkeys(case.dtype for case in report.cases()))
    figure, panels = _panels(report, dtypes)
    for dtype, axes in panels.items():
        cases = [case for case in report.cases() if case.dtype == dtype]
        for place, name in enumerate(report.columns()):
            x = [row + (place - (len(report.columns()) - 1) / 2) * 0.12 for row in range(len(cases))]
            spreads = [report.timings(case)[name].spread for case in cases]
            _curve(axes, x, spreads, 1e6, color=f"C{place}", ls="", label=report.labels[name])
        axes.set_xticks(range(len(cases)), [case.workload for case in cases], fontsize=8)
        axes.set(yscale="log", ylabel="microseconds for one token of one layer", xlim=(-0.5, len(cases) - 0.5))
        _plain_numbers(axes)
    figure.legend(*next(iter(panels.values())).get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=7)
    _save(figure, path)
