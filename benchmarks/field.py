"""Periodic fields: torus attention beside other networks, trained alike on the same physics."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from torus_model import checkpoint
from torus_model.checkpoint import CheckpointError
from torus_model.field import (
    FieldConfig,
    FieldData,
    FieldScores,
    FieldTrainConfig,
    equal_parameters,
    evaluate,
    load_data,
    load_field_model,
    number_of_parameters,
    save_data,
    train,
)
from torus_model.field.commands.options import check_device
from torus_model.field.generation import NavierStokesTask, generate
from torus_model.field.random_field import AMPLITUDES
from torus_model.field.run import FieldRun, fingerprint
from torus_model.field.train import FieldTrainingResult

from . import arguments, environment, field_plots
from .field_report import LABELS, FieldReport, Trained, grid
from .progress import Say, steps
from .report import ReportError
from .timing import Timing, time_side_by_side


@dataclass(frozen=True)
class Settings:
    """A comparison. The defaults end within 40 minutes on two cores.

    Attributes:
        task: the data, where no file is given.
        train, test: trajectories.
        model: of the torus; the other networks are made as large.
        training: of all networks; ``seed`` is not looked at.
        seeds: of initial weights and batches.
        networks: names of `LABELS`.
    """

    task: NavierStokesTask = NavierStokesTask(trajectories=120, initial="generator")  # noqa: RUF009 (frozen)
    train: int = 100
    test: int = 20
    model: FieldConfig = FieldConfig(width=64, cross_radius=(1, 3), static_channels=1)  # noqa: RUF009 (frozen)
    training: FieldTrainConfig = FieldTrainConfig(epochs=10, learning_rate=2e-3, checkpoint_epochs=10)  # noqa: RUF009 (frozen)
    seeds: tuple[int, ...] = (0, 1)
    networks: tuple[str, ...] = tuple(LABELS)


CPU = Settings()

FULL = Settings(
    task=NavierStokesTask(trajectories=1200, solve_resolution=256, initial="generator"),
    train=1000, test=200,
    model=FieldConfig(width=192, layers=6, heads=6, patch=2, cross_radius=(3, 7), window=8, static_channels=1),
    training=FieldTrainConfig(epochs=50, augment=True, device="cuda", checkpoint_epochs=5),
    seeds=(0,),
)
"""The task of the literature, for a GPU."""


def add_parser(commands) -> None:
    """The command ``field``."""
    parser = commands.add_parser(
        "field", help="train torus attention and its peers on periodic turbulence: errors and seams",
        description="Trains networks of equal size on the same trajectories of 2D Navier-Stokes with the same "
                    "settings: torus attention, its loops alone, shifted windows with the usual seam mask and with "
                    "periodic wrap, dense attention, a Fourier neural operator and a circular U-Net. Reports errors "
                    "in one step and over the rollout, the error at the seam over that elsewhere, the equivariance "
                    "error, and the time of an epoch. Writes a report (JSON) and plots (PNG). At most 40 minutes on "
                    "2 cores. Runs that are complete in --runs are not repeated.",
    )
    parser.add_argument("--full", action="store_true",
                        help="the task of the literature, 1000 trajectories, larger models, more epochs: for a GPU")
    parser.add_argument("--data", type=Path, metavar="FILE",
                        help="trajectories to use (default: made by our solver and kept in --runs)")
    parser.add_argument("--forcing", help="of a .mat or .npy file: the forcing that made it")
    parser.add_argument("--runs", type=Path, default=Path("runs/field-comparison"), metavar="DIR",
                        help="folder for the data and the runs (default: %(default)s)")
    arguments.add_choice(parser, "--networks", LABELS, tuple(LABELS), "networks to train")
    parser.add_argument("--seeds", type=functools.partial(arguments.at_least, 1), metavar="N",
                        help=f"how many (default: {len(CPU.seeds)}, full {len(FULL.seeds)})")
    for flag, name in (("--epochs", "epochs"), ("--train", "train"), ("--test", "test"), ("--width", "width")):
        default, full = (getattr(getattr(s, of), name) if of else getattr(s, name)
                         for of in [{"epochs": "training", "width": "model"}.get(name)] for s in (CPU, FULL))
        parser.add_argument(flag, type=functools.partial(arguments.at_least, 1), metavar="N",
                            help=f"(default: {default}, full {full})")
    parser.add_argument("--augment", action="store_true", default=None, help="train under random symmetries")
    parser.add_argument("--initial", choices=AMPLITUDES,
                        help="amplitude of the initial fields of the data to make: that of the code published with the "
                             "public data, or the paper's, with which the flow stays close to the forcing "
                             f"(default: {CPU.task.initial})")
    parser.add_argument("--viscosity", type=float, help=f"of the data to make (default: {CPU.task.viscosity})")
    parser.add_argument("--device",
                        help=f"where to train (default: {CPU.training.device}, full {FULL.training.device})")
    arguments.add_seconds(parser, 60.0)
    arguments.add_output(parser, "field")
    parser.set_defaults(run=_run)


def settings_of(given: argparse.Namespace) -> Settings:
    """What the command line asks for."""
    base = FULL if given.full else CPU
    train_count, test_count = given.train or base.train, given.test or base.test
    asked = {name: value for name in ("viscosity", "initial") if (value := getattr(given, name)) is not None}
    if asked and given.data:
        raise ValueError(f"--{' and --'.join(asked)} are for data that is to be made, but --data names some")
    if given.forcing and not given.data:
        raise ValueError("--forcing is for the file of --data, but there is none")
    task = dataclasses.replace(base.task, trajectories=train_count + test_count, **asked)
    training = dataclasses.replace(
        base.training, epochs=given.epochs or base.training.epochs,
        device=check_device(given.device or base.training.device),
        augment=base.training.augment if given.augment is None else given.augment,
        train_trajectories=train_count, test_trajectories=test_count,
    )
    model = dataclasses.replace(base.model, width=given.width or base.model.width)
    seeds = base.seeds if given.seeds is None else tuple(range(given.seeds))
    networks = tuple(name for name in LABELS if name in given.networks)
    return Settings(task, train_count, test_count, model, training, seeds, networks)


def _run(given: argparse.Namespace, console: Console) -> None:
    try:
        settings = settings_of(given)
    except (TypeError, ValueError) as error:
        raise ReportError(str(error)) from error
    environment.restart_with_warm_memory()
    data = load_data(given.data, given.forcing) if given.data else _make_data(settings, given.runs, console)
    try:
        comparison = Comparison(settings, data, given.runs)
    except (TypeError, ValueError) as error:
        raise ReportError(str(error)) from error
    run(comparison, seconds=given.seconds, output=given.output, console=console)


def _make_data(settings: Settings, runs: Path, console: Console) -> FieldData:
    """The trajectories of our solver: from ``runs``, where they have been made before."""
    task = settings.task
    path = runs / (f"navier-stokes-{task.viscosity:g}-{task.initial}-{task.trajectories}x{task.solve_resolution}to"
                   f"{task.resolution}-seed{task.seed}.safetensors")
    if path.is_file():
        return load_data(path)
    runs.mkdir(parents=True, exist_ok=True)
    made = 0
    with steps(console, 1) as start:
        say = start(f"Solving Navier-Stokes at {task.solve_resolution}x{task.solve_resolution}")

        def on_batch(trajectories: int) -> None:
            nonlocal made
            made += trajectories
            say(f"{made} of {task.trajectories} trajectories")

        data = generate(task, device=settings.training.device, on_batch=on_batch)
    save_data(path, data)
    return data


def edge_profile(error: Tensor, patch: int) -> tuple[float, ...]:
    """Root mean square of errors ``[H, W]`` on rings one patch wide, from the edge of the array to its middle, divided
    by that of all points."""
    height, width = error.shape
    rows, columns = torch.arange(height), torch.arange(width)
    distance = torch.minimum(torch.minimum(rows, height - 1 - rows)[:, None],
                             torch.minimum(columns, width - 1 - columns))
    squares = error.double().square()
    of_all = squares.mean()
    ring = distance // patch
    return tuple((squares[ring == r].mean() / of_all).sqrt().item() for r in range(int(ring.max()) + 1))


class Comparison:
    """Trains and evaluates networks on the same data into a report.

    Args:
        settings: what to compare.
        data: the trajectories.
        runs: folder for one run of each network and seed; complete ones that it holds are not repeated.
    """

    def __init__(self, settings: Settings, data: FieldData, runs: Path) -> None:
        self.settings, self.data, self.runs = settings, data, runs
        self.training = dataclasses.replace(
            settings.training, train_trajectories=settings.train, test_trajectories=settings.test,
        )
        base = dataclasses.replace(
            settings.model, grid=data.grid, channels=data.frames.shape[2],
            static_channels=0 if data.static is None else data.static.shape[1],
            topology=data.parameters.get("topology", settings.model.topology),
        )
        self.models = {name: equal_parameters(base, name) for name in settings.networks}
        self.test = data.select(slice(len(data) - settings.test, None))
        horizon = data.frames.shape[1] - base.history
        run = self._field_run(next(iter(self.models)), seed=0)
        self.report = FieldReport(
            environment.machine(), data.parameters,
            task={"train": settings.train, "test": settings.test, "grid": list(base.grid), "patch": base.patch,
                  "history": base.history, "horizon": horizon},
            training=self.training.to_dict(), steps_per_epoch=run.steps_per_epoch,
            models={name: config.to_dict() for name, config in self.models.items()},
        )
        self.maps: dict[str, Tensor] = {}

    def _field_run(self, network: str, seed: int) -> FieldRun:
        return FieldRun(dataclasses.replace(self.training, seed=seed), self.models[network], self.data)

    def _training_steps(self, network: str) -> Iterator[float]:
        """Makes a training step whenever its loss is asked for, without an end."""
        endless = dataclasses.replace(self.training, epochs=10**6, seed=0)
        run = FieldRun(endless, self.models[network], self.data)
        while True:
            yield from run.epoch()

    def time_steps(self, seconds: float, say: Say) -> dict[str, Timing]:
        """Times a training step of every network, all of them in the same rounds."""
        candidates = {network: functools.partial(next, self._training_steps(network)) for network in self.models}
        self.report.steps = time_side_by_side(candidates, seconds=seconds, on_round=lambda done: say(f"round {done}"))
        return self.report.steps

    def train(self, network: str, seed: int, say: Say) -> Trained:
        """Trains and evaluates one network."""
        folder = self.runs / f"{network}-{seed}"
        config = dataclasses.replace(self.training, seed=seed)
        losses = self._losses_of(folder, network, config)
        if losses is None or len(losses) < (config.epochs or 0) * self.report.steps_per_epoch:
            say("training")
            result: FieldTrainingResult = train(
                config, self.models[network], self.data, folder, resume=losses is not None, progress=False,
                on_epoch=lambda epoch: say(f"epoch {epoch.epoch:g} of {config.epochs}"),
            )
            losses = result.history.losses
        say("evaluating")
        model = load_field_model(folder, config.backend).to(config.device)
        scores: FieldScores = evaluate(model, self.test)
        self.maps.setdefault(network, scores.one_step_map)
        per_epoch = self.report.steps_per_epoch
        means = tuple(sum(losses[i:i + per_epoch]) / len(losses[i:i + per_epoch])
                      for i in range(0, len(losses), per_epoch))
        trained = Trained(network, seed, number_of_parameters(model), scores.to_dict(),
                          edge_profile(scores.one_step_map, self.report.task["patch"]), means)
        self.report.trained.append(trained)
        return trained

    def _losses_of(self, folder: Path, network: str, config: FieldTrainConfig) -> list[float] | None:
        """The losses of the same run, complete or not, where ``folder`` holds it."""
        try:
            _, metadata = checkpoint.load(folder, prefix="none")
            same = (
                FieldTrainConfig.from_dict(metadata["field_train_config"]) == config
                and FieldConfig.from_dict(metadata["field_config"]) == self.models[network]
                and metadata["data_fingerprint"] == fingerprint(self.data)
            )
            losses = metadata["history"]["losses"]
        except (CheckpointError, KeyError, TypeError, ValueError):
            return None
        return losses if same else None


def run(comparison: Comparison, *, seconds: float, output: Path, console: Console) -> FieldReport:
    """Times, trains and evaluates every network, prints the table and writes ``output`` and plots beside it.

    Raises:
        TrainingError: a loss is no longer finite.
        OSError: a file cannot be written.
    """
    settings, report = comparison.settings, comparison.report
    console.print(environment.describe(report.machine), highlight=False)
    with steps(console, 1 + len(settings.networks) * len(settings.seeds)) as start:
        comparison.time_steps(seconds, start("Timing training steps"))
        for seed in settings.seeds:
            for network in settings.networks:
                comparison.train(network, seed, start(f"{LABELS[network]}, seed {seed}"))
                report.save(output)
    field_plots.write_seam(report, output.with_suffix(".png"))
    errors, maps = (output.with_name(f"{output.stem}-{name}.png") for name in ("errors", "maps"))
    field_plots.write_errors(report, errors)
    field_plots.write_maps(comparison.maps, maps)
    console.print(grid(report).rich())
    console.print(f"Written: {output}, {output.with_suffix('.png')}, {errors} and {maps}", highlight=False)
    return report
