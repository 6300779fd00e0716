"""Dynamic training on small runs: what each of its features changes, and what becomes of the loss."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from torus_model import ModelConfig, TorusLM
from torus_model.growth import grow
from torus_model.run import Run
from torus_model.train import TrainConfig

from . import arguments, environment
from .dynamics_report import DynamicsReport, Trained, grid, write_plots
from .progress import steps

MODEL = ModelConfig(width=64, layers=2, heads=4, n_major=8, n_minor=16)
SEQ_LEN, BATCH = 128, 4
SMALL = dataclasses.replace(MODEL, width=32, heads=2)
"""Half the width of `MODEL`, which it grows to."""

CURRICULUM = {"curriculum": (16, 32, 64), "curriculum_loss": (3.4, 3.1, 2.8), "curriculum_patience": 10,
              "curriculum_limit": 0.25}
SMALLEST_BATCH, LARGEST_BATCH = 2, 32


def base_config(seed: int, length: int, **changes: Any) -> TrainConfig:
    """A run of ``length`` steps with everything constant but the cosine of the learning rate."""
    fields = {
        "model": MODEL, "steps": length, "max_bytes": 2**22, "seq_len": SEQ_LEN, "batch_size": BATCH, "warmup": 0.1,
        "validations": 8, "validation_windows": 16, "seed": seed,
    }
    return TrainConfig(**(fields | changes))


def train(feature: str, name: str, config: TrainConfig) -> tuple[Trained, Run]:
    """Runs a configuration, without files."""
    run = Run(config)
    series: dict[str, list[float | None]] = {"rate": [], "parameters": [], "alpha": []}
    points, operations, validated = [], 0.0, 0

    def validate() -> None:
        point = run.validate()
        points.append((float(run.step), float(point.tokens), operations, point.bits_per_byte))

    validate()
    while not run.is_over:
        series["rate"].append(max(group["lr"] for group in run.optimizer.param_groups))
        run.advance()
        size = sum(p.numel() for p in run.model.parameters())
        operations += 6.0 * size * run.history.batch_sizes[-1] * run.history.seq_lens[-1]
        series["parameters"].append(float(size))
        series["alpha"].append(mean_alpha(run.model))
        if (due := int(run.progress * config.validations)) > validated:
            validate()
            validated = due
    history = run.history
    series |= {"tokens per sequence": list(map(float, history.seq_lens)), "noise scale": history.noise_scales,
               "batch size": list(map(float, history.batch_sizes))}
    kept = {key: tuple(values) for key, values in series.items() if key in _SHOWN[feature]}
    return Trained(feature, name, config.seed, tuple(points), kept), run


_SHOWN = {
    "schedules": ("rate",), "layer-wise rates": (), "curriculum": ("tokens per sequence",),
    "batch size": ("noise scale", "batch size"), "growth": ("parameters",), "alpha": ("alpha",),
}
"""The series that reports keep of each feature's runs."""


def mean_alpha(model: TorusLM) -> float:
    """Over the heads of all layers that compound."""
    with torch.no_grad():
        found = [alpha for block in model.blocks if (alpha := block.attention.alpha()) is not None]
        return float(torch.cat(found).mean())


def layers_of(run: Run) -> list[tuple[float, float]]:
    """`DynamicsReport.layers` of a run."""
    start = Run(run.config).model.state_dict()
    rates = {name: group["initial_lr"] for group in run.optimizer.param_groups for name in group["param_names"]}
    found = []
    for part in ("embedding.", *(f"blocks.{i}." for i in range(run.model.config.layers))):
        names = [name for name, _ in run.model.named_parameters() if name.startswith(part)]
        before = torch.cat([start[name].flatten() for name in names])
        after = torch.cat([run.model.get_parameter(name).detach().flatten() for name in names])
        found.append((rates[names[0]] / max(rates.values()), float((after - before).norm() / before.norm())))
    return found


