"""Measuring workloads: every candidate is checked, then all are timed side by side."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import environment, peers
from .accuracy import FACTOR, PEER_FACTOR, Gate, WrongResult
from .candidates import BOTH, DIRECTIONS, OPERATOR, Candidate, free_memory
from .report import Accuracy, Case, Measurement, Report, Skipped
from .timing import time_side_by_side
from .workloads import Workload, cpu_inputs


def _why_not(candidate: Candidate, workload: Workload, dtype: torch.dtype, direction: str) -> str | None:
    if direction not in candidate.directions:
        return f"{candidate.label} has no {direction} on this device"
    needed, free = candidate.memory(workload, dtype, direction), free_memory()
    if needed > free:
        return f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    return None


class Suite:
    """Measures cases into a report.

    Args:
        backend: of the operator.
        candidates: the operator and its peers, in any order.
        seconds: how long the rounds of one case go on.
        min_rounds, max_rounds: as in `time_side_by_side`.
    """

    def __init__(
        self, backend: str, candidates: Sequence[Candidate], *, seconds: float, min_rounds: int = 5,
        max_rounds: int = 50,
    ) -> None:
        self.report = Report(environment.machine(), backend)
        self._candidates = candidates
        self._limits = {"seconds": seconds, "min_rounds": min_rounds, "max_rounds": max_rounds}

    def measure(
        self, workload: Workload, dtype: torch.dtype, direction: str, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Checks and times every candidate that can do this case; ``say`` is told what is going on.

        The truth is `compose` in float64, which is within reach at this size and which tests hold against the
        reference.

        Raises:
            WrongResult: the operator exceeds its error budget. A peer that does is skipped.
        """
        case = Case(workload.name, str(dtype).removeprefix("torch."), direction)
        self.report.workloads[workload.name] = workload.describe()
        inputs = cpu_inputs(workload, dtype)
        say("float64 truth")
        gate = Gate(inputs, peers.compose, backward=direction == BOTH)
        admitted: dict[str, Candidate] = {}
        for candidate in self._candidates:
            reason = _why_not(candidate, workload, dtype, direction)
            if reason is None and candidate.computes_operator:
                say(f"checking {candidate.label}")
                reason = self._refused(gate, candidate, case)
            if reason is None:
                admitted[candidate.name] = candidate
            else:
                self.report.skipped.append(Skipped(case, candidate.name, reason))
        del gate
        gc.collect()

        def call(candidate: Candidate) -> Callable[[], object]:
            run = inputs.forward_backward if direction == BOTH else inputs.forward
            return lambda: run(candidate.attention)

        say("warming up")
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            say(f"round {done}")

        timings = time_side_by_side(
            {name: call(candidate) for name, candidate in admitted.items()}, on_round=count, **self._limits
        )
        self.report.measurements += [Measurement(case, name, timing) for name, timing in timings.items()]

    def _refused(self, gate: Gate, candidate: Candidate, case: Case) -> str | None:
        is_operator = candidate.name == OPERATOR
        try:
            found = gate.check(candidate.label, candidate.attention, factor=FACTOR if is_operator else PEER_FACTOR)
        except WrongResult as error:
            if is_operator:
                raise
            warnings.warn(str(error), stacklevel=2)
            return str(error)
        worst = max(found, key=lambda check: check.error / check.budget)
        self.report.accuracy.append(Accuracy(case, candidate.name, worst))
        return None

    def measure_all(
        self, workloads: Sequence[Workload], dtypes: Sequence[torch.dtype], console: Console
    ) -> Report:
        """All directions of the workloads in those of their dtypes that are listed, with a progress bar on a terminal
        and a line for each elsewhere."""
        cases = [(workload, dtype, direction) for workload in workloads for dtype in dtypes if dtype in workload.dtypes
                 for direction in DIRECTIONS]
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            for workload, dtype, direction in cases:
                head = f"{workload.name}, {str(dtype).removeprefix('torch.')}, {direction}"
                if not console.is_terminal:
                    console.print(f"Timing {head}", highlight=False)
                self.measure(workload, dtype, direction,
                             lambda text, head=head: progress.update(task, description=f"{head}: {text}"))
                progress.advance(task)
        return self.report
