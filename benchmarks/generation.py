"""Generation far past the lattice: the time of a token over the length of the text, with a cache and without."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from torus_model.generate import generate
from torus_model.lm import ModelConfig, TorusLM

from . import arguments, environment
from .progress import Say, steps
from .report import ReportError, reading
from .tables import Grid
from .timing import Spread, Timing, time_side_by_side, timings_of

KIND, FORMAT = "generation", 1

WAYS = {"cached": "with the cache", "recomputed": "the whole text at every token"}
"""How a token is made, and what tables call it."""

LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Where tokens are timed: texts so many lattices long."""

ENDLESS = 10**9

MOST_ROUNDS = 200

LONGEST = {"cached": LENGTHS[-1], "recomputed": 4.0}
"""Longer texts are left out: without a cache, the time of a token grows with its text."""


@dataclass
class GenerationReport:
    """All that was measured.

    Attributes:
        machine: `environment.machine`.
        model: `ModelConfig.to_dict`.
        timings: of a token, by ``way@tokens`` for a way of `WAYS` and the tokens before it; all in the same rounds.
    """

    machine: dict[str, Any]
    model: dict[str, Any]
    timings: dict[str, Timing] = field(default_factory=dict)

    @property
    def sites(self) -> int:
        """Of the lattice (N)."""
        return ModelConfig.from_dict(self.model).lattice.num_sites

    def lengths(self, way: str) -> list[int]:
        """Tokens before those that were timed, from the fewest."""
        names = (name.rpartition("@") for name in self.timings)
        return sorted(int(tokens) for of, _, tokens in names if of == way)

    def spread(self, way: str, tokens: int) -> Spread:
        """Seconds of a token."""
        return self.timings[f"{way}@{tokens}"].spread

    def save(self, path: Path) -> None:
        """Writes JSON.

        Raises:
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"kind": KIND, "format": FORMAT} | dataclasses.asdict(self)
        for timing in fields["timings"].values():
            timing["seconds"] = [float(f"{seconds:.4g}") for seconds in timing["seconds"]]
        path.write_text(json.dumps(fields) + "\n")

    @classmethod
    def load(cls, path: Path) -> GenerationReport:
        """The report of `save`.

        Raises:
            ReportError: the file holds none.
            OSError: it cannot be read.
        """
        with reading(path, KIND, FORMAT) as fields:
            return cls(fields["machine"], fields["model"], timings_of(fields["timings"]))


def add_parser(commands) -> None:
    """The command ``generation``."""
    parser = commands.add_parser(
        "generation", help="time of a generated token far past the lattice",
        description="Lets an untrained model write a text many times as long as its lattice, and times tokens on the "
                    "way: with the cache, whose memory is constant, and, in shorter texts, running the whole text at "
                    "every token. Writes a report (JSON) and a plot (PNG).",
    )
    default = ModelConfig()
    positive = functools.partial(arguments.at_least, 1)
    for name, what in (("n_major", "sites of the lattice along the major loop"), ("n_minor", "along the minor loop"),
                       ("width", "of the model"), ("layers", "of the model"), ("heads", "of the model")):
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=getattr(default, name), metavar="N",
                            help=f"{what} (default: %(default)s)")
    arguments.add_seconds(parser, 30.0)
    arguments.add_output(parser, KIND)
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    try:
        config = ModelConfig(width=given.width, layers=given.layers, heads=given.heads, n_major=given.n_major,
                             n_minor=given.n_minor)
    except (TypeError, ValueError) as error:
        raise ReportError(str(error)) from error
    environment.restart_with_warm_memory()
    run(config, seconds=given.seconds, output=given.output, console=console)


class Generation:
    """Times tokens of an untrained `TorusLM` into a report.

    Args:
        config: the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = TorusLM(config).eval()
        self.report = GenerationReport(environment.machine(), config.to_dict())

    def written(self, way: str, tokens: int) -> Iterator[int]:
        """A text of ``tokens`` tokens that goes on when it is asked to. A quarter of a lattice is its prompt; with the
        cache it has been written from there token by token."""
        lattice = self.report.sites
        prompted = max(1, min(tokens, lattice // 4)) if way == "cached" else tokens
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self.model.config.vocab_size, (prompted,), generator=generator)
        text = generate(self.model, prompt, ENDLESS, generator=generator, use_cache=way == "cached")
        for _ in range(tokens - prompted):
            next(text)
        return text

    def measure(self, seconds: float, say: Say) -> None:
        """Writes a text for every way and length, and times what follows: one token of each in every round.

        Args:
            seconds: how long the rounds go on.
            say: is told of every text and round.
        """
        candidates = {}
        for way, longest in LONGEST.items():
            for length in (length for length in LENGTHS if length <= longest):
                tokens = max(1, round(length * self.report.sites))
                say(f"writing {tokens} tokens, {WAYS[way]}")
                candidates[f"{way}@{tokens}"] = functools.partial(next, self.written(way, tokens))
        self.report.timings = time_side_by_side(
            candidates, seconds=seconds, max_rounds=MOST_ROUNDS, on_round=lambda done: say(f"round {done}"),
        )


def run(config: ModelConfig, *, seconds: float, output: Path, console: Console) -> GenerationReport:
    """Measures, prints the table and writes ``output`` and a plot beside it.

    Raises:
        OSError: a file cannot be written.
    """
    generation = Generation(config)
    console.print(environment.describe(generation.report.machine), highlight=False)
    with steps(console, 1) as start:
        generation.measure(seconds, start("Timing tokens"))
    generation.report.save(output)
    write_plot(generation.report, output.with_suffix(".png"))
    console.print(grid(generation.report).rich())
    console.print(f"Written: {output} and {output.with_suffix('.png')}", highlight=False)
    return generation.report


def grid(report: GenerationReport) -> Grid:
    """Milliseconds of a token, a row for each length: median and quartiles."""
    rows = []
    for tokens in report.lengths("cached"):
        row = [f"{tokens:,}", f"{tokens / report.sites:g} N"]
        for way in WAYS:
            if tokens not in report.lengths(way):
                row += ["-", "-"]
                continue
            spread = report.spread(way, tokens)
            row += [f"{spread.median * 1e3:.2f} ({spread.lower * 1e3:.2f}-{spread.upper * 1e3:.2f})",
                    f"{1 / spread.median:.0f}"]
        rows.append(row)
    head = [f"{name}: {unit}" for name in WAYS.values() for unit in ("ms a token", "tokens a second")]
    return Grid("Time of a generated token", ("tokens before it", "of the lattice", *head), rows, left=0)


def markdown(report: GenerationReport) -> str:
    """The table, and how it was made."""
    model = ModelConfig.from_dict(report.model)
    return (f"{grid(report).markdown()}\n\nMedian and quartiles of rounds that write one token of every text, sampling "
            f"included. Untrained model of width {model.width}, {model.layers} layers and {model.heads} heads on a "
            f"lattice of {model.n_major}x{model.n_minor} = {report.sites} sites (N). With the cache, texts were "
            f"written token by token from a prompt of N/4 on. {environment.describe(report.machine)}.")


def write_plot(report: GenerationReport, path: Path) -> None:
    """Time of a token over the length of the text, as a PNG."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, (way, label) in enumerate(WAYS.items()):
        lengths = report.lengths(way)
        spreads = [report.spread(way, tokens) for tokens in lengths]
        error = [[(s.median - s.lower) * 1e3 for s in spreads], [(s.upper - s.median) * 1e3 for s in spreads]]
        axes.errorbar(lengths, [s.median * 1e3 for s in spreads], yerr=error, marker="o", ms=4, capsize=2,
                      color=f"C{place}", label=label)
    axes.axvline(report.sites, color="0.7", lw=0.8, zorder=0)
    axes.annotate(" N", (report.sites, 0.98), xycoords=("data", "axes fraction"), va="top", color="0.4")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens in the text", ylabel="milliseconds a token: median and quartiles",
             title="Generation past the lattice")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
