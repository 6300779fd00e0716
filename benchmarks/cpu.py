"""The CPU suite: all CPU-sized workloads, timed for the record."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import environment, plots
from .candidates import PEERS, best_cpu_backend, operator
from .memory import peak_memory
from .report import Memory, Report, timing_tables
from .suite import Suite
from .workloads import WORKLOADS

CPU_WORKLOADS = ("seed-512", "field-4k", "text-4k", "field-60x36", "field-90x180")
DEFAULT_PEERS = ("compose", "compose_matmul", "flash")
RESULTS = Path(__file__).resolve().parent / "results"


def default_output() -> Path:
    """``results/cpu-<today>.json`` beside this file."""
    return RESULTS / f"cpu-{datetime.date.today().isoformat()}.json"


def _measure_memory(report: Report) -> None:
    for case in report.cases():
        for candidate in report.timings(case):
            try:
                report.memory.append(Memory(case, candidate, peak_memory(case, candidate, report.backend)))
            except OSError as error:
                warnings.warn(str(error), stacklevel=2)
                return


def run(
    workloads: Sequence[str], dtypes: Sequence[torch.dtype], peers: Sequence[str], *, seconds: float, memory: bool,
    output: Path, console: Console,
) -> Report:
    """Measures, prints the table and writes ``output`` and a plot beside it.

    Raises:
        WrongResult: the operator exceeds its error budget.
        OSError: a file cannot be written.
    """
    backend = best_cpu_backend()
    suite = Suite(backend, [operator(backend), *(PEERS[name] for name in peers)], seconds=seconds)
    console.print(environment.describe(suite.report.machine))
    report = suite.measure_all([WORKLOADS[name] for name in workloads], dtypes, console)
    if memory:
        console.print("Measuring peak memory, each call in a process of its own.")
        _measure_memory(report)
    report.save(output)
    plots.write_timings(report, output.with_suffix(".png"))
    console.print(timing_tables(report))
    for case in report.cases() if report.memory else []:
        peaks = ", ".join(f"{m.candidate} {m.bytes / 2**20:.0f}" for m in report.memory if m.case == case)
        console.print(f"peak memory in MiB, {case.workload} {case.dtype} {case.direction}: {peaks}")
    for skipped in report.skipped:
        case = skipped.case
        console.print(f"not timed: {skipped.candidate} on {case.workload} {case.dtype} {case.direction}: "
                      f"{skipped.reason}")
    console.print(f"Written: {output} and {output.with_suffix('.png')}")
    return report

