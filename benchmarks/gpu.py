"""The GPU suite: every workload, checked and then timed beside its peers and its floor."""

from __future__ import annotations

import argparse
import datetime
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from torus_kernels import BackendError
from torus_kernels.backends import BACKENDS, Problem, can_run, unavailable

from . import arguments, environment, gpu_decode, gpu_peers, gpu_report
from .accuracy import Gate, WrongResult
from .candidates import BOTH, OPERATOR, Candidate, operator, other_operator
from .gpu_report import GpuReport, Judged, Machine, Measured, Work
from .gpu_timing import Stopwatch
from .progress import Say, silent, steps
from .report import Case, Skipped
from .workloads import WORKLOADS, Inputs, Workload, make_inputs

GPU_WORKLOADS = ("field-16k", "field-64k", "text-32k", "field-4k", "text-4k", "seed-512")
"""The headline first: what there is no time for in the end is left out."""

DECODED = "text-32k"
"""The workload that is decoded, too."""

OPERATORS = ("triton", "cuda")
"""Backends of the operator that are timed, each where it can run."""

MAX_SECONDS = 540.0
"""After which nothing more is compiled."""

_NOMINAL_CLOCK = 1.755e9


def add_parser(commands) -> None:
    """The command ``gpu``."""
    parser = commands.add_parser(
        "gpu", help="time all workloads on a GPU for the record",
        description="Checks the operator against float64 on a CUDA device, times every workload beside its peers, and "
                    "writes a report (JSON) and a plot (PNG). Under 10 minutes.",
    )
    arguments.add_choice(parser, "--workloads", GPU_WORKLOADS, GPU_WORKLOADS, "workloads to time")
    arguments.add_dtypes(parser)
    arguments.add_directions(parser)
    arguments.add_choice(parser, "--peers", gpu_peers.GPU_PEERS, tuple(gpu_peers.GPU_PEERS), "peers to time")
    arguments.add_seconds(parser, 0.5)
    parser.add_argument("--backend", choices=BACKENDS, default="triton",
                        help="of the operator, with which all else is compared (default: %(default)s)")
    arguments.add_output(parser, "gpu")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    run([WORKLOADS[name] for name in given.workloads], arguments.dtypes(given.dtypes), given.directions,
        [gpu_peers.GPU_PEERS[name] for name in gpu_peers.GPU_PEERS if name in given.peers], backend=given.backend,
        seconds=given.seconds, output=given.output, console=console)


def require_device(backend: str) -> None:
    """Raises `BackendError` where the suite cannot run here."""
    if not torch.cuda.is_available():
        raise BackendError("the GPU suite needs a CUDA device, and there is none")
    if reason := can_run(backend, Problem("cuda", torch.bfloat16, 64)):
        raise BackendError(f"backend {backend!r} cannot run here: {reason}")


