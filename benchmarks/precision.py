"""Errors against float64 over size, score magnitude and decay, beside those of PyTorch's SDPA on the same numbers."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from torus_kernels import BackendError, Stream, TorusLattice
from torus_kernels.backends import BACKENDS, Problem, available_backends, can_run

from . import arguments, environment, peers
from .accuracy import FACTOR, evaluate
from .precision_report import GROUPS, PLAIN, Errors, PrecisionReport, grid, write_plot
from .progress import Say, steps
from .suite import dtype_name
from .workloads import Inputs, make_inputs, operator_on

HEADS, HEAD_DIM = 2, 64
LOW_STREAM = Stream.spiral_cw


@dataclass(frozen=True)
class Point:
    """One setting of one sweep.

    Attributes:
        make: inputs in float32 from a seed.
        query: the token whose output is looked at; None for all of them.
    """

    sweep: str
    value: float
    make: Callable[[int], Inputs]
    query: int | None = None


def _inputs(lattice: TorusLattice, seed: int, seq_len: int | None = None) -> Inputs:
    return make_inputs(lattice, batch=1, heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float32, seq_len=seq_len,
                       seed=seed)


def _with_scores(lattice: TorusLattice, largest: float, seed: int) -> Inputs:
    """Queries and keys times the same factor, so that the largest score of any pair is ``largest``."""
    inputs = _inputs(lattice, seed)
    factor = math.sqrt(largest * HEAD_DIM**0.5 / (inputs.q @ inputs.k.mT).abs().max().item())
    return dataclasses.replace(inputs, q=factor * inputs.q, k=factor * inputs.k)


def _with_decay(lattice: TorusLattice, decay: float, seed: int) -> Inputs:
    inputs = _inputs(lattice, seed)
    return dataclasses.replace(inputs, decay=torch.full_like(inputs.decay, decay))


def _with_a_low_stream(lattice: TorusLattice, depth: float, query: int, seed: int) -> Inputs:
    """All keys that `LOW_STREAM` shows the query score about ``depth`` less than the others; it counts as any stream.

    Keys and queries have it in their first channel: ``-c`` or 0 times ``c``.
    """
    inputs = _inputs(lattice, seed)
    visible, _ = lattice.stream_geometry(LOW_STREAM, lattice.num_sites)
    channel = math.sqrt(depth * HEAD_DIM**0.5)
    inputs.q[..., 0] = channel
    inputs.k[..., 0] = torch.where(visible[query], -channel, 0.0)
    return inputs


SIDES = (4, 8, 16, 32, 64)
LENGTHS = (16, 64, 256, 1024, 4096)
SCORES = (1.0, 10.0, 100.0, 1e3, 1e4)
DECAYS = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4)
DEPTHS = (1.0, 10.0, 100.0, 1e3, 1e4)


def points(side: int, most_tokens: int) -> list[Point]:
    """All sweeps; those that are not of sizes are made on a periodic lattice of ``side`` x ``side`` sites."""
    lattice, causal = TorusLattice(side, side), TorusLattice(side, side, "causal")
    query = lattice.num_sites // 2
    of_sizes = [Point("sites", n * n, functools.partial(_inputs, TorusLattice(n, n))) for n in SIDES]
    of_sizes += [Point("length", n, functools.partial(_inputs, causal, seq_len=n)) for n in LENGTHS]
    return [
        *(point for point in of_sizes if point.value <= most_tokens),
        *(Point("score", x, functools.partial(_with_scores, lattice, x)) for x in SCORES),
        *(Point("decay", x, functools.partial(_with_decay, lattice, x)) for x in DECAYS),
        *(Point("depth", x, functools.partial(_with_a_low_stream, lattice, x, query), query) for x in DEPTHS),
    ]


def _relative(actual: Mapping[str, Tensor], truth: Mapping[str, Tensor], names: Sequence[str]) -> tuple[float, float]:
    """The worst largest and the worst RMS error among the tensors of a group, relative to the group's largest values.

    Of the group and not of each tensor: where a softmax has one key left, the gradients of queries and keys vanish, and
    an error relative to them would say nothing.
    """
    errors = [actual[name].double() - truth[name] for name in names]
    largest = max(truth[name].abs().max().item() for name in names)
    largest_rms = max(truth[name].square().mean().sqrt().item() for name in names)
    return (max(e.abs().max().item() for e in errors) / largest,
            max(e.square().mean().sqrt().item() for e in errors) / largest_rms)


def _shares(
    inputs: Inputs, actual: Mapping[str, Tensor], truth: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> dict[str, float]:
    """The largest error of each result as a share of the budget that the tests hold backends to.

    It is twice the error of plain PyTorch, the rounding to the result's dtype, and roundings of the accumulation, those
    relative to the largest of all results: 8, and as many as the largest score is large, because a score rounded in its
    last place changes a weight by that much. The gradients of queries and keys are differences of numbers as large as
    the other results, times scale and keys or queries.
    """
    scores = (inputs.q.double() @ inputs.k.double().mT).abs().max().item() * HEAD_DIM**-0.5
    largest = max(x.abs().max().item() for x in truth.values())
    gain = {f"d_{name}": max(1.0, x.abs().max().item() * HEAD_DIM**-0.5)
            for name, x in (("q", inputs.k), ("k", inputs.q))}
    shares = {}
    for name, value in actual.items():
        rounding = torch.finfo(value.dtype).eps * truth[name].abs().max().item()
        accumulation = (8 + scores) * torch.finfo(torch.float32).eps * largest * gain.get(name, 1.0)
        budget = FACTOR * _error(plain[name], truth[name]) + rounding + accumulation
        shares[name] = _error(value, truth[name]) / budget
    return shares


def _error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth).abs().max().item()


class Study:
    """Measures points into a report.

    Args:
        backends: of the operator.
        seeds: how many inputs each point is measured on.
    """

    def __init__(self, backends: Sequence[str], seeds: int, side: int) -> None:
        self.seeds = seeds
        self._candidates = {PLAIN: peers.dense} | {name: operator_on(name) for name in backends}
        self.report = PrecisionReport(environment.machine(), list(backends), seeds,
                                      f"H={HEADS} D={HEAD_DIM}, {side}x{side} sites where not said otherwise")

    def measure(self, point: Point, dtype: torch.dtype, say: Say) -> None:
        """The errors of every candidate that takes the dtype, forward and of all gradients, on every seed."""
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for seed in range(self.seeds):
            say(f"seed {seed}")
            inputs = point.make(seed).to(dtype)
            truth = evaluate(peers.dense, inputs.to(torch.float64), backward=True)
            plain = None
            for name, attention in self._candidates.items():
                if name != PLAIN and can_run(name, Problem("cpu", dtype, HEAD_DIM)):
                    continue
                actual = evaluate(attention, inputs, backward=True)
                plain = actual if plain is None else plain
                shares = _shares(inputs, actual, truth, plain)
                seen = {"actual": actual, "truth": truth}
                if point.query is not None:
                    seen = {key: results | {"out": results["out"][:, :, point.query]} for key, results in seen.items()}
                for group, names in GROUPS.items():
                    errors = _relative(**seen, names=names)
                    found.setdefault((name, group), []).append((*errors, max(shares[result] for result in names)))
        self.report.errors += [
            Errors(point.sweep, point.value, dtype_name(dtype), candidate, group, *map(tuple, zip(*runs, strict=True)))
            for (candidate, group), runs in found.items()
        ]


def add_parser(commands) -> None:
    """The command ``precision``."""
    default = [name for name in ("reference", "cpu") if name in available_backends()]
    parser = commands.add_parser(
        "precision", help="errors against float64, beside those of PyTorch's SDPA",
        description="Measures the error of outputs and all gradients against float64 over the size of the lattice, the "
                    "length of a sequence, the magnitude of scores, the decay, and the depth of one stream below the "
                    "others, beside PyTorch's SDPA called once a stream on the same numbers and masks. Writes a report "
                    "(JSON) and plots of the RMS and of the largest errors (PNG).",
    )
    arguments.add_choice(parser, "--backends", BACKENDS, default, "backends, on the CPU; triton under "
                         "TRITON_INTERPRET=1, with few tokens and no bfloat16")
    arguments.add_choice(parser, "--dtypes", arguments.DTYPES, tuple(arguments.DTYPES), "dtypes of the tokens")
    parser.add_argument("--seeds", type=functools.partial(arguments.at_least, 1), default=3, metavar="N",
                        help="inputs that every point is measured on (default: %(default)s)")
    parser.add_argument("--side", type=functools.partial(arguments.at_least, 2), default=16, metavar="N",
                        help="side of the lattice where its size is not what varies (default: %(default)s)")
    parser.add_argument("--most-tokens", type=functools.partial(arguments.at_least, 16), default=1024, metavar="N",
                        help="larger lattices and longer sequences are left out (default: %(default)s)")
    arguments.add_output(parser, "precision")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    run(points(given.side, given.most_tokens), given.backends, arguments.dtypes(given.dtypes), seeds=given.seeds,
        side=given.side, output=given.output, console=console)


def run(
    measured: Sequence[Point], backends: Sequence[str], dtypes: Sequence[torch.dtype], *, seeds: int, side: int,
    output: Path, console: Console,
) -> PrecisionReport:
    """Measures, prints the table and writes ``output`` and two plots beside it.

    Raises:
        BackendError: a backend cannot run on CPU tensors here.
        OSError: a file cannot be written.
    """
    for name in backends:
        if reason := can_run(name, Problem("cpu", torch.float32, HEAD_DIM)):
            raise BackendError(f"backend {name!r} cannot run on the CPU here: {reason}")
    study = Study(backends, seeds, side)
    report = study.report
    console.print(environment.describe(report.machine), highlight=False)
    with steps(console, len(dtypes) * len(measured)) as start:
        for dtype in dtypes:
            for point in measured:
                study.measure(point, dtype, start(f"{dtype_name(dtype)}, {point.sweep} {point.value:g}"))
    report.save(output)
    plots = {"rms": output.with_suffix(".png"), "largest": output.with_name(f"{output.stem}-largest.png")}
    for statistic, path in plots.items():
        write_plot(report, statistic, path)
    console.print(grid(report).rich())
    for line in report.exceedances():
        console.print(line, highlight=False)
    console.print(f"Written: {output}, {' and '.join(str(path) for path in plots.values())}", highlight=False)
    return report
