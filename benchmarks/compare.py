"""Comparison with another git revision: its own library, its own process, rounds in turn."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import arguments, environment
from .accuracy import RESULTS
from .candidates import BOTH, OPERATOR, best_cpu_backend
from .cpu import CPU_WORKLOADS
from .progress import Say, steps
from .report import Accuracy, Case, Measurement, Report
from .suite import dtype_name, make_gate
from .tables import compare_grid
from .timing import Timing
from .workloads import WORKLOADS, Workload, cpu_inputs

ROOT = Path(__file__).resolve().parent.parent
REVISION = "revision"
"""The name under which the other revision is kept; this tree is kept under that of the operator."""

_PARTS = ("torus_kernels", "csrc")
_SLICE = 0.1  # seconds of calls in one round of one side
_MIN_ROUNDS = 5


class ComparisonError(RuntimeError):
    """The other revision cannot be compared, or this tree is slower than allowed; the message says why."""


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a ratio of two times")
    return value


def add_parser(commands) -> None:
    """The command ``compare``."""
    parser = commands.add_parser(
        "compare", help="this tree against another git revision",
        description="Takes torus_kernels and csrc of another revision out of git, builds its library, and times both "
                    "in processes of their own, in turn on the same inputs. A ratio below 1 means that this tree is "
                    "faster.",
    )
    parser.add_argument("revision", metavar="REVISION", help="what git calls it: a commit, a branch, a tag, HEAD~3")
    arguments.add_choice(parser, "--workloads", CPU_WORKLOADS, ("seed-512", "field-4k", "text-4k"), "workloads to time")
    arguments.add_dtypes(parser)
    arguments.add_directions(parser)
    arguments.add_seconds(parser, 10.0)
    parser.add_argument("--fail-above", type=_ratio, metavar="RATIO",
                        help="exit with an error if in any case the median ratio of this tree's time to the revision's "
                             "is larger")
    parser.add_argument("--output", type=Path, metavar="FILE", help="report to write (default: none)")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    run(given.revision, [WORKLOADS[name] for name in given.workloads], arguments.dtypes(given.dtypes),
        given.directions, seconds=given.seconds, fail_above=given.fail_above, output=given.output, console=console)


def _git(*command: str) -> bytes:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, check=True).stdout
    except OSError as error:
        raise ComparisonError(f"git cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise ComparisonError(said[-1] if said else f"git {command[0]} failed") from error


def commit_of(revision: str) -> str:
    """The abbreviated commit that ``revision`` names.

    Raises:
        ComparisonError: it names none, or this is no git checkout.
    """
    _git("rev-parse", "--git-dir")
    try:
        return _git("rev-parse", "--short", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    except ComparisonError as error:
        raise ComparisonError(f"git knows no revision {revision!r}") from error


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary directory with the library of a commit, which leaves the checkout and its index alone.

    Raises:
        ComparisonError: the commit has no such library.
    """
    try:
        archive = _git("archive", "--format=tar", commit, *_PARTS)
    except ComparisonError as error:
        raise ComparisonError(f"revision {commit} has no {' and '.join(_PARTS)}: {error}") from error
    with tempfile.TemporaryDirectory(prefix=f"torus-{commit}-") as directory:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(directory, filter="data")
        yield Path(directory).resolve()