def describe_machine(stopwatch: Stopwatch) -> Machine:
    """The current device, and what a copy and a matrix product reach on it."""
    import triton

    properties = torch.cuda.get_device_properties()
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = stopwatch.measure(lambda: target.copy_(source)).spread.median
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    gemm = stopwatch.measure(lambda: torch.mm(a, a)).spread.median
    clock = getattr(properties, "clock_rate", 0) * 1e3 or _NOMINAL_CLOCK
    return Machine(
        properties.name, 2 * source.numel() / copy, 2 * size**3 / gemm, properties.multi_processor_count, clock,
        torch.__version__, triton.__version__, str(torch.version.cuda), environment.machine()["revision"],
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


class GpuSuite:
    """Measures cases into a report.

    Args:
        stopwatch: what times a function.
        device: of the tensors.
        backend: of the operator.
        peers: what else is timed.
        others: further backends of the operator.
    """

    def __init__(
        self, machine: Machine, stopwatch: Stopwatch, backend: str, peers: Sequence[Candidate], device: str = "cuda",
        others: Sequence[str] = (),
    ) -> None:
        self._stopwatch, self._device = stopwatch, device
        self._operator, self._others = operator(backend), [other_operator(name) for name in others]
        self._peers = [*self._others, *peers]
        self.report = GpuReport(machine, {c.name: c.label for c in (self._operator, *self._peers)})

    def measure(
        self, workload: Workload, dtype: torch.dtype, direction: str, candidates: Sequence[Candidate],
        say: Say = silent,
    ) -> None:
        """Checks and times candidates on a case.

        The truth is `compose` in float64, on the first and the last head.

        Raises:
            WrongResult: the operator exceeds its error budget, on any backend. A peer that does is skipped, and so is
                whatever cannot run.
        """
        case = Case(workload.name, str(dtype).removeprefix("torch."), direction)
        if case not in [of for of, _ in self.report.work]:
            self.report.work.append((case, Work.of(workload, dtype.itemsize, direction)))
            self.report.sizes[workload.name] = workload.describe().replace(
                f"B={workload.cpu_batch} ", f"B={workload.batch} ")
        inputs = gpu_peers.inputs_on(make_inputs(
            workload.lattice, batch=workload.batch, heads=workload.heads, head_dim=workload.head_dim, dtype=dtype,
        ), self._device)
        say("float64 truth")
        with torch.device(self._device):
            gate = Gate(inputs, gpu_peers.compose, backward=direction == BOTH, heads=(0, workload.heads - 1))
            for candidate in candidates:
                say(candidate.label)
                self._measure(candidate, case, inputs, gate)
                gc.collect()

    def _measure(self, candidate: Candidate, case: Case, inputs: Inputs, gate: Gate) -> None:
        run: Callable[[Callable], object] = inputs.forward_backward if case.direction == BOTH else inputs.forward
        is_operator = candidate.name == OPERATOR
        is_other = candidate.name in [other.name for other in self._others]
        try:
            if candidate.computes_operator:
                found = gate.check(candidate.label, candidate.attention, peer=not (is_operator or is_other))
                worst = max(found, key=lambda check: check.error / check.budget)
                self.report.judged.append(Judged(case, candidate.name, worst))
            timing = self._stopwatch.measure(lambda: run(candidate.attention))
        except (RuntimeError, WrongResult) as error:  # out of memory, no kernel for this dtype, too wrong
            if is_operator or (is_other and isinstance(error, WrongResult)):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.report.skipped.append(Skipped(case, candidate.name, reason))
            return
        self.report.measured.append(Measured(case, candidate.name, timing))

    def measure_all(
        self, workloads: Sequence[Workload], dtypes: Sequence[torch.dtype], directions: Sequence[str],
        console: Console, max_seconds: float = MAX_SECONDS,
    ) -> GpuReport:
        """All cases; candidates that compile for long come last, while there is time."""
        started = time.perf_counter()
        cases = [(workload, dtype, direction) for workload in workloads for dtype in dtypes if dtype in workload.dtypes
                 for direction in directions]
        quick = [self._operator, *(peer for peer in self._peers if not peer.compiles)]
        slow = [peer for peer in self._peers if peer.compiles]
        with steps(console, len(cases) * (2 if slow else 1)) as start:
            for candidates in (quick, slow) if slow else (quick,):
                for workload, dtype, direction in cases:
                    name = f"{workload.name}, {str(dtype).removeprefix('torch.')}, {direction}"
                    say = start(f"Timing {name}" + (": compiled peers" if candidates is slow else ""))
                    if candidates is slow and time.perf_counter() - started > max_seconds:
                        case = Case(workload.name, str(dtype).removeprefix("torch."), direction)
                        self.report.skipped += [Skipped(case, c.name, "no time was left") for c in slow]
                        continue
                    self.measure(workload, dtype, direction, candidates, say)
        return self.report


def run(
    workloads: Sequence[Workload], dtypes: Sequence[torch.dtype], directions: Sequence[str],
    peers: Sequence[Candidate], *, backend: str, seconds: float, output: Path, console: Console,
) -> GpuReport:
    """Measures, prints the table and writes ``output`` and a plot beside it.

    Raises:
        BackendError: there is no CUDA device, or the backend cannot run on it.
        WrongResult: the operator exceeds its error budget.
        OSError: a file cannot be written.
    """
    require_device(backend)
    stopwatch = Stopwatch(seconds)
    others = [name for name in OPERATORS if name != backend and unavailable(name) is None]
    suite = GpuSuite(describe_machine(stopwatch), stopwatch, backend, peers, others=others)
    console.print(suite.report.machine.describe(), highlight=False)
    report = suite.measure_all(workloads, dtypes, directions, console)
    for workload in (w for w in workloads if w.name == DECODED):
        for batch in gpu_decode.BATCHES:
            gpu_decode.measure(report, stopwatch, workload, torch.bfloat16, batch, backend)
    report.save(output)
    gpu_report.plot(report, output.with_suffix(".png"))
    console.print(gpu_report.grid(report).rich())
    for skipped in report.skipped:
        case = skipped.case
        console.print(f"not timed: {skipped.candidate} on {case.workload} {case.dtype} {case.direction}: "
                      f"{skipped.reason}", highlight=False)
    console.print(f"Written: {output} and {output.with_suffix('.png')}", highlight=False)
    return report
