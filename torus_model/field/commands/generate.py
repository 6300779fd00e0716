"""``python -m torus_model field generate``: Navier-Stokes data by our own solver."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from ..data import FORCINGS, FieldData, save_data
from ..generation import NavierStokesTask, generate
from ..random_field import AMPLITUDES
from .options import check_device

HELP = "solve the classical forced Navier-Stokes task and write its trajectories"

_DEFAULT_OUTPUT = "runs/field/navier-stokes.safetensors"
_PREVIEWED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    task = NavierStokesTask()
    parser.description = (
        "Solves 2D incompressible Navier-Stokes in vorticity form on the periodic unit square, forced and started as "
        "in the neural-operator literature, and writes a safetensors file with the parameters inside and a preview "
        "(PNG) beside it. The full task is --trajectories 1200 --solve-resolution 256. One core of a server CPU takes "
        "about 0.8 s for a trajectory, and 7 s at 256x256."
    )
    parser.add_argument("--output", default=_DEFAULT_OUTPUT, metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--trajectories", type=int, default=task.trajectories, help="(default: %(default)s)")
    parser.add_argument("--viscosity", type=float, default=task.viscosity,
                        help="(default: %(default)s; at 1e-3 the task of the literature has --frames 50)")
    parser.add_argument("--resolution", type=int, default=task.resolution,
                        help="points along each side of the frames (default: %(default)s)")
    parser.add_argument("--solve-resolution", type=int, default=task.solve_resolution,
                        help="points along each side to solve at; frames take every k-th (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=task.frames,
                        help="how many; the first is one interval after the initial field (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=task.interval,
                        help="time between frames (default: %(default)s)")
    parser.add_argument("--cfl", type=float, default=task.cfl,
                        help="time steps, as a part of the time in which the flow crosses a point of the grid "
                             "(default: %(default)s; stable up to about 1.3)")
    parser.add_argument("--dt", type=float, help="one time step for all instead")
    parser.add_argument("--initial", choices=AMPLITUDES, default=task.initial,
                        help="amplitude of the initial field: 7^(3/2) in its covariance, as the paper states, or 7^3, "
                             "as the code published with it draws (default: %(default)s)")
    parser.add_argument("--forcing", choices=[*FORCINGS, "none"], default=task.forcing, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "float64"], default=task.dtype,
                        help="that the solver computes in (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=task.seed, help="of the initial fields (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4,
                        help="trajectories at a time; the data do not depend on it but for rounding "
                             "(default: %(default)s, about best on a CPU)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Checks the options and returns what does the work.

    Raises:
        TypeError, ValueError: an option is wrong.
        OSError: the output is there already, or cannot be.
    """
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(NavierStokesTask)}
    task = NavierStokesTask(**fields | {"forcing": None if options.forcing == "none" else options.forcing})
    if options.batch_size < 1:
        raise ValueError(f"batch-size must be at least 1, got {options.batch_size}")
    device = check_device(options.device)
    output = Path(options.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"output must end in .safetensors, got {output}")
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} is there already; --overwrite replaces it")
    output.parent.mkdir(parents=True, exist_ok=True)

    def run() -> None:
        # The bar moves by whole batches, as early frames cost less than late ones: its estimate is then a fair one.
        with tqdm(total=task.trajectories, unit="trajectory", smoothing=0) as progress:
            data = generate(task, options.batch_size, device, on_batch=progress.update)
        save_data(output, data)
        picture = output.with_suffix(".png")
        write_preview(picture, data)
        print(f"wrote {output} ({output.stat().st_size / 2**20:.0f} MiB) and {picture}")

    return run


def write_preview(path: Path, data: FieldData) -> None:
    """Draws a few trajectories as a PNG: a row each, time to the right, one colour scale for each row."""
    rows = min(_PREVIEWED, len(data))
    times = data.parameters["times"]
    columns = sorted({round(i * (len(times) - 1) / 4) for i in range(5)})
    figure = Figure(figsize=(1.8 * len(columns) + 0.8, 1.8 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for trajectory, row in enumerate(grid):
        limit = data.frames[trajectory, columns].abs().max().item()
        for frame, axes in zip(columns, row, strict=True):
            image = axes.imshow(data.frames[trajectory, frame, 0].T.numpy(), origin="lower", cmap="RdBu_r", vmin=-limit,
                                vmax=limit)
            axes.set(xticks=[], yticks=[])
            if trajectory == 0:
                axes.set_title(f"t = {times[frame]:g}")
        figure.colorbar(image, ax=row, label="vorticity")
    figure.savefig(path, dpi=120)