class Side:
    """A worker process that runs the library in ``tree``."""

    def __init__(self, name: str, tree: Path, backend: str) -> None:
        self.name = name
        # Python looks into the directory that it is started in first, and finds the rest of this package after that.
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", backend], cwd=tree, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
            env=os.environ | environment.WARM_MEMORY | {"PYTHONPATH": os.pathsep.join(path)},
        )
        file = Path(self.ask("hello")["file"]).resolve()
        if not file.is_relative_to(tree):
            raise ComparisonError(f"{name} was to run in {tree}, but Python finds torus_kernels at {file}")

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            ComparisonError: the worker failed.
        """
        try:
            print(json.dumps({"do": do} | request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise ComparisonError(f"{self.name}: its process ended with status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise ComparisonError(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _measure(
    sides: dict[str, Side], report: Report, workload: Workload, dtype: torch.dtype, direction: str, seconds: float,
    say: Say,
) -> None:
    """Checks both sides and times them in turn; who comes first is drawn anew in every round."""
    case = Case(workload.name, dtype_name(dtype), direction)
    report.workloads[workload.name] = workload.describe()
    lattice = {name: getattr(workload.lattice, name)
               for name in ("n_major", "n_minor", "topology", "winding", "cross_radius")}
    sizes = {"batch": workload.cpu_batch, "heads": workload.heads, "head_dim": workload.head_dim}
    say("float64 truth")
    gate = make_gate(workload, cpu_inputs(workload, dtype), direction)
    with tempfile.TemporaryDirectory(prefix="torus-results-") as directory:
        results = Path(directory) / "results.pt"
        for name, side in sides.items():
            say(f"checking {side.name}")
            side.ask("prepare", lattice=lattice, sizes=sizes, dtype=case.dtype, direction=direction)
            side.ask("results", path=str(results))
            names = RESULTS if direction == BOTH else RESULTS[:1]
            found = gate.judge(side.name, dict(zip(names, torch.load(results), strict=True)))
            report.accuracy.append(Accuracy(case, name, max(found, key=lambda check: check.error / check.budget)))
    del gate
    taken: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffle, started = list(sides), random.Random(0).shuffle, time.perf_counter()
    while (rounds := len(taken[OPERATOR])) < _MIN_ROUNDS or time.perf_counter() - started < seconds:
        shuffle(order)
        for name in order:
            taken[name].append(sides[name].ask("time", seconds=_SLICE)["seconds"])
        say(f"round {rounds + 1}")
    report.measurements += [Measurement(case, name, Timing(tuple(times), 0.0)) for name, times in taken.items()]


def _fail_if_slower(report: Report, limit: float) -> None:
    slower = [
        f"{case.workload} {case.dtype} {case.direction} {ratio.median:.3f}" for case in report.cases()
        if (ratio := report.timings(case)[OPERATOR].ratio_to(report.timings(case)[REVISION])).median > limit
    ]
    if slower:
        raise ComparisonError(f"slower than {limit:g} times {report.labels[REVISION]}: {'; '.join(slower)}")


def run(
    revision: str, workloads: Sequence[Workload], dtypes: Sequence[torch.dtype], directions: Sequence[str], *,
    seconds: float, fail_above: float | None, output: Path | None, console: Console, backend: str | None = None,
) -> Report:
    """Builds the revision, measures, prints the table and, where asked, writes a report.

    Raises:
        ComparisonError: there is no such revision, it does not run, or this tree is slower than ``fail_above``.
        WrongResult: a side exceeds its error budget.
        OSError: a file cannot be written.
    """
    commit, backend = commit_of(revision), backend or best_cpu_backend()
    machine = environment.machine() | {"allocator": dict(environment.WARM_MEMORY)}
    labels = {OPERATOR: "this tree", REVISION: f"revision {commit}"}
    report = Report(machine, backend, labels=labels, kind="compare")
    console.print(environment.describe(machine), highlight=False)
    cases = [(workload, dtype, direction) for workload in workloads for dtype in dtypes for direction in directions]
    with checked_out(commit) as tree, contextlib.ExitStack() as stack:
        sides = {}
        for name, where in ((OPERATOR, ROOT), (REVISION, tree)):
            console.print(f"Starting {labels[name]}", highlight=False)
            sides[name] = Side(labels[name], where, backend)
            stack.callback(sides[name].close)
        with steps(console, len(cases)) as start:
            for workload, dtype, direction in cases:
                say = start(f"Timing {workload.name}, {dtype_name(dtype)}, {direction}")
                _measure(sides, report, workload, dtype, direction, seconds, say)
    console.print(compare_grid(report, REVISION).rich())
    if output is not None:
        report.save(output)
        console.print(f"Written: {output}", highlight=False)
    if fail_above is not None:
        _fail_if_slower(report, fail_above)
    return report
