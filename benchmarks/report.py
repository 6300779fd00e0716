"""Results, kept as JSON; `benchmarks.tables` and `benchmarks.plots` show them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .accuracy import Check
from .candidates import OPERATOR, PEERS
from .timing import Spread, Timing

FORMAT = 1

KINDS = ("cpu", "growth", "threads", "decode", "compare")
"""The commands that write reports."""


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
class Roofline:
    """The useful work of one call of the operator on a case, and what the machine reached in the same run.

    Attributes:
        flops: floating-point operations of one call.
        bytes: bytes that one call has to read and write.
        gemm: FLOP/s of a matrix product in the case's dtype.
        copy: bytes/s read and written by copying a large tensor.
    """

    case: Case
    flops: int
    bytes: int
    gemm: float
    copy: float


@dataclass(frozen=True)
class Skipped:
    """A candidate that was not timed on a case, and why."""

    case: Case
    candidate: str
    reason: str


@dataclass
class Report:
    """One session of measurements on one machine.

    Attributes:
        machine: `benchmarks.environment.machine`.
        backend: of the operator.
        workloads: sizes of each workload, as tables show them.
        labels: what tables call the candidates, in the order in which they show them.
        kind: the command that wrote it, of `KINDS`.
    """

    machine: dict[str, Any]
    backend: str
    workloads: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    roofline: list[Roofline] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    kind: str = "cpu"

    def cases(self) -> list[Case]:
        """The cases measured, in order."""
        return list(dict.fromkeys(m.case for m in self.measurements))

    def timings(self, case: Case) -> dict[str, Timing]:
        """The timings of a case by candidate."""
        return {m.candidate: m.timing for m in self.measurements if m.case == case}

    def columns(self) -> list[str]:
        """The candidates measured anywhere, in the order of their labels."""
        measured = {m.candidate for m in self.measurements}
        return [name for name in self.labels if name in measured]

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
        for entry in fields["roofline"]:
            entry |= {name: float(f"{entry[name]:.4g}") for name in ("gemm", "copy")}
        path.write_text(compact(fields) + "\n")

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

            if (kind := fields.get("kind", "cpu")) not in KINDS:
                raise ReportError(f"{path} holds a report of kind {kind!r}, this version reads {', '.join(KINDS)}")

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
                [Roofline(case(r), **r) for r in fields.get("roofline", [])],
                fields.get("labels") or default_labels(fields["backend"]), kind,
            )
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ReportError(f"{path} does not hold a benchmark report: {error!r}") from error


@contextlib.contextmanager
def reading(path: Path, kind: str, version: int) -> Iterator[dict[str, Any]]:
    """Yields the fields of a report in JSON, without its kind and format.

    Raises:
        ReportError: the file holds no such report, or the body finds a field missing or wrong.
        OSError: the file cannot be read.
    """
    try:
        fields = json.loads(path.read_text())
        if (fields.pop("kind"), fields.pop("format")) != (kind, version):
            raise ReportError(f"{path} is not a report of {kind} of format {version}")
        yield fields
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ReportError(f"{path} does not hold a report of {kind}: {error!r}") from error


def compact(fields: dict[str, Any]) -> str:
    """JSON with one entry of a list to the line, so that files stay short and differences readable."""
    parts = []
    for name, value in fields.items():
        if isinstance(value, list) and value:
            lines = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def default_labels(backend: str) -> dict[str, str]:
    """Labels of the operator on a backend and of all its peers, in their usual order."""
    return {OPERATOR: f"{OPERATOR} ({backend})"} | {name: peer.label for name, peer in PEERS.items()}
