"""Trains a model to predict the next frame. Writes checkpoint.safetensors, history.json and history.png."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torus_kernels import Stream
from torus_kernels.backends import BACKENDS

from ... import checkpoint
from ...checkpoint import CheckpointError
from ...options import add_option as add
from ...options import stream_names
from ..config import FieldConfig
from ..data import FieldData, load_data
from ..evaluate import check_fits
from ..networks import NETWORKS, build_model
from ..train import resumable_configs, train
from ..train_config import FieldTrainConfig
from .options import add_data_options, check_device

HELP = "train a model on trajectories"
DEFAULT_EPOCHS = 10
DEFAULT_RUN_DIR = "runs/field"

_BUDGET = ("epochs", "seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both configurations; grid and channels come from the data."""
    add_data_options(parser)
    parser.add_argument("--output", default=DEFAULT_RUN_DIR, metavar="DIR",
                        help="folder of the run (default: %(default)s)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true",
        help="continue the run in DIR as it was configured; of the other options, those of the budget, "
             "--checkpoint-epochs, --backend and --device may be given anew",
    )
    existing.add_argument("--overwrite", action="store_true", help="start anew although DIR holds a run")
    _add_training_options(parser)
    _add_model_options(parser)


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    run = FieldTrainConfig(epochs=1)
    budget = parser.add_argument_group("budget").add_mutually_exclusive_group()
    add(budget, "--epochs", "passes through the windows to train on; such a run is reproducible", DEFAULT_EPOCHS,
        type=int)
    add(budget, "--seconds", "time of the training steps, without validation and checkpoints", type=float)
    training = parser.add_argument_group("training")
    add(training, "--train-trajectories", "how many of the first to train on (default: all but those to test on)",
        type=int)
    add(training, "--test-trajectories", "how many of the last to test on (default: a sixth)", type=int)
    add(training, "--batch-size", "windows per step", run.batch_size, type=int)
    add(training, "--learning-rate", "peak of the schedule", run.learning_rate, type=float)
    add(training, "--warmup", "part of the budget for the linear warm-up", run.warmup, type=float)
    add(training, "--final-learning-rate", "where the schedule begins and ends, as a part of the peak",
        run.final_learning_rate, type=float)
    add(training, "--weight-decay", "of AdamW, on the weights of linear maps only", run.weight_decay, type=float)
    add(training, "--clip", "largest norm of the gradient", run.clip, type=float)
    add(training, "--unroll", "time steps, each from the predictions before it, that the loss is taken over",
        run.unroll, type=int)
    add(training, "--augment", "train under random shifts, reflections and transpositions of the grid "
        "(default: no)", action=argparse.BooleanOptionalAction)
    add(training, "--seed", "of weights, order, symmetries and dropout", run.seed, type=int)
    add(training, "--backend", "kernels to use (default: the best that can run)", choices=BACKENDS)
    add(training, "--device", "where to train, cpu or cuda", run.device)
    add(training, "--checkpoint-epochs", "epochs from one validation and checkpoint to the next",
        run.checkpoint_epochs, type=int)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    model = FieldConfig()
    group = parser.add_argument_group("model")
    add(group, "--network", "what computes the next frame", model.network, choices=NETWORKS)
    add(group, "--topology", "of the grid: periodic, or cylinder, whose first axis is open (default: what the data "
        "says, else periodic)", choices=("periodic", "cylinder"))
    add(group, "--history", "frames that the model sees", model.history, type=int)
    add(group, "--patch", "side of the square of points that makes a token", model.patch, type=int)
    add(group, "--width", "size of the embedding, or channels", model.width, type=int)
    add(group, "--layers", "number of blocks", model.layers, type=int)
    add(group, "--heads", "attention heads", model.heads, type=int)
    add(group, "--ff-width", "hidden size of the feed-forward layers (default: 4 * width)", type=int)
    add(group, "--winding", "minor steps of the spirals per major step", model.winding, type=int)
    add(group, "--cross-radius", "half-widths of the cross flows' windows", "{} {}".format(*model.cross_radius),
        type=int, nargs=2, metavar=("NARROW", "BROAD"))
    add(group, "--streams", f"streams to use, out of {','.join(s.name for s in Stream)} (default: all)",
        type=stream_names, metavar="NAME,NAME,...")
    add(group, "--token-gated", "stream weights from each token, or one set per head (default: each token)",
        action=argparse.BooleanOptionalAction)
    add(group, "--window", "side of the windows of the windowed networks, in tokens", model.window, type=int)
    add(group, "--modes", "Fourier modes per axis and sign of the Fourier network", model.modes, type=int)
    add(group, "--dropout", "probability on the output of each branch", model.dropout, type=float)


def _configure(
    run_dir: str, resume: bool, data: FieldData, given: dict[str, Any]
) -> tuple[FieldTrainConfig, FieldConfig]:
    model_fields = {f.name for f in dataclasses.fields(FieldConfig)}
    of_model = {name: value for name, value in given.items() if name in model_fields}
    of_run = {name: value for name, value in given.items() if name not in model_fields}
    has_budget = any(name in given for name in _BUDGET)
    if resume:
        if of_model:
            raise ValueError(f"a resumed run keeps its model, but got {', '.join(sorted(of_model))}")
        config, model_config = resumable_configs(run_dir)
        budget = dict.fromkeys(_BUDGET) if has_budget else {}
        return dataclasses.replace(config, **budget | of_run), model_config
    of_data = {
        "grid": data.grid, "channels": data.frames.shape[2],
        "static_channels": 0 if data.static is None else data.static.shape[1],
        "topology": data.parameters.get("topology", "periodic"),
    }
    config = FieldTrainConfig(**({} if has_budget else {"epochs": DEFAULT_EPOCHS}) | of_run)
    return config, FieldConfig(**of_data | of_model)


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Reads the data and checks that the run can begin."""
    fields = {f.name for c in (FieldConfig, FieldTrainConfig) for f in dataclasses.fields(c)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    run_dir, resume = options.output, options.resume
    if not resume and not options.overwrite and Path(run_dir, checkpoint.FILE_NAME).exists():
        raise CheckpointError(f"{run_dir} holds a run: --resume continues it, --overwrite starts anew")
    data = load_data(options.data, options.forcing)
    config, model_config = _configure(run_dir, resume, data, given)
    check_fits(model_config, data, horizon=config.unroll)
    check_device(config.device)
    with torch.device("meta"):  # the network checks its own settings; shapes alone
        build_model(model_config, config.backend)

    def run() -> None:
        result = train(config, model_config, data, run_dir, resume=resume)
        print(f"relative L2 error {result.test_error:.4f} in one step after {len(result.history.losses)} steps, "
              f"{result.seconds_per_epoch:.1f} s per epoch; "
              f"wrote {result.checkpoint}, {result.history_file} and {result.plot_file}")

    return run
