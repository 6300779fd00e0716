"""Results: kept as JSON, shown as tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from . import environment
from .accuracy import Check
from .candidates import OPERATOR, PEERS
from .timing import Spread, Timing

FORMAT = 1


class ReportError(ValueError):
    """A file does not hold a report; the message says why."""


@dataclass(frozen=True)
class Case:
    """What is computed: a workload in a dtype, forward or forward and backward."""

    workload: str
    dtype: str
    direction: str


@dataclass(frozen=True)
class Measurement:
    """A candidate's times on a case; round r of all candidates of a case was measured at the same moment."""

    case: Case
    candidate: str
    timing: Timing


@dataclass(frozen=True)
class Accuracy:
    """The worst of a candidate's results on a case: the one whose error takes most of its budget."""

    case: Case
    candidate: str
    check: Check


@dataclass(frozen=True)
class Memory:
    """Bytes that one call of a candidate adds to the process at its peak, in a process of its own."""

    case: Case
    candidate: str
    bytes: int


@dataclass(frozen=True)
class Skipped:
    """A candidate that was not timed on a case, and why."""

    case: Case
    candidate: str
    reason: str


@dataclass
class Report:
    """One session of measurements on one machine."""

    machine: dict[str, Any]
    backend: str
    workloads: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def cases(self) -> list[Case]:
        """The cases measured, in order."""
        return list(dict.fromkeys(m.case for m in self.measurements))

    def timings(self, case: Case) -> dict[str, Timing]:
        """The timings of a case by candidate."""
        return {m.candidate: m.timing for m in self.measurements if m.case == case}

    def ratio(self, case: Case, candidate: str) -> Spread:
        """How many times as long as the operator the candidate takes: quartiles of the ratios of every round."""
        timings = self.timings(case)
        return timings[candidate].ratio_to(timings[OPERATOR])

    def peak(self, case: Case, candidate: str) -> int | None:
        """Bytes at the peak of one call, None where not measured."""
        return next((m.bytes for m in self.memory if (m.case, m.candidate) == (case, candidate)), None)

    def save(self, path: Path) -> None:
        """Writes JSON, numbers rounded to what a clock can tell."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"format": FORMAT} | dataclasses.asdict(self)
        for measurement in fields["measurements"]:
            timing = measurement["timing"]
            timing["seconds"] = [float(f"{s:.5g}") for s in timing["seconds"]]
        path.write_text(_compact(fields) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """The report that `save` wrote.

        Raises:
            ReportError: the file does not hold one.
            OSError: the file cannot be read.
        """
        try:
            fields = json.loads(path.read_text())
            if fields["format"] != FORMAT:
                raise ReportError(f"{path} has format {fields['format']}, this version reads {FORMAT}")

            def case(entry: dict[str, Any]) -> Case:
                return Case(**entry.pop("case"))

            return cls(
                fields["machine"], fields["backend"], fields["workloads"],
                [Measurement(case(m), m["candidate"], Timing(tuple(m["timing"]["seconds"]),
                                                             m["timing"]["page_faults"]))
                 for m in fields["measurements"]],
                [Accuracy(case(a), a["candidate"], Check(**a["check"])) for a in fields["accuracy"]],
                [Memory(case(m), **m) for m in fields["memory"]],
                [Skipped(case(s), **s) for s in fields["skipped"]],
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ReportError(f"{path} does not hold a benchmark report: {error!r}") from error


def _compact(fields: dict[str, Any]) -> str:
    """JSON with one entry of a list to the line, so that files stay short and differences readable."""
    parts = []
    for name, value in fields.items():
        if isinstance(value, list) and value:
            lines = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def label(candidate: str, backend: str) -> str:
    """What a candidate is called in tables and plots."""
    return f"{OPERATOR} ({backend})" if candidate == OPERATOR else PEERS[candidate].label


def columns(report: Report) -> list[str]:
    """The candidates measured anywhere in the report: the operator, then its peers in their usual order."""
    measured = {m.candidate for m in report.measurements}
    return [name for name in (OPERATOR, *PEERS) if name in measured]


def milliseconds(seconds: float) -> str:
    """To three digits, without the unit."""
    return f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def factor(ratio: float) -> str:
    """A ratio as tables show it."""
    return f"{ratio:.{1 if ratio < 20 else 0}f}x"


def timing_tables(report: Report) -> Group:
    """A table for each case: milliseconds, and how many times as long as the operator, as median and quartiles."""
    tables = []
    for case in report.cases():
        table = Table(title=f"{case.workload}, {case.dtype}, {case.direction}", box=box.SIMPLE_HEAD,
                      title_justify="left", padding=(0, 1))
        for header, width in (("", 26), ("ms", 5), ("quartiles", 13), ("ratio", 5), ("quartiles", 13)):
            table.add_column(header, justify="right" if header else "left", min_width=width)
        timings = report.timings(case)
        for name in (name for name in columns(report) if name in timings):
            spread = timings[name].spread
            cells = [label(name, report.backend), milliseconds(spread.median),
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
            yield f"{milliseconds(timings[name].spread.median)} ms ({factor(report.ratio(case, name).median)})"


def markdown_table(report: Report) -> str:
    """The table of the README: medians, and in parentheses the median ratio to the operator."""
    names = columns(report)
    head = ["workload", "dtype", "direction", *(label(name, report.backend) for name in names)]
    with_memory = any(m.candidate == OPERATOR for m in report.memory)
    lines = ["| " + " | ".join([*head, *(["peak memory"] if with_memory else [])]) + " |"]
    lines.append("|" + " --- |" * 3 + " ---: |" * (len(names) + with_memory))
    for case in report.cases():
        cells = [case.workload, case.dtype, case.direction, *_cells(report, case, names)]
        if with_memory:
            peak = report.peak(case, OPERATOR)
            cells.append("-" if peak is None else f"{peak / 2**20:.0f} MiB")
        lines.append("| " + " | ".join(cells) + " |")
    sizes = "; ".join(f"`{name}`: {sizes}" for name, sizes in report.workloads.items())
    note = (f"Medians of rounds that run every column once; in parentheses how many times as long as "
            f"`{OPERATOR}`. {sizes}. {environment.describe(report.machine)}.")
    return "\n".join([*lines, "", note])
