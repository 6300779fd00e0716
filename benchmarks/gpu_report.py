"""Results of the GPU suite: kept as JSON, shown as a table and as a plot."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from .accuracy import Check
from .candidates import BOTH, OPERATOR
from .gpu_peers import CUDNN, FLASH
from .gpu_timing import GpuTiming
from .report import Case, ReportError, Skipped, compact
from .roofline import visible_pairs
from .tables import Grid, factor, milliseconds
from .timing import Spread
from .workloads import Workload

KIND, FORMAT = "gpu", 1

DENSE_CACHE = "dense_cache"
"""Decoding over a cache of all tokens, the dense attention of `benchmarks.gpu_decode`."""


@dataclass(frozen=True)
class Machine:
    """The GPU, and what it reaches in the same run.

    Attributes:
        copy: bytes/s read and written by copying a large tensor.
        gemm: FLOP/s of a large bfloat16 matrix product.
        multiprocessors, clock: number and Hz, for what depends on them alone.
    """

    device: str
    copy: float
    gemm: float
    multiprocessors: int
    clock: float
    torch: str
    triton: str
    cuda: str
    revision: str | None
    date: str

    def describe(self) -> str:
        """In one line."""
        return (f"{self.device}, copy {self.copy / 1e12:.1f} TB/s, matrix product {self.gemm / 1e12:.0f} TFLOP/s "
                f"(bfloat16), torch {self.torch}, triton {self.triton}, CUDA {self.cuda}, revision {self.revision}, "
                f"{self.date[:10]}")


@dataclass(frozen=True)
class Work:
    """What one call has to do at least.

    Attributes:
        bytes: tokens read and written once.
        flops: of the matrix products.
        pairs: of a query and a key that it sees, in all heads; each costs an exponential and instructions.
        instructions: issued for each pair, by code that is as good as can be hoped for.
    """

    bytes: int
    flops: int
    pairs: int
    instructions: int

    @classmethod
    def of(cls, workload: Workload, itemsize: int, direction: str) -> Work:
        """Forward: q, k, v and the state in, out; two products. Backward: those and d_out in, four gradients out; five
        products; 2.5 times the instructions."""
        rows = workload.batch * workload.heads
        pairs = rows * visible_pairs(workload.lattice, workload.seq_len)
        tensors, products, instructions = (5 + 9, 2 + 5, 10 + 25) if direction == BOTH else (5, 2, 10)
        tokens = rows * workload.seq_len * workload.head_dim
        return cls(tensors * tokens * itemsize, products * 2 * workload.head_dim * pairs, pairs, instructions)

    def floor(self, machine: Machine) -> float:
        """Seconds below which no code can be: the longest of memory, products, exponentials (16 a clock and
        multiprocessor) and instructions (4 warps of 32)."""
        cycles = machine.multiprocessors * machine.clock
        return max(self.bytes / machine.copy, self.flops / machine.gemm, self.pairs / (16 * cycles),
                   self.instructions * self.pairs / (128 * cycles))


@dataclass(frozen=True)
class Measured:
    """A candidate's times on a case."""

    case: Case
    candidate: str
    timing: GpuTiming


@dataclass(frozen=True)
class Judged:
    """The worst of a candidate's results on a case."""

    case: Case
    candidate: str
    check: Check


