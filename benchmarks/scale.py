"""Training on two processes in every layout beside one process: losses, memory, bytes sent and time of a step."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torus_model.config import SIZES, TrainConfig
from torus_model.data import load_corpus
from torus_model.parallel import LAYOUTS, check_layout, make_layout
from torus_model.run import Run

from . import arguments, environment
from .progress import steps as progress_steps
from .scale_arithmetic import Step, least_tokens_of_all
from .scale_report import SINGLE, Measured, ScaleReport, grid, write_plot

PROCESSES = 2


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this process sends in collectives and to neighbours, collectives as rings.

    Attributes:
        bytes: found so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.bytes += _sent(func._opname, args)
        return func(*args, **kwargs or {})


def _sent(operation: str, args: Sequence[Any]) -> float:
    size = dist.get_world_size()
    share = (size - 1) / size
    if operation == "send":
        return sum(_bytes(x) for x in args[0])
    if operation == "allreduce_":
        return 2 * share * sum(_bytes(x) for x in args[0])
    if operation in ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_"):
        return share * max(_bytes(args[0]), _bytes(args[1]))
    return 0.0


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _kept(tensors: Sequence[torch.Tensor]) -> int:
    return sum(_bytes(x.to_local() if isinstance(x, DTensor) else x) for x in tensors)


def _work(rank: int, folder: str, config: TrainConfig) -> None:
    """One of the processes: one process's run in the first of them while the others wait, and every layout.

    The runs take turns, a step at a time, so that whatever else goes on disturbs all of them. The first step is not
    timed; in the last one bytes are counted, and it is not timed either.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    runs = {name: Run(config, layout=make_layout(None if name == SINGLE else name)) for name in (SINGLE, *LAYOUTS)}
    if rank > 0:
        del runs[SINGLE]
    seconds, sent = {name: [] for name in runs}, {name: SentBytes() for name in runs}
    last = (config.steps or 0) - 1
    for step in range(last + 1):
        for name in (SINGLE, *LAYOUTS):
            dist.barrier()
            if name not in runs:
                continue
            started = time.perf_counter()
            with sent[name] if step == last else contextlib.nullcontext():
                runs[name].advance()
            if 0 < step < last:
                seconds[name].append(time.perf_counter() - started)
    torch.save({name: _measured(run, sent[name], seconds[name]) for name, run in runs.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _measured(run: Run, sent: SentBytes, seconds: list[float]) -> dict[str, Any]:
    states = [x for state in run.optimizer.state.values() for x in state.values()]
    return dataclasses.asdict(
        Measured(run.history.losses, _kept(list(run.model.parameters())), _kept(states), sent.bytes, seconds))


def add_parser(commands) -> None:
    """The command ``scale``."""
    parser = commands.add_parser(
        "scale", help="training on two processes in every layout, beside one process",
        description="Trains the tiny model on one process and on two in every layout: differences of the losses, bytes "
                    "of weights and optimiser that each process keeps, bytes that it sends in a step beside what the "
                    "formulas say, and the time of a step with one thread a process. Adds the arithmetic of larger "
                    "models over links of nominal bandwidths. Writes a report (JSON) and a plot (PNG).",
    )
    parser.add_argument("--steps", type=functools.partial(arguments.at_least, 3), default=12, metavar="N",
                        help="training steps of each run; the first and the last are not timed (default: %(default)s)")
    parser.add_argument("--data", metavar="PATH",
                        help="file, or folder of text files (default: the Python standard library's sources)")
    arguments.add_output(parser, "scale")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    config = TrainConfig(model=SIZES["tiny"], steps=given.steps, data=given.data, seq_len=256, batch_size=8,
                         accumulate=2)
    run(config, output=given.output, console=console)


def run(config: TrainConfig, *, output: Path, console: Console) -> ScaleReport:
    """Trains, prints the table and writes ``output`` and a plot beside it.

    Args:
        config: with a budget of at least 3 steps.

    Raises:
        ValueError: the run does not divide into two processes.
        DataError: there is no text.
        OSError: a file cannot be written.
    """
    for name in LAYOUTS:
        check_layout(name, PROCESSES, config)
    load_corpus(config.data, config.max_bytes)  # errors are those of this process, not of a child
    machine = environment.machine()
    console.print(environment.describe(machine), highlight=False)
    with progress_steps(console, 1) as start, tempfile.TemporaryDirectory() as folder:
        start(f"one process, and {PROCESSES} in {len(LAYOUTS)} layouts")
        mp.spawn(_work, (folder, config), nprocs=PROCESSES)
        ranks = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(PROCESSES)]
    step = Step(config.model, config.batch_size, config.seq_len, PROCESSES, config.accumulate)
    large = SIZES["gpt2"]
    report = ScaleReport(
        machine, {"batch": config.batch_size, "seq_len": config.seq_len, "parts": config.accumulate,
                  "steps": config.steps or 0, "processes": PROCESSES, "width": config.model.width,
                  "layers": config.model.layers},
        {name: [Measured(**rank[name]) for rank in ranks if name in rank] for name in (SINGLE, *LAYOUTS)},
        {name: [step.sent(name, rank) for rank in range(PROCESSES)] for name in LAYOUTS},
        [{"layout": layout, "link": link, "tokens": tokens} for (layout, link), tokens in
         least_tokens_of_all(Step(large, 8, large.lattice.num_sites, 8, activation=2)).items()],
    )
    report.save(output)
    write_plot(report, output.with_suffix(".png"))
    console.print(grid(report).rich())
    console.print(f"Written: {output} and {output.with_suffix('.png')}", highlight=False)
    return report
