"""Scores a trained model on trajectories that it was not trained on. Prints a table; writes evaluation.json,
error-map.png and errors-over-time.png."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ...checkpoint import locate
from ...checks import check_seed
from ...history import write_json
from ..data import FieldDataError
from ..evaluate import FieldScores, check_fits, evaluate
from ..pictures import write_error_maps, write_errors_over_time
from .options import add_data_options, add_model_options, held_out, load_model_and_data

HELP = "score a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to score, on what, and where to write."""
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument("--trajectories", type=int, metavar="N",
                        help="how many of the file's last ones (default: those that the run tested on, or all, where "
                             "the file is not the one that the run was trained on)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the rolls that equivariance is tested with (default: %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="folder to write to (default: that of the checkpoint)")


def table(scores: FieldScores) -> str:
    """The scores as text."""
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"

    rows: list[tuple[str, ...]] = [("", "one step", "rollout")]
    rows += [
        (name, *map(number, values)) for name, *values in (
            ("relative L2 error", scores.one_step, scores.rollout),
            ("  of persistence", scores.persistence_one_step, scores.persistence_rollout),
            ("error at the seam / elsewhere", scores.seam_one_step, scores.seam_rollout),
            ("  of the targets' deviation", scores.seam_one_step_target, scores.seam_rollout_target),
        )
    ]
    rows += [("", "float32", "float64")]
    rows += [
        (name, *map(number, values)) for name, *values in (
            ("equivariance error, patches", scores.equivariance_patches, scores.equivariance_patches_float64),
            ("equivariance error, points", scores.equivariance_points, scores.equivariance_points_float64),
        )
    ]
    return "\n".join(f"{name:<30}{first:>11}{second:>11}".rstrip() for name, first, second in rows)


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Reads model and data."""
    check_seed(options.seed)
    model, data = load_model_and_data(options)
    check_fits(model.config, data)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.trajectories is None:
        available, data = len(data), held_out(options.checkpoint, data)
        if len(data) == available:
            which = f"all {available} trajectories of the file, which is not known to be free of training data"
        else:
            which = f"the {len(data)} trajectories of the file that its run tested on"
    elif 1 <= options.trajectories <= len(data):
        data = data.select(slice(len(data) - options.trajectories, None))
        which = f"the last {len(data)} trajectories of the file"
    else:
        raise FieldDataError(f"--trajectories must be from 1 to the {len(data)} of the data, "
                             f"got {options.trajectories}")
    folder = locate(options.checkpoint).parent if options.output is None else Path(options.output)

    def run() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        scores = evaluate(model, data, batch_size=options.batch_size, progress=True, seed=options.seed)
        about = {"model_config": model.config.to_dict(), "data": data.parameters}
        write_json(folder / "evaluation.json", about | scores.to_dict())
        maps = {"one step": scores.one_step_map, "end of the rollout": scores.rollout_map}
        write_error_maps(folder / "error-map.png", maps, model.config.topology)
        write_errors_over_time(folder / "errors-over-time.png", {
            model.config.network: scores.rollout_steps, "persistence": scores.persistence_rollout_steps,
        })
        print(f"{model.config.network} on {which}\n{table(scores)}\n"
              f"wrote evaluation.json, error-map.png and errors-over-time.png into {folder}")

    return run
