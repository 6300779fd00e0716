"""``python -m torus_model.field.verify_solver``: the solver against an exact solution, as a plot and as JSON."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from ..history import write_json
from .navier_stokes import NavierStokes2d

DEFAULT_STEPS = (8, 16, 32, 64, 128, 256)


def taylor_green(
    resolution: int,
    time: float,
    viscosity: float,
    wavenumber: int = 1,
    mean_velocity: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """The decaying vortices of Taylor and Green (Proc. R. Soc. A 158, 1937), carried along by a uniform velocity U.

    ``omega = cos k (x - U_x t) cos k (y - U_y t) exp(-2 nu k^2 t)`` with ``k = 2 pi wavenumber``: an eigenfunction of
    the Laplacian, so that its own velocity does not advect it.

    Returns:
        ``[n, n]`` float64.
    """
    k = 2 * math.pi * wavenumber
    x = torch.arange(resolution, dtype=torch.float64) / resolution
    along_x, along_y = (torch.cos(k * (x - speed * time)) for speed in mean_velocity)
    return along_x[:, None] * along_y * math.exp(-2 * viscosity * k**2 * time)


def relative_errors(
    steps: tuple[int, ...],
    *,
    resolution: int = 32,
    viscosity: float = 1e-3,
    wavenumber: int = 2,
    mean_velocity: tuple[float, float] = (0.7, -0.3),
    dtype: torch.dtype = torch.float64,
) -> list[float]:
    """Relative L2 errors at time 1 against `taylor_green`, for each number of time steps."""
    solver = NavierStokes2d(resolution, viscosity, mean_velocity=mean_velocity, dtype=dtype)
    start, end = (taylor_green(resolution, t, viscosity, wavenumber, mean_velocity) for t in (0.0, 1.0))
    solutions = (solver.solve(start[None], [1.0], dt=1 / count)[0, 0] for count in tqdm(steps, leave=False))
    return [((solution - end).norm() / end.norm()).item() for solution in solutions]


def orders(steps: tuple[int, ...], errors: list[float]) -> list[float]:
    """The observed order between each number of time steps and the next."""
    pairs = zip(steps, steps[1:], errors, errors[1:], strict=False)
    return [math.log(error / next_error) / math.log(after / before) for before, after, error, next_error in pairs]


def verify(steps: tuple[int, ...] = DEFAULT_STEPS) -> dict[str, Any]:
    """Errors at rest, where only rounding is left, and in a moving frame, where they fall with the fourth order."""
    moving = relative_errors(steps)
    return {
        "problem": "Taylor-Green vortices at time 1: 32x32, viscosity 1e-3, wavenumber 2, float64",
        "mean_velocity": [0.7, -0.3],
        "dt": [1 / count for count in steps],
        "relative_l2_moving": moving,
        "observed_order": orders(steps, moving),
        "relative_l2_at_rest": relative_errors(steps, mean_velocity=(0.0, 0.0)),
    }


def write_plot(path: Path, report: dict[str, Any]) -> None:
    """Draws the errors over the time step, both logarithmic, beside a line of slope 4, as a PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    dt, moving = report["dt"], report["relative_l2_moving"]
    axes.loglog(dt, moving, "o-", ms=4, label=f"carried along by U = {tuple(report['mean_velocity'])}")
    axes.loglog(dt, [moving[-1] * (step / dt[-1]) ** 4 for step in dt], "k--", lw=0.8, label="slope 4")
    axes.loglog(dt, report["relative_l2_at_rest"], "s-", ms=4, label="at rest (rounding)")
    axes.set(xlabel="time step", ylabel="relative L2 error at time 1", title="Taylor-Green vortices, 32x32, float64")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Writes the plot, and the numbers as JSON beside it."""
    parser = argparse.ArgumentParser(prog="python -m torus_model.field.verify_solver", description=(
        "Measures the errors of the Navier-Stokes solver against the exact Taylor-Green solution, at rest and in a "
        "moving frame, and draws them over the time step. Takes a few seconds."
    ))
    parser.add_argument("--output", default="runs/field/solver.png", metavar="FILE",
                        help="a PNG; the numbers go beside it as JSON (default: %(default)s)")
    output = Path(parser.parse_args(arguments).output)
    if output.suffix != ".png":
        parser.error(f"--output must end in .png, got {output}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        report = verify()
        write_plot(output, report)
        write_json(output.with_suffix(".json"), report)
    except OSError as error:
        parser.error(str(error))
    print(f"observed orders {', '.join(f'{order:.2f}' for order in report['observed_order'])}; "
          f"wrote {output} and {output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
