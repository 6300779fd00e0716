"""The main job: does it run here, is it right, is it fast, does it learn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torus_kernels import TorusLattice, available_backends, backend_report
from torus_model.train import TrainConfig, steps_per_second, train

from . import environment, peers, plots
from .accuracy import RESULTS, Check, WrongResult, checks, evaluate
from .candidates import PEERS, best_cpu_backend, operator
from .suite import Suite
from .tables import timing_tables
from .workloads import WORKLOADS, make_inputs, smaller

CHECKED = (TorusLattice(16, 24, winding=3), TorusLattice(16, 24, "causal", winding=3))
_CHECKED_LENGTH = {"periodic": 16 * 24, "causal": 500}

_SMALL_SIDE = 24
"""Side of the lattices timed where only the dense reference runs."""


@dataclass(frozen=True)
class Settings:
    """What to do, and for how long.

    Attributes:
        workloads: names of the workloads to time; none skips the timing.
        dtypes: dtypes to time.
        seconds: how long the rounds of one timing go on.
        train_seconds: length of the training run; 0 skips it.
        output: folder of the report, the plots and the trained model.
    """

    workloads: Sequence[str]
    dtypes: Sequence[torch.dtype]
    seconds: float
    train_seconds: float
    output: Path


def show_backends(console: Console) -> None:
    """What can run here, and why the rest cannot."""
    table = Table(title="Backends", box=box.SIMPLE_HEAD, title_justify="left", show_header=False)
    for name, state in backend_report().items():
        table.add_row(name, escape(state))
    console.print(table)


def check_accuracy(backend: str, console: Console) -> None:
    """Holds out and gradients against the reference in float64, error beside budget.

    Raises:
        WrongResult: an error exceeds its budget.
    """
    table = Table(title=f"Error of the backend {backend} against the float64 reference / budget",
                  box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    table.add_column("")
    columns: list[list[Check]] = []
    for lattice in CHECKED:
        seq_len = _CHECKED_LENGTH[lattice.topology]
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs(lattice, batch=2, heads=2, head_dim=64, dtype=dtype, seq_len=seq_len)
            truth = evaluate(operator("reference").attention, inputs.to(torch.float64), backward=True)
            plain = evaluate(peers.dense, inputs, backward=True)
            columns.append(checks(evaluate(operator(backend).attention, inputs, backward=True), truth, plain))
            table.add_column(f"{lattice.topology}\n{str(dtype).removeprefix('torch.')}", justify="right")
    for row, name in enumerate(RESULTS):
        cells = [column[row] for column in columns]
        table.add_row(name, *(f"{'' if c.ok else '[red]'}{c.error:.0e} / {c.budget:.0e}" for c in cells))
    console.print(table)
    if not all(check.ok for column in columns for check in column):
        raise WrongResult(f"{backend} exceeds its error budget; see the table")


def time_operator(backend: str, settings: Settings, console: Console) -> None:
    """Times the operator beside its peers; writes ``timing.json`` and ``timing.png``."""
    workloads = [WORKLOADS[name] for name in settings.workloads]
    if backend == "reference":
        workloads = [smaller(workload, _SMALL_SIDE) for workload in workloads]
    candidates = [operator(backend), PEERS["compose"], PEERS["compose_matmul"], PEERS["flash"]]
    suite = Suite(backend, candidates, seconds=settings.seconds, min_rounds=3)
    console.print(f"Timing on {environment.describe(suite.report.machine)}", highlight=False)
    report = suite.measure_all(workloads, settings.dtypes, console)
    console.print("Median and quartiles; the ratio is to the time of the operator in the same round.\n")
    console.print(timing_tables(report))
    for name, sizes in report.workloads.items():
        console.print(f"  {name}: {sizes}", highlight=False)
    report.save(settings.output / "timing.json")
    plots.write_timings(report, settings.output / "timing.png")
    console.print(f"Written: {settings.output / 'timing.json'}, {settings.output / 'timing.png'}\n", highlight=False)


def train_model(backend: str, settings: Settings, console: Console) -> None:
    """Trains the byte-level model, shows its validation curve, and compares its speed with that on the reference."""
    config = TrainConfig(seconds=settings.train_seconds, backend=backend)
    console.print(f"Training the byte-level model for {settings.train_seconds:.0f} s on the backend {backend}")
    result = train(config, settings.output / "model")
    table = Table(title="Validation", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("step", "tokens", "seconds", "bits per byte"):
        table.add_column(name, justify="right")
    for point in result.history.validation:
        table.add_row(str(point.step), f"{point.tokens:,}", f"{point.seconds:.0f}", f"{point.bits_per_byte:.3f}")
    console.print(table)
    console.print(f"Written: {result.plot_file}, {result.history_file}, {result.checkpoint}\n", highlight=False)
    console.print("Counting training steps per second", highlight=False)
    speeds = {
        name: steps_per_second(config.model, name, batch_size=config.batch_size, seq_len=config.seq_len, steps=steps)
        for name, steps in {backend: 5, "reference": 1}.items()
    }
    shown = ", ".join(f"{speed:.2f} on {name}" for name, speed in speeds.items())
    factor = f" ({speeds[backend] / speeds['reference']:.1f}x)" if len(speeds) > 1 else ""
    console.print(f"Training steps per second: {shown}{factor}", highlight=False)


def run(settings: Settings, console: Console) -> None:
    """The whole main job.

    Raises:
        WrongResult: a backend exceeds its error budget.
        BackendError, TrainingError, OSError: as the parts raise them.
    """
    started = time.perf_counter()
    settings.output.mkdir(parents=True, exist_ok=True)
    show_backends(console)
    backend = best_cpu_backend()
    if backend == "reference":
        console.print("[yellow]Only the dense reference runs here: lattices are smaller, and nothing is fast.[/yellow] "
                      f"Backends that can run: {', '.join(available_backends())}.\n")
    check_accuracy(backend, console)
    if settings.workloads:
        time_operator(backend, settings, console)
    if settings.train_seconds > 0:
        train_model(backend, settings, console)
    console.print(f"Done in {time.perf_counter() - started:.0f} s.", highlight=False)
