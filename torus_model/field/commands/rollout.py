"""Predicts a trajectory from its first frames. Writes rollout.png and rollout.gif, with truth, prediction and error
side by side, and rollout-error.png."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ...checkpoint import locate
from ..data import FieldDataError, Windows
from ..evaluate import check_fits
from ..losses import relative_l2
from ..pictures import write_animation, write_errors_over_time, write_rollout
from .options import add_data_options, add_model_options, load_model_and_data

HELP = "draw a predicted trajectory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to predict and what to draw."""
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument("--trajectory", type=int, metavar="N",
                        help="its number in the file, from 0 (default: the last, which runs test on)")
    parser.add_argument("--channel", type=int, default=0, help="channel to draw (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", metavar="STEP",
                        help="steps of the rollout for the PNG, from 1 (default: five, evenly)")
    parser.add_argument("--frames-per-second", type=float, default=2.0,
                        help="speed of the GIF (default: %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="folder to write to (default: that of the checkpoint)")


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Reads model and data."""
    model, data = load_model_and_data(options)
    config = model.config
    check_fits(config, data)
    horizon = data.frames.shape[1] - config.history
    number = len(data) - 1 if options.trajectory is None else options.trajectory
    steps = options.steps or sorted({math.ceil(horizon * part / 5) for part in range(1, 6)})
    for flag, value, low, high in (
        ("--trajectory", number, 0, len(data) - 1), ("--channel", options.channel, 0, config.channels - 1),
        *(("--steps", step, 1, horizon) for step in steps),
    ):
        if not low <= value <= high:
            raise FieldDataError(f"{flag} must be from {low} to {high}, got {value}")
    if not 0 < options.frames_per_second <= 50:
        raise ValueError(f"--frames-per-second must be above 0 and at most 50, got {options.frames_per_second}")
    folder = locate(options.checkpoint).parent if options.output is None else Path(options.output)

    @torch.inference_mode()
    def run() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        windows = Windows(data.select(slice(number, number + 1)), config.history, horizon)
        history, static, target = windows.gather(torch.tensor([0]))  # [1, frames, C, H, W]
        history = history.to(options.device)
        static = None if static is None else static.to(options.device)
        predicted = model.rollout(history, horizon, static).cpu()
        drawn = target[0, :, options.channel], predicted[0, :, options.channel]  # [horizon, H, W]
        write_rollout(folder / "rollout.png", *drawn, steps, config.topology)
        write_animation(folder / "rollout.gif", *drawn, config.topology, options.frames_per_second)
        write_errors_over_time(folder / "rollout-error.png", {
            name: [relative_l2(x[:, step], target[:, step]).item() for step in range(horizon)]
            for name, x in ((config.network, predicted), ("persistence", history[:, -1:].cpu().expand_as(target)))
        })
        print(f"relative L2 error {relative_l2(predicted, target).item():.4f} over {horizon} steps of trajectory "
              f"{number}; wrote rollout.png, rollout.gif and rollout-error.png into {folder}")

    return run
