"""Reports as tables: on the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table

from . import environment
from .candidates import OPERATOR
from .report import Case, Report, Roofline
from .timing import Spread, Timing


def milliseconds(seconds: float) -> str:
    """To three digits, without the unit."""
    return f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def factor(ratio: float) -> str:
    """A ratio as tables show it."""
    return f"{ratio:.{1 if ratio < 20 else 0}f}x"


@dataclass(frozen=True)
class Grid:
    """A table of text whose first ``left`` columns are aligned to the left and all others to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int

    def markdown(self) -> str:
        """Without the title."""
        rule = "|" + " --- |" * self.left + " ---: |" * (len(self.head) - self.left)
        return "\n".join(["| " + " | ".join(self.head) + " |", rule, *("| " + " | ".join(r) + " |" for r in self.rows)])

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
        for place, name in enumerate(self.head):
            table.add_column(name, justify="left" if place < self.left else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def timing_tables(report: Report) -> Group:
    """A table for each case: milliseconds, and how many times as long as the operator, as median and quartiles."""
    tables = []
    for case in report.cases():
        table = Table(title=f"{case.workload}, {case.dtype}, {case.direction}", box=box.SIMPLE_HEAD,
                      title_justify="left", padding=(0, 1))
        for header, width in (("", 26), ("ms", 5), ("quartiles", 13), ("ratio", 5), ("quartiles", 13)):
            table.add_column(header, justify="right" if header else "left", min_width=width)
        timings = report.timings(case)
        for name in (name for name in report.columns() if name in timings):
            spread = timings[name].spread
            cells = [report.labels[name], milliseconds(spread.median),
                     f"{milliseconds(spread.lower)} - {milliseconds(spread.upper)}"]
            if name != OPERATOR:
                ratio = report.ratio(case, name)
                cells += [factor(ratio.median), f"{factor(ratio.lower)} - {factor(ratio.upper)}"]
            table.add_row(*cells)
        tables.append(table)
    return Group(*tables)


def _cells(report: Report, case: Case, names: list[str]) -> Iterator[str]:
    timings = report.timings(case)
    for name in names:
        if name not in timings:
            yield "-"
        elif name == OPERATOR:
            yield f"{milliseconds(timings[name].spread.median)} ms"
        else:
            ratio = report.ratio(case, name)
            low, high = (factor(bound).removesuffix("x") for bound in (ratio.lower, ratio.upper))
            yield f"{milliseconds(timings[name].spread.median)} ms ({factor(ratio.median)}, {low}-{high})"


def workload_sizes(report: Report) -> str:
    """The sizes of all workloads in one sentence."""
    return "; ".join(f"`{name}`: {sizes}" for name, sizes in report.workloads.items())


def _measured(report: Report) -> str:
    """The sizes of all workloads and the machine, as the last sentences of a note."""
    sizes = "; ".join(f"`{name}`: {sizes}" for name, sizes in report.workloads.items())
    return f"{sizes}. {environment.describe(report.machine)}."


def markdown_table(report: Report) -> str:
    """The table of the README: medians, and in parentheses the ratio to the operator with its quartiles."""
    names = report.columns()
    with_memory = any(m.candidate == OPERATOR for m in report.memory)
    head = ["workload", "dtype", "direction", *(report.labels[name] for name in names)]
    rows = []
    for case in report.cases():
        row = [case.workload, case.dtype, case.direction, *_cells(report, case, names)]
        if with_memory:
            peak = report.peak(case, OPERATOR)
            row.append("-" if peak is None else f"{peak / 2**20:.0f} MiB")
        rows.append(row)
    grid = Grid("", [*head, *(["peak memory"] if with_memory else [])], rows, left=3)
    note = (f"Medians of rounds that run every column once; in parentheses how many times as long as "
            f"`{OPERATOR}` in the same round, median and quartiles. {_measured(report)}")
    return f"{grid.markdown()}\n\n{note}"


def roof(line: Roofline) -> float:
    """FLOP/s that the machine allows at the line's intensity: bound by the matrix product, or by the copy."""
    return min(line.gemm, line.copy * line.flops / line.bytes)


def roofline_grid(report: Report) -> Grid:
    """A row for each case: what the operator reaches, and which part of what the machine does."""
    rows = []
    for line in report.roofline:
        seconds = report.timings(line.case)[OPERATOR].spread.median
        flops, moved = line.flops / seconds, line.bytes / seconds
        rows.append([
            line.case.workload, line.case.dtype, line.case.direction,
            f"{flops / 1e9:.0f}", f"{flops / line.gemm:.0%} of {line.gemm / 1e9:.0f}",
            f"{moved / 1e9:.2f}", f"{moved / line.copy:.0%} of {line.copy / 1e9:.1f}", f"{flops / roof(line):.0%}",
        ])
    head = ["workload", "dtype", "direction", "GFLOP/s", "of GEMM", "GB/s", "of copy", "of the roofline"]
    return Grid(f"{report.labels[OPERATOR]} against the machine", head, rows, left=3)


def markdown_roofline(report: Report) -> str:
    """The roofline of every case in Markdown, with what is counted."""
    note = ("Counted are the floating-point operations of the matrix products over visible pairs (two products "
            "forward, five more backward; a pair that both arcs of a loop or both cross flows see, once) and the "
            "bytes of the tokens read and written. GEMM: the best `torch.mm` in the dtype or, where that is faster, in "
            "float32; copy: bytes read and written by copying 256 MiB; both in the same run, with the same threads.")
    return f"{roofline_grid(report).markdown()}\n\n{note}"


def three_digits(x: float) -> str:
    """At least three significant digits, never an exponent."""
    decimals = 2 - math.floor(math.log10(x)) if x > 0 else 0
    return f"{x:.{max(0, decimals)}f}"


def _spread(spread: Spread, scale: float) -> str:
    median, lower, upper = (three_digits(x * scale) for x in (spread.median, spread.lower, spread.upper))
    return f"{median} ({lower} - {upper})"


def growth_grid(report: Report) -> Grid:
    """Microseconds per token, and how much more a token costs than on the lattice before it."""
    head = ["dtype", "direction", "lattice"]
    for name in report.columns():
        head += [f"{report.labels[name]}, us a token", "growth"]
    rows, before = [], {}
    # Reports hold the sizes of a dtype and direction one after the other.
    for case in report.cases():
        row = [case.dtype, case.direction, case.workload]
        tokens = tokens_of(case.workload)
        for name in report.columns():
            timing = report.timings(case).get(name)
            if timing is None:
                row += ["-", "-"]
                continue
            per_token = Timing(tuple(s / tokens for s in timing.seconds), 0.0)
            key = (case.dtype, case.direction, name)
            row += [_spread(per_token.spread, 1e6),
                    f"{per_token.ratio_to(before[key]).median:.2f}x" if key in before else "-"]
            before[key] = per_token
        rows.append(row)
    return Grid("Time per token (median, quartiles) and its growth from one lattice to the next", head, rows, left=3)


def tokens_of(workload: str) -> int:
    """T of a workload that `benchmarks.workloads.smaller` named."""
    return int(workload.rpartition("-")[2])


def threads_grid(report: Report) -> Grid:
    """Milliseconds with every number of threads, and how many times as fast as with the smallest number."""
    rows = []
    for case in report.cases():
        timings = report.timings(case)
        for name in report.columns():
            first = next(other for other in report.columns() if other.partition("@")[0] == name.partition("@")[0])
            speedup = "-" if name == first else _spread(timings[first].ratio_to(timings[name]), 1.0)
            rows.append([case.workload, case.dtype, case.direction, report.labels[name],
                         _spread(timings[name].spread, 1e3), speedup])
    head = ["workload", "dtype", "direction", "", "ms", "speedup"]
    return Grid("Threads: median and quartiles", head, rows, left=4)


def decode_grid(report: Report) -> Grid:
    """Microseconds of a token, and how many times as long as the operator's after N tokens."""
    rows = []
    for case in report.cases():
        timings = report.timings(case)
        for name in (name for name in report.columns() if name in timings):
            rows.append([case.workload, case.dtype, report.labels[name], _spread(timings[name].spread, 1e6),
                         "-" if name == OPERATOR else _spread(report.ratio(case, name), 1.0)])
    head = ["window", "dtype", "", "us", "ratio"]
    return Grid("One token of one layer: median and quartiles", head, rows, left=3)


def compare_grid(report: Report, other: str) -> Grid:
    """Milliseconds of this tree and of the candidate ``other``, and the ratio of the first to the second."""
    rows = []
    for case in report.cases():
        timings = report.timings(case)
        rows.append([case.workload, case.dtype, case.direction, *(
            _spread(timings[name].spread, 1e3) for name in (OPERATOR, other)
        ), _spread(timings[OPERATOR].ratio_to(timings[other]), 1.0)])
    head = ["workload", "dtype", "direction", *(f"{report.labels[name]}, ms" for name in (OPERATOR, other)), "ratio"]
    return Grid(f"{report.labels[OPERATOR]} and {report.labels[other]}: median and quartiles", head, rows, left=3)


def markdown_report(report: Report) -> str:
    """A report of any kind in Markdown."""
    if report.kind == "cpu":
        return "\n\n".join([markdown_table(report), *([markdown_roofline(report)] if report.roofline else [])])
    grid = {
        "growth": growth_grid, "threads": threads_grid, "decode": decode_grid,
        "compare": lambda report: compare_grid(report, report.columns()[-1]),
    }[report.kind](report)
    return f"{grid.markdown()}\n\n{grid.title}. {_measured(report)}"
