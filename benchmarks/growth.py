"""Time per token over the size of the lattice, all sizes in the same rounds."""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import arguments, environment, plots
from .candidates import OPERATOR, PEERS, best_cpu_backend, operator
from .progress import Say, steps
from .report import Case, Measurement, Report, Skipped
from .suite import call, dtype_name, make_gate
from .tables import growth_grid
from .timing import time_side_by_side
from .workloads import WORKLOADS, Workload, cpu_inputs, smaller

SIDES = (32, 64, 128, 256)
BASES = ("field-4k", "text-4k")


def add_parser(commands) -> None:
    """The command ``growth``."""
    parser = commands.add_parser(
        "growth", help="time per token over the size of the lattice",
        description="Times the operator and one dense SDPA on square lattices of growing size, all of them in the same "
                    "rounds; writes a report (JSON) and a plot (PNG). Nothing is extrapolated.",
    )
    parser.add_argument("--workload", choices=BASES, default=BASES[0],
                        help="what is enlarged: its topology, heads and head dimension (default: %(default)s)")
    parser.add_argument("--sides", nargs="+", type=functools.partial(arguments.at_least, 2), default=list(SIDES),
                        metavar="N", help="sides of the lattices (default: 32 64 128 256)")
    arguments.add_dtypes(parser)
    arguments.add_directions(parser)
    arguments.add_seconds(parser, 60.0)
    arguments.add_longest_call(parser, "dense SDPA")
    arguments.add_output(parser, "growth")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    environment.restart_with_warm_memory()
    run(WORKLOADS[given.workload], sorted(set(given.sides)), arguments.dtypes(given.dtypes), given.directions,
        seconds=given.seconds, longest_call=given.longest_call, output=given.output, console=console)


class Growth:
    """Measures one workload at several sizes into a report.

    Args:
        base: the workload that is enlarged.
        sides: of its square lattices, ascending.
        seconds: how long the rounds of one dtype and direction go on.
        longest_call: seconds; sizes at which one dense SDPA would take longer are measured without it.
    """

    def __init__(
        self, base: Workload, sides: Sequence[int], backend: str, *, seconds: float, longest_call: float
    ) -> None:
        self.workloads = [smaller(base, side) for side in sides]
        self.operator, self.dense = operator(backend), PEERS["flash"]
        labels = {candidate.name: candidate.label for candidate in (self.operator, self.dense)}
        self.report = Report(environment.machine(), backend, labels=labels, kind="growth",
                             workloads={workload.name: workload.describe() for workload in self.workloads})
        self._seconds, self._longest_call = seconds, longest_call

    def measure(self, dtype: torch.dtype, direction: str, say: Say) -> None:
        """Checks the operator at every size, finds the sizes that dense SDPA can do, and times all side by side.

        Raises:
            WrongResult: the operator exceeds its error budget.
        """
        runs, seconds_before = {}, 0.0
        tokens_before = self.workloads[0].seq_len
        for workload in self.workloads:
            case = Case(workload.name, dtype_name(dtype), direction)
            inputs = cpu_inputs(workload, dtype)
            say(f"checking {workload.name}")
            make_gate(workload, inputs, direction).check(self.operator.label, self.operator.attention)
            gc.collect()
            runs[case, OPERATOR] = call(self.operator, inputs, direction)
            expected = seconds_before * (workload.seq_len / tokens_before) ** 2
            if expected > self._longest_call:
                self.report.skipped.append(Skipped(
                    case, self.dense.name, f"one call took {seconds_before:.1f} s with {tokens_before} tokens, "
                    f"and its cost is quadratic"
                ))
                continue
            say(f"trying {self.dense.label} on {workload.name}")
            runs[case, self.dense.name] = run = call(self.dense, inputs, direction)
            tokens_before, seconds_before = workload.seq_len, _seconds_of(run)
        say("warming up")
        timings = time_side_by_side(runs, seconds=self._seconds, on_round=lambda done: say(f"round {done}"))
        self.report.measurements += [Measurement(case, name, timing) for (case, name), timing in timings.items()]


def _seconds_of(run: Callable[[], object]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def run(
    base: Workload, sides: Sequence[int], dtypes: Sequence[torch.dtype], directions: Sequence[str], *, seconds: float,
    longest_call: float, output: Path, console: Console,
) -> Report:
    """Measures, prints the table and writes ``output`` and a plot beside it.

    Raises:
        WrongResult: the operator exceeds its error budget.
        OSError: a file cannot be written.
    """
    growth = Growth(base, sides, best_cpu_backend(), seconds=seconds, longest_call=longest_call)
    report = growth.report
    console.print(environment.describe(report.machine), highlight=False)
    with steps(console, len(dtypes) * len(directions)) as start:
        for dtype in dtypes:
            for direction in directions:
                growth.measure(dtype, direction, start(f"Timing {dtype_name(dtype)}, {direction}"))
    report.save(output)
    plots.write_growth(report, output.with_suffix(".png"))
    console.print(growth_grid(report).rich())
    for skipped in report.skipped:
        console.print(f"not timed: {skipped.candidate} on {skipped.case.workload} {skipped.case.dtype} "
                      f"{skipped.case.direction}: {skipped.reason}", highlight=False)
    console.print(f"Written: {output} and {output.with_suffix('.png')}", highlight=False)
    return report
