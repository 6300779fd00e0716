"""The CPU suite: all CPU-sized workloads, timed for the record."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import arguments, environment, plots
from .candidates import PEERS, best_cpu_backend, operator
from .memory import peak_memory
from .progress import steps
from .report import Memory, Report
from .suite import Suite
from .tables import roofline_grid, timing_tables
from .workloads import WORKLOADS

CPU_WORKLOADS = ("seed-512", "field-4k", "text-4k", "field-60x36", "field-90x180", "cylinder-4k")
DEFAULT_PEERS = ("compose", "compose_matmul", "compose_compiled", "flash")


def add_parser(commands) -> None:
    """The command ``cpu``."""
    parser = commands.add_parser(
        "cpu", help="time all CPU workloads for the record",
        description="Times all CPU workloads beside their peers, measures peak memory and what the machine "
                    "reaches; writes a report (JSON) and plots (PNG).",
    )
    arguments.add_choice(parser, "--workloads", CPU_WORKLOADS, CPU_WORKLOADS, "workloads to time")
    arguments.add_dtypes(parser)
    arguments.add_choice(parser, "--peers", PEERS, DEFAULT_PEERS,
                         "peers to time; dense is large, flex and compose_compiled compile long", may_be_none=True)
    arguments.add_seconds(parser, 20.0)
    arguments.add_longest_call(parser, "a peer")
    parser.add_argument("--no-memory", action="store_false", dest="memory", help="do not measure peak memory")
    arguments.add_output(parser, "cpu")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    environment.restart_with_warm_memory()
    run(given.workloads, arguments.dtypes(given.dtypes), given.peers, seconds=given.seconds,
        longest_call=given.longest_call, memory=given.memory, output=given.output, console=console)


def _measure_memory(report: Report, console: Console) -> None:
    """Of every candidate that needs no compiling: it would be compiled anew, for a minute in each process."""
    measured = [(case, candidate) for case in report.cases() for candidate in report.timings(case)
                if candidate not in PEERS or not PEERS[candidate].compiles]
    with steps(console, len(measured)) as start:
        for case, candidate in measured:
            start(f"Peak memory of {candidate}: {case.workload}, {case.dtype}, {case.direction}")
            try:
                report.memory.append(Memory(case, candidate, peak_memory(case, candidate, report.backend)))
            except OSError as error:
                warnings.warn(str(error), stacklevel=2)
                return


def roofline_plot(output: Path) -> Path:
    """Where the roofline of a report is drawn."""
    return output.with_name(f"{output.stem}-roofline.png")


def run(
    workloads: Sequence[str], dtypes: Sequence[torch.dtype], peers: Sequence[str], *, seconds: float,
    longest_call: float, memory: bool, output: Path, console: Console,
) -> Report:
    """Measures, prints the tables and writes ``output`` and plots beside it.

    Raises:
        WrongResult: the operator exceeds its error budget.
        OSError: a file cannot be written.
    """
    backend = best_cpu_backend()
    suite = Suite(backend, [operator(backend), *(PEERS[name] for name in PEERS if name in peers)], seconds=seconds,
                  with_roofline=True, longest_call=longest_call)
    console.print(environment.describe(suite.report.machine), highlight=False)
    report = suite.report
    try:
        suite.measure_all([WORKLOADS[name] for name in workloads], dtypes, console)
    finally:
        if report.measurements:
            report.save(output)  # what has been measured outlives an interruption
    if memory:
        _measure_memory(report, console)
        report.save(output)
    console.print(timing_tables(report))
    if report.roofline:
        console.print(roofline_grid(report).rich())
        plots.write_roofline(report, roofline_plot(output))
    if report.measurements:
        plots.write_timings(report, output.with_suffix(".png"))
    for case in report.cases() if report.memory else []:
        peaks = ", ".join(f"{m.candidate} {m.bytes / 2**20:.0f}" for m in report.memory if m.case == case)
        console.print(f"peak memory in MiB, {case.workload} {case.dtype} {case.direction}: {peaks}", highlight=False)
    for skipped in report.skipped:
        case = skipped.case
        console.print(f"not timed: {skipped.candidate} on {case.workload} {case.dtype} {case.direction}: "
                      f"{skipped.reason}", highlight=False)
    console.print(f"Written: {output} and the plots beside it", highlight=False)
    return report