def growth_difference(model: TorusLM, dtype: torch.dtype, seed: int) -> float:
    """How much a trained model's logits change when its width and depth double."""
    model = grow(model, generator=torch.Generator()).to(dtype).eval()  # a copy
    grown = grow(model, layers=2 * model.config.layers, width=2 * model.config.width,
                 generator=torch.Generator().manual_seed(seed))
    tokens = torch.randint(model.config.vocab_size, (2, SEQ_LEN), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        before, after = model(tokens), grown(tokens)
    return float((after - before).abs().max() / before.abs().max())


class Study:
    """Measures into a report.

    Args:
        length: steps of the runs that others are compared with.
        seeds: how many times each run is made.
    """

    def __init__(self, length: int, seeds: int) -> None:
        self.length, self.seeds = length, seeds
        self.report = DynamicsReport(environment.machine(), (
            f"Python's standard library as bytes, width {MODEL.width}, {MODEL.layers} layers, lattice "
            f"{MODEL.n_major} x {MODEL.n_minor}, {BATCH} sequences of {SEQ_LEN} tokens where not said otherwise."))

    def parts(self) -> dict[str, Callable[[int], None]]:
        """What is measured for a seed, by name."""
        return {"schedules": self.schedules, "layer-wise rates": self.rates, "curriculum": self.curriculum,
                "batch size": self.batch_size, "growth": self.growth, "alpha": self.alpha}

    def _train(self, feature: str, name: str, seed: int, length: int | None = None, **changes: Any) -> Run:
        trained, run = train(feature, name, base_config(seed, length or self.length, **changes))
        self.report.runs.append(trained)
        return run

    def schedules(self, seed: int) -> None:
        """The three schedules at the same peak."""
        for name in ("cosine", "linear", "step"):
            self._train("schedules", name, seed, schedule=name)

    def rates(self, seed: int) -> None:
        """One rate, and rates that fall by half from layer to layer."""
        for name, decay in (("one rate", 1.0), ("decay 0.5", 0.5)):
            run = self._train("layer-wise rates", name, seed, layer_decay=decay)
            if seed == 0:
                self.report.layers[name] = layers_of(run)

    def curriculum(self, seed: int) -> None:
        """Short sequences first, and as many tokens at full length."""
        run = self._train("curriculum", "curriculum", seed, round(1.5 * self.length), **CURRICULUM)
        self._train("curriculum", "full length", seed, max(1, round(run.tokens / (BATCH * SEQ_LEN))))

    def batch_size(self, seed: int) -> None:
        """A batch that grows, and as many tokens in small and in large batches."""
        run = self._train("batch size", "growing", seed, batch_size=SMALLEST_BATCH, accumulate=2,
                          max_batch_size=LARGEST_BATCH)
        for size in (SMALLEST_BATCH, LARGEST_BATCH):
            self._train("batch size", f"{size} sequences", seed, max(1, round(run.tokens / (size * SEQ_LEN))),
                        batch_size=size)

    def growth(self, seed: int) -> None:
        """A model that doubles its width and depth, and the large one from the start at equal operations."""
        large = dataclasses.replace(MODEL, layers=2 * SMALL.layers)
        run = self._train("growth", "grown", seed, model=SMALL, grow_at=(0.5,), grow_layers=(large.layers,),
                          grow_width=(large.width,))
        operations = self.report.runs[-1].points[-1][2]
        size = sum(p.numel() for p in run.model.parameters())
        self._train("growth", "large from the start", seed, max(1, round(operations / (6 * size * BATCH * SEQ_LEN))),
                    model=large)
        for dtype in (torch.float32, torch.float64):
            name = str(dtype).removeprefix("torch.")
            difference = growth_difference(run.model, dtype, seed)
            self.report.growth[name] = max(difference, self.report.growth.get(name, 0.0))

    def alpha(self, seed: int) -> None:
        """Learned rates of compounding alone, and times a factor that rises over half of the run."""
        self._train("alpha", "learned", seed)
        self._train("alpha", "factor 0.2 to 1", seed, alpha_schedule=(0.2, 1.0), alpha_ramp=0.5)


def add_parser(commands) -> None:
    """The command ``dynamics``."""
    parser = commands.add_parser(
        "dynamics", help="dynamic training on small runs",
        description="Trains small language models with each feature of dynamic training and without it, at equal "
                    "steps, tokens or operations. Writes a report (JSON), a plot of what changes within the runs and "
                    "one of their validation curves (PNG).",
    )
    parser.add_argument("--steps", type=functools.partial(arguments.at_least, 10), default=240, metavar="N",
                        help="steps of the runs that others are compared with (default: %(default)s)")
    parser.add_argument("--seeds", type=functools.partial(arguments.at_least, 1), default=2, metavar="N",
                        help="how many times each run is made (default: %(default)s)")
    arguments.add_output(parser, "dynamics")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    run(given.steps, given.seeds, given.output, console)


def run(length: int, seeds: int, output: Path, console: Console) -> DynamicsReport:
    """Measures, prints the table and writes ``output`` and two plots beside it.

    Raises:
        OSError: a file cannot be written.
    """
    study = Study(length, seeds)
    console.print(environment.describe(study.report.machine), highlight=False)
    with steps(console, seeds * len(study.parts())) as start, torch.random.fork_rng(devices=[]):
        for seed in range(seeds):
            for name, measure in study.parts().items():
                start(f"seed {seed}, {name}")
                measure(seed)
    study.report.save(output)
    plots = output.with_suffix(".png"), output.with_name(f"{output.stem}-curves.png")
    write_plots(study.report, *plots)
    console.print(grid(study.report).rich())
    console.print(f"Written: {output}, {' and '.join(map(str, plots))}", highlight=False)
    return study.report
