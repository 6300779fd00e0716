"""The language model with momentum, several time constants, sinusoids or an adaptive alpha, and its coherence."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from torus_model import ModelConfig
from torus_model.dense import number_of_parameters
from torus_model.train import COHERENCE_PLOT, TrainConfig, train

from . import arguments, environment
from .coherence_report import ADAPTIVE, BASELINE, KIND, OPTIONS, CoherenceReport, Trained, grid, write_plot
from .progress import Say, steps


def add_parser(commands) -> None:
    """The command ``coherence``."""
    parser = commands.add_parser(
        "coherence", help="options of the language model's memory and positions, and its coherence over training",
        description="Trains the language model with one option at a time on the same batches, for the same number of "
                    "steps, and measures bits per byte and the cognitive coherence of the layers. Writes a report "
                    "(JSON) and plots (PNG). Under 5 minutes on 2 cores.",
    )
    positive = functools.partial(arguments.at_least, 1)
    arguments.add_choice(parser, "--options", OPTIONS, list(OPTIONS), f"options to train with; {BASELINE} always is")
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help="of every run (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=2, metavar="N",
                        help="runs of every option (default: %(default)s)")
    parser.add_argument("--every", type=positive, default=10, metavar="STEPS",
                        help="how often coherence is measured (default: %(default)s)")
    parser.add_argument("--data", metavar="PATH",
                        help="file or folder of text (default: the sources of Python's standard library)")
    arguments.add_output(parser, KIND)
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace, console: Console) -> None:
    config = TrainConfig(steps=given.steps, data=given.data, validations=4, validation_windows=16,
                         coherence_every=min(given.every, given.steps))
    run(config, [option for option in OPTIONS if option == BASELINE or option in given.options],
        seeds=given.seeds, output=given.output, console=console)


def train_once(config: TrainConfig, option: str, seed: int, say: Say, plot: Path | None = None) -> Trained:
    """One run, whose plot of the coherence of its layers goes to ``plot``.

    Raises:
        DataError: the text is missing or too short.
        TrainingError: the loss is no longer finite.
    """
    model = ModelConfig(**config.model.to_dict() | OPTIONS[option])
    with tempfile.TemporaryDirectory() as folder:
        result = train(dataclasses.replace(config, model=model, seed=seed), folder, progress=False,
                       on_validation=lambda point: say(f"step {point.step}"))
        if plot is not None:
            plot.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder, COHERENCE_PLOT), plot)
    history = result.history
    return Trained(
        option, seed, number_of_parameters(result.model), tuple(point.step for point in history.validation),
        tuple(point.bits_per_byte for point in history.validation),
        tuple(dataclasses.asdict(point) for point in history.coherence),
    )


def run(
    config: TrainConfig, options: Sequence[str], *, seeds: int, output: Path, console: Console
) -> CoherenceReport:
    """Trains, prints the table and writes ``output`` and two plots beside it, of all options and of the layers of one
    run; raises as `train_once`.

    Args:
        config: of the baseline; the seed is that of each run.
        options: of `OPTIONS`.
        seeds: runs of each option.
    """
    fields = config.to_dict()
    del fields["seed"]
    report = CoherenceReport(environment.machine(), fields)
    plot, layers = output.with_suffix(".png"), output.with_name(f"{output.stem}-layers.png")
    shown = (ADAPTIVE if ADAPTIVE in options else options[-1], 0)
    console.print(environment.describe(report.machine), highlight=False)
    with steps(console, seeds * len(options)) as start:
        for seed in range(seeds):
            for option in options:
                say = start(f"{option}, seed {seed}")
                report.trained.append(
                    train_once(config, option, seed, say, layers if (option, seed) == shown else None)
                )
    report.save(output)
    write_plot(report, plot)
    console.print(grid(report).rich())
    console.print(f"Written: {output}, {plot} and {layers}", highlight=False)
    return report
