"""Decoding: the time of one token of one layer, over the length of the sequence, beside dense caches."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from torus_kernels import TorusKVCache, torus_attention_decode

from . import arguments, environment, plots
from .accuracy import checks, refuse_wrong
from .candidates import OPERATOR, best_cpu_backend
from .peers.decode import DenseCache, GatheredCache
from .progress import Say, steps
from .report import Accuracy, Case, Measurement, Report
from .suite import dtype_name
from .tables import decode_grid
from .timing import time_side_by_side
from .workloads import WORKLOADS, Workload, make_inputs, smaller

DECODE = "decode"
"""The direction of these cases."""

LENGTHS = (Fraction(1, 4), Fraction(1), Fraction(3))
"""Tokens in the cache before the token that is timed, in units of the window."""

GATHERED, DENSE = "compose", "flash"


@dataclass(frozen=True)
class DecodeWorkload:
    """A causal workload decoded with fewer key/value heads than heads, or as many."""

    name: str
    workload: Workload
    kv_heads: int

    def describe(self) -> str:
        return (f"{self.workload.lattice.num_sites} slots, B={self.workload.cpu_batch} H={self.workload.heads} "
                f"Hkv={self.kv_heads} D={self.workload.head_dim}")


def _workloads() -> dict[str, DecodeWorkload]:
    chosen = [DecodeWorkload(name, WORKLOADS[name], WORKLOADS[name].heads) for name in ("text-32k", "text-4k")]
    small = smaller(WORKLOADS["text-4k"], 32)
    chosen.append(DecodeWorkload("text-1k", small, small.heads))
    chosen.append(DecodeWorkload("text-32k-grouped", WORKLOADS["text-32k"], 4))
    return {workload.name: workload for workload in chosen}


DECODE_WORKLOADS = _workloads()


def add_parser(commands) -> None:
    """The command ``decode``."""
    parser = commands.add_parser(
        "decode", help="time of one token of one layer",
        description="Times one decoded token of one layer (append and attention) after several lengths, beside SDPA "
                    "over a dense cache of as many slots and a composition that gathers the visible slots; writes a "
                    "report (JSON) and a plot (PNG).",
    )
    arguments.add_choice(parser, "--workloads", DECODE_WORKLOADS, tuple(DECODE_WORKLOADS), "windows to time")
    arguments.add_dtypes(parser)
    arguments.add_seconds(parser, 10.0)
    arguments.add_output(parser, "decode")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    environment.restart_with_warm_memory()
    run([DECODE_WORKLOADS[name] for name in given.workloads], arguments.dtypes(given.dtypes), seconds=given.seconds,
        output=given.output, console=console)


def after(length: Fraction) -> str:
    """The name under which the operator after ``length`` windows is kept."""
    return OPERATOR if length == 1 else f"{OPERATOR}@{length}"


def _tokens(length: Fraction) -> str:
    return "N tokens" if length == 1 else f"N/{length.denominator} tokens" if length < 1 else f"{length}N tokens"


def labels(backend: str) -> dict[str, str]:
    """What tables call the candidates."""
    return {
        **{after(length): f"{OPERATOR} ({backend}), after {_tokens(length)}" for length in LENGTHS},
        GATHERED: "visible slots gathered", DENSE: "SDPA over a dense cache of N",
    }


class Decode:
    """Measures the time of a token into a report.

    Args:
        backend: of the operator.
        seconds: how long the rounds of one case go on.
    """

    def __init__(self, backend: str, *, seconds: float) -> None:
        self.report = Report(environment.machine(), backend, labels=labels(backend), kind="decode")
        self._backend, self._seconds = backend, seconds

    def measure(self, decoded: DecodeWorkload, dtype: torch.dtype, say: Say) -> None:
        """Checks and times the token after every length.

        The rounds run every candidate once, and each walks through caches of its own: a token finds its cache cold, as
        it does after the other layers of a model.

        Raises:
            WrongResult: the operator or the gathered composition exceeds its error budget.
        """
        case = Case(decoded.name, dtype_name(dtype), DECODE)
        self.report.workloads[decoded.name] = decoded.describe()
        workload, num_slots = decoded.workload, decoded.workload.lattice.num_sites
        say("filling caches")
        # As many tokens as there are slots, again and again; of q and the state the newest token's.
        inputs = make_inputs(workload.lattice, batch=workload.cpu_batch, heads=workload.heads,
                             head_dim=workload.head_dim, dtype=dtype)
        k, v = (x[:, : decoded.kv_heads] for x in (inputs.k, inputs.v))
        q, state, new_k, new_v = (x[:, :, -1:].contiguous() for x in (inputs.q, inputs.state, k, v))
        options = {"stream_weights": inputs.weights, "decay": inputs.decay, "ema_state": state,
                   "ema_alpha": inputs.alpha}

        def filled(length: int, wide: torch.dtype = dtype) -> TorusKVCache:
            cache = TorusKVCache(workload.lattice, workload.cpu_batch, decoded.kv_heads, workload.head_dim, wide)
            while len(cache) < length:
                count = min(num_slots, length - len(cache))
                cache.append(k[:, :, :count].to(wide), v[:, :, :count].to(wide))
            return cache

        def token_of(cache: TorusKVCache, backend: str = self._backend) -> Callable[[], Tensor]:
            wide = cache.dtype
            parameter = torch.float64 if wide == torch.float64 else torch.float32
            given = {name: x.to(wide if name == "ema_state" else parameter) for name, x in options.items()}
            query, key, value = (x.to(wide) for x in (q, new_k, new_v))

            def run() -> Tensor:
                cache.append(key, value)
                return torus_attention_decode(query, cache, backend=backend, **given)

            return run

        runs: dict[str, Callable[[], object]] = {}
        worst = None
        for fraction in LENGTHS:
            length = max(1, int(fraction * num_slots))
            say(f"checking after {length} tokens")
            truth = {"out": token_of(filled(length, torch.float64), "reference")()}
            plain = {"out": token_of(filled(length), "reference")()}
            name = after(fraction)
            runs[name] = token_of(filled(length))
            check, = refuse_wrong(self.report.labels[name], checks({"out": runs[name]()}, truth, plain))
            worst = check if worst is None else max(worst, check, key=lambda c: c.error / c.budget)
            if fraction == 1:
                gathered = GatheredCache(workload.lattice, *_slots(filled(length)), length, inputs.decay)
                runs[GATHERED] = lambda cache=gathered: cache.step(q, new_k, new_v, inputs.weights, state, inputs.alpha)
                refuse_wrong(self.report.labels[GATHERED],
                             checks({"out": runs[GATHERED]()}, truth, plain, peer=True))
        dense = DenseCache(*_slots(filled(num_slots)))
        runs[DENSE] = lambda: dense.step(q, new_k, new_v)
        self.report.accuracy.append(Accuracy(case, OPERATOR, worst))
        say("warming up")
        timings = time_side_by_side(runs, seconds=self._seconds, min_rounds=20, max_rounds=500,
                                    on_round=lambda done: say(f"round {done}"))
        self.report.measurements += [Measurement(case, name, timing) for name, timing in timings.items()]


def _slots(cache: TorusKVCache) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, Hkv, N, D]``, each contiguous as a cache without interleaving has them."""
    return cache.keys.contiguous(), cache.values.contiguous()


def run(
    workloads: Sequence[DecodeWorkload], dtypes: Sequence[torch.dtype], *, seconds: float, output: Path,
    console: Console,
) -> Report:
    """Measures, prints the table and writes ``output`` and a plot beside it.

    Raises:
        WrongResult: the operator exceeds its error budget.
        OSError: a file cannot be written.
    """
    decode = Decode(best_cpu_backend(), seconds=seconds)
    report = decode.report
    console.print(environment.describe(report.machine), highlight=False)
    cases = [(workload, dtype) for workload in workloads for dtype in dtypes]
    with torch.inference_mode(), steps(console, len(cases)) as start:
        for workload, dtype in cases:
            decode.measure(workload, dtype, start(f"Timing {workload.name}, {dtype_name(dtype)}"))
    report.save(output)
    plots.write_decode(report, output.with_suffix(".png"))
    console.print(decode_grid(report).rich())
    console.print(f"Written: {output} and {output.with_suffix('.png')}", highlight=False)
    return report