@dataclass
class GpuReport:
    """One session of measurements on one GPU."""

    machine: Machine
    labels: dict[str, str]
    sizes: dict[str, str] = field(default_factory=dict)
    work: list[tuple[Case, Work]] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def cases(self) -> list[Case]:
        """The cases measured, in order."""
        return list(dict.fromkeys(m.case for m in self.measured))

    def timings(self, case: Case) -> dict[str, GpuTiming]:
        """The timings of a case by candidate."""
        return {m.candidate: m.timing for m in self.measured if m.case == case}

    def work_of(self, case: Case) -> Work:
        """What a call of the case has to do."""
        return next(work for of, work in self.work if of == case)

    def fastest_dense(self, case: Case) -> float | None:
        """Median seconds of the faster of the dense attentions, None where there is none."""
        timings, dense = self.timings(case), (FLASH, CUDNN, DENSE_CACHE)
        return min((timings[name].spread.median for name in dense if name in timings), default=None)

    def save(self, path: Path) -> None:
        """Writes JSON, times rounded to what an event can tell."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"kind": KIND, "format": FORMAT} | dataclasses.asdict(self)
        for entry in fields["measured"]:
            entry["timing"]["seconds"] = [float(f"{s:.5g}") for s in entry["timing"]["seconds"]]
        path.write_text(compact(fields) + "\n")

    @classmethod
    def load(cls, path: Path) -> GpuReport:
        """The report that `save` wrote.

        Raises:
            ReportError: the file does not hold one.
            OSError: the file cannot be read.
        """
        try:
            fields = json.loads(path.read_text())
            if (fields["kind"], fields["format"]) != (KIND, FORMAT):
                raise ReportError(f"{path} is not a GPU report of format {FORMAT}")
            return cls(
                Machine(**fields["machine"]), fields["labels"], fields["sizes"],
                [(Case(**case), Work(**work)) for case, work in fields["work"]],
                [Measured(Case(**m["case"]), m["candidate"],
                          GpuTiming(**m["timing"] | {"seconds": tuple(m["timing"]["seconds"])}))
                 for m in fields["measured"]],
                [Judged(Case(**j["case"]), j["candidate"], Check(**j["check"])) for j in fields["judged"]],
                [Skipped(Case(**s["case"]), s["candidate"], s["reason"]) for s in fields["skipped"]],
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ReportError):
                raise
            raise ReportError(f"{path} does not hold a benchmark report: {error!r}") from error


def _spread(spread: Spread) -> str:
    return f"{milliseconds(spread.median)} ({milliseconds(spread.lower)}-{milliseconds(spread.upper)})"


def grid(report: GpuReport) -> Grid:
    """A row for each case: the operator's time, rates, memory, and every peer as a multiple of it."""
    peers = [name for name in report.labels if name != OPERATOR and any(m.candidate == name for m in report.measured)]
    head = ["workload", "dtype", "direction", "ms (quartiles)", "of dense", "TFLOP/s", "GB/s", "of floor", "host µs",
            "MiB", *(report.labels[name] for name in peers)]
    rows = []
    for case in report.cases():
        timings, work = report.timings(case), report.work_of(case)
        if OPERATOR not in timings:
            continue
        ours, dense = timings[OPERATOR], report.fastest_dense(case)
        median = ours.spread.median
        rows.append([
            case.workload, case.dtype, case.direction, _spread(ours.spread) + (" graph" if ours.from_graph else ""),
            "-" if dense is None else f"{median / dense:.3f}", f"{work.flops / median / 1e12:.1f}",
            f"{work.bytes / median / 1e9:.0f}", f"{100 * work.floor(report.machine) / median:.0f}%",
            f"{ours.host_seconds * 1e6:.0f}", f"{ours.peak_bytes / 2**20:.0f}",
            *(f"{milliseconds(timings[name].spread.median)} ({factor(timings[name].spread.median / median)})"
              if name in timings else "-" for name in peers),
        ])
    return Grid(f"{report.labels[OPERATOR]} on {report.machine.device}", head, rows, left=3)


def markdown(report: GpuReport) -> str:
    """The table of the README, and how it was measured."""
    sizes = "; ".join(f"`{name}`: {text}" for name, text in report.sizes.items())
    return (f"{grid(report).markdown()}\n\nMedian and quartiles of calls on the device with a cold L2 cache; *graph*: "
            "replayed from a CUDA graph. *of dense*: of the faster dense attention. *of floor*: the longest of memory, "
            "products, exponentials and instructions, as a share of the time. *host*: to launch one eager call. In "
            f"parentheses how many times as long as the operator. {sizes}. {report.machine.describe()}.")


def plot(report: GpuReport, path: Path) -> None:
    """Median times with quartiles on a logarithmic axis, and the floors, as a PNG."""
    cases = report.cases()
    names = [name for name in report.labels if any(m.candidate == name for m in report.measured)]
    figure = Figure(figsize=(9, 2 + 0.22 * (len(names) + 1) * len(cases)), layout="constrained")
    axes, step = figure.subplots(), 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        for row, case in enumerate(cases):
            if (timing := report.timings(case).get(name)) is None:
                continue
            spread, y = timing.spread, row + (place - (len(names) - 1) / 2) * step
            error = [[1e3 * (spread.median - spread.lower)], [1e3 * (spread.upper - spread.median)]]
            axes.errorbar(spread.median * 1e3, y, xerr=error, fmt="o", ms=5, capsize=2, color=f"C{place}")
            axes.annotate(milliseconds(spread.median), (spread.upper * 1e3, y), (5, 0), textcoords="offset points",
                          va="center", fontsize=7)
        axes.plot([], [], "o", color=f"C{place}", label=report.labels[name])
    for row, case in enumerate(cases):
        floor = report.work_of(case).floor(report.machine) * 1e3
        axes.plot([floor, floor], [row - 0.45, row + 0.45], color="0.4", ls=":", label="floor" if row == 0 else None)
    axes.set_yticks(range(len(cases)), [f"{c.workload}, {c.dtype}\n{c.direction}" for c in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds: median and quartiles")
    axes.set_title(report.machine.describe(), fontsize=7, wrap=True)
    axes.grid(axis="x", which="both", alpha=0.2)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
