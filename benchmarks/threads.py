"""How time falls with the number of threads, all numbers in the same rounds."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import arguments, environment, plots
from .candidates import PEERS, best_cpu_backend, operator
from .cpu import CPU_WORKLOADS
from .progress import Say, steps
from .report import Case, Measurement, Report
from .suite import call, dtype_name, make_gate
from .tables import threads_grid
from .timing import time_side_by_side
from .workloads import WORKLOADS, Workload, cpu_inputs


def all_counts() -> list[int]:
    """1, 2, 4, ... and the number of threads that PyTorch uses by default."""
    most = torch.get_num_threads()
    return sorted({1 << shift for shift in range(most.bit_length()) if 1 << shift <= most} | {most})


def add_parser(commands) -> None:
    """The command ``threads``."""
    parser = commands.add_parser(
        "threads", help="how time falls with the number of threads",
        description="Times the operator and one dense SDPA with several numbers of threads, all of them in the same "
                    "rounds; writes a report (JSON) and a plot (PNG).",
    )
    arguments.add_choice(parser, "--workloads", CPU_WORKLOADS, ("field-4k", "text-4k"), "workloads to time")
    parser.add_argument("--threads", nargs="+", type=functools.partial(arguments.at_least, 1), default=all_counts(),
                        metavar="N", help="numbers of threads (default: %(default)s)")
    arguments.add_dtypes(parser)
    arguments.add_directions(parser)
    arguments.add_seconds(parser, 20.0)
    arguments.add_output(parser, "threads")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    environment.restart_with_warm_memory()
    run([WORKLOADS[name] for name in given.workloads], sorted(set(given.threads)), arguments.dtypes(given.dtypes),
        given.directions, seconds=given.seconds, output=given.output, console=console)


def with_threads(candidate: str, count: int) -> str:
    """The name under which a candidate with ``count`` threads is kept."""
    return f"{candidate}@{count}"


class ThreadScaling:
    """Measures workloads with several numbers of threads into a report.

    Args:
        counts: of threads, ascending.
        backend: of the operator.
        seconds: how long the rounds of one case go on.
    """

    def __init__(self, counts: Sequence[int], backend: str, *, seconds: float) -> None:
        self._counts, self._seconds = counts, seconds
        self._candidates = (operator(backend), PEERS["flash"])
        labels = {with_threads(candidate.name, count): f"{candidate.label}, {count} thread{'s' if count > 1 else ''}"
                  for candidate in self._candidates for count in counts}
        self.report = Report(environment.machine(), backend, labels=labels, kind="threads")

    def measure(self, workload: Workload, dtype: torch.dtype, direction: str, say: Say) -> None:
        """Checks the operator with every number of threads and times all side by side.

        Raises:
            WrongResult: the operator exceeds its error budget.
        """
        case = Case(workload.name, dtype_name(dtype), direction)
        self.report.workloads[workload.name] = workload.describe()
        inputs = cpu_inputs(workload, dtype)
        runs, counts = {}, {}
        before = torch.get_num_threads()
        try:
            say("float64 truth")
            gate = make_gate(workload, inputs, direction)
            for count in self._counts:
                torch.set_num_threads(count)
                say(f"checking {count} threads")
                gate.check(self._candidates[0].label, self._candidates[0].attention)
                for candidate in self._candidates:
                    name = with_threads(candidate.name, count)
                    runs[name], counts[name] = call(candidate, inputs, direction), count
            def prepare(name: str) -> None:
                if torch.get_num_threads() != counts[name]:
                    torch.set_num_threads(counts[name])
                    runs[name]()  # a change of the number makes the next call start or stop threads

            say("warming up")
            timings = time_side_by_side(runs, seconds=self._seconds, prepare=prepare,
                                          on_round=lambda done: say(f"round {done}"))
        finally:
            torch.set_num_threads(before)
        self.report.measurements += [Measurement(case, name, timing) for name, timing in timings.items()]


def run(
    workloads: Sequence[Workload], counts: Sequence[int], dtypes: Sequence[torch.dtype], directions: Sequence[str], *,
    seconds: float, output: Path, console: Console,
) -> Report:
    """Measures, prints the table and writes ``output`` and a plot beside it.

    Raises:
        WrongResult: the operator exceeds its error budget.
        OSError: a file cannot be written.
    """
    scaling = ThreadScaling(counts, best_cpu_backend(), seconds=seconds)
    report = scaling.report
    console.print(environment.describe(report.machine), highlight=False)
    cases = [(workload, dtype, direction) for workload in workloads for dtype in dtypes for direction in directions]
    with steps(console, len(cases)) as start:
        for workload, dtype, direction in cases:
            scaling.measure(workload, dtype, direction,
                            start(f"Timing {workload.name}, {dtype_name(dtype)}, {direction}"))
    report.save(output)
    plots.write_threads(report, output.with_suffix(".png"))
    console.print(threads_grid(report).rich())
    console.print(f"Written: {output} and {output.with_suffix('.png')}", highlight=False)
    return report
