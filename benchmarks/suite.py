"""Measuring workloads: every candidate is checked, then all are timed side by side."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from . import environment, peers, roofline
from .accuracy import Gate, WrongResult
from .candidates import BOTH, DIRECTIONS, OPERATOR, Candidate, free_memory
from .progress import Say, silent, steps
from .report import Accuracy, Case, Measurement, Report, Roofline, Skipped
from .timing import time_side_by_side
from .workloads import Inputs, Workload, cpu_inputs

MANY_TOKENS = 10_000
"""Sequence length beyond which the first and the last head alone are judged: the truth is expensive."""


def why_not(candidate: Candidate, workload: Workload, dtype: torch.dtype, direction: str) -> str | None:
    """Why a candidate cannot be measured, None where it can."""
    if direction not in candidate.directions:
        return f"{candidate.label} has no {direction} on this device"
    needed, free = candidate.memory(workload, dtype, direction), free_memory()
    if needed > free:
        return f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    return None


def make_gate(workload: Workload, inputs: Inputs, direction: str) -> Gate:
    """The gate of a case. Its truth is `compose` in float64, which is within reach at any size and which tests hold
    against the reference."""
    heads = (0, workload.heads - 1) if workload.seq_len > MANY_TOKENS else None
    return Gate(inputs, peers.compose, backward=direction == BOTH, heads=heads)


def call(candidate: Candidate, inputs: Inputs, direction: str) -> Callable[[], object]:
    """What is timed."""
    run = inputs.forward_backward if direction == BOTH else inputs.forward
    return lambda: run(candidate.attention)


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class Suite:
    """Measures cases into a report.

    Args:
        backend: of the operator.
        candidates: the operator and its peers, in any order.
        seconds: how long the rounds of one case go on.
        min_rounds, max_rounds: as in `time_side_by_side`.
        with_roofline: measure what the machine reaches, too.
        longest_call: seconds; a peer of which one call takes longer is skipped.
    """

    def __init__(
        self, backend: str, candidates: Sequence[Candidate], *, seconds: float, min_rounds: int = 5,
        max_rounds: int = 50, with_roofline: bool = False, longest_call: float = math.inf,
    ) -> None:
        labels = {candidate.name: candidate.label for candidate in candidates}
        self.report = Report(environment.machine(), backend, labels=labels)
        self._candidates = candidates
        self._limits = {"seconds": seconds, "min_rounds": min_rounds, "max_rounds": max_rounds}
        self._with_roofline = with_roofline
        self._longest_call = longest_call
        self._peaks: dict[torch.dtype, roofline.Peaks] = {}

    def measure(self, workload: Workload, dtype: torch.dtype, direction: str, say: Say = silent) -> None:
        """Checks and times every candidate that can do this case; ``say`` is told what is going on.

        Raises:
            WrongResult: the operator exceeds its error budget. A peer that does, or that cannot run, is skipped.
        """
        case = Case(workload.name, dtype_name(dtype), direction)
        self.report.workloads[workload.name] = workload.describe()
        inputs = cpu_inputs(workload, dtype)
        say("float64 truth")
        gate = make_gate(workload, inputs, direction)
        admitted: dict[str, Candidate] = {}
        for candidate in self._candidates:
            reason = why_not(candidate, workload, dtype, direction)
            if reason is None and candidate.computes_operator:
                say(f"checking {candidate.label}")
                reason = self._refused(gate, candidate, case)
            if reason is None and candidate.name != OPERATOR:
                say(f"one call of {candidate.label}")
                reason = self._too_long(call(candidate, inputs, direction))
            if reason is None:
                admitted[candidate.name] = candidate
            else:
                self.report.skipped.append(Skipped(case, candidate.name, reason))
        del gate
        gc.collect()

        say("warming up")
        timings = time_side_by_side(
            {name: call(candidate, inputs, direction) for name, candidate in admitted.items()},
            on_round=lambda done: say(f"round {done}"), **self._limits,
        )
        self.report.measurements += [Measurement(case, name, timing) for name, timing in timings.items()]
        if self._with_roofline and OPERATOR in timings:
            say("matrix product and copy")
            if dtype not in self._peaks:
                self._peaks[dtype] = roofline.measure_peaks(dtype)
            peaks = self._peaks[dtype]
            self.report.roofline.append(Roofline(
                case, roofline.useful_flops(workload, direction), roofline.useful_bytes(workload, dtype, direction),
                peaks.gemm, peaks.copy,
            ))

    def _too_long(self, run: Callable[[], object]) -> str | None:
        if self._longest_call == math.inf:
            return None
        started = time.perf_counter()
        run()
        taken = time.perf_counter() - started
        return f"one call takes {taken:.2g} s" if taken > self._longest_call else None

    def _refused(self, gate: Gate, candidate: Candidate, case: Case) -> str | None:
        is_operator = candidate.name == OPERATOR
        try:
            found = gate.check(candidate.label, candidate.attention, peer=not is_operator)
        except RuntimeError as error:  # a wrong result, or what the compiler of a peer raises
            if is_operator:
                raise
            reason = str(error) if isinstance(error, WrongResult) else f"{candidate.label} fails: {_first_line(error)}"
            warnings.warn(reason, stacklevel=2)
            return reason
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
        with steps(console, len(cases)) as start:
            for workload, dtype, direction in cases:
                self.measure(workload, dtype, direction,
                             start(f"Timing {workload.name}, {dtype_name(dtype)}, {direction}"))
        return self.report
