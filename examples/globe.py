"""A tracer carried around the globe by winds: does a network that predicts it show a seam at the dateline?

The array that holds a globe begins and ends somewhere in longitude, here at the dateline. Torus attention on a cylinder
cannot tell where. Shifted windows with the usual mask at the edges of the array can: what blows across the dateline
comes as a surprise to them. The networks have equal numbers of parameters, and are trained on the same data with the
same settings. Shown is the error of each on winds and tracers that it has not seen, by longitude.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from torus_model.field.config import FieldConfig
from torus_model.field.data import FieldData, split
from torus_model.field.evaluate import FieldScores, evaluate
from torus_model.field.globe import generate_globe, latitudes, longitudes, random_winds
from torus_model.field.networks import NETWORKS, equal_parameters, number_of_parameters
from torus_model.field.train import train
from torus_model.field.train_config import FieldTrainConfig
from torus_model.run import TrainingError

HOURS = 6.0  # from frame to frame
FRAMES = 12  # of a trajectory
LATER = 4  # the frame beside the first in the picture
TEST_TRAJECTORIES = 32
LABELS = {"torus": "torus attention (cylinder)", "windows": "shifted windows, masked at the edges",
          "windows-periodic": "shifted windows, wrapped"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=int, help="passes through the training data, for each network (default: 8)")
    budget.add_argument("--seconds", type=float, help="training time of each network, instead of equal epochs")
    parser.add_argument("--output", type=Path, default=Path("runs/globe"), metavar="DIR",
                        help="folder for globe.png and the trained networks (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, metavar="NAME",
                        default=["torus", "windows", "windows-periodic"],
                        help=f"out of {', '.join(NETWORKS)} (default: torus windows windows-periodic)")
    parser.add_argument("--grid", nargs=2, type=int, default=(32, 64), metavar=("ROWS", "COLUMNS"),
                        help="of the globe; multiples of 16 (default: 32 64)")
    parser.add_argument("--trajectories", type=int, default=96, help="to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default: %(default)s)")
    options = parser.parse_args()
    if options.epochs is None and options.seconds is None:
        options.epochs = 8
    try:
        options.data = generate_globe(options.trajectories + TEST_TRAJECTORIES, FRAMES, tuple(options.grid),
                                      hours=HOURS, seed=options.seed)
        options.training = FieldTrainConfig(
            epochs=options.epochs, seconds=options.seconds, test_trajectories=TEST_TRAJECTORIES,
            learning_rate=2e-3, seed=options.seed,
        )
        _, options.test = split(options.data, *options.training.trajectories(len(options.data)))
        torus = FieldConfig(
            grid=tuple(options.grid), topology="cylinder", history=2, patch=4, window=4, width=64, layers=4, heads=4,
            ff_width=128, cross_radius=(1, 3),
        )
        options.models = {name: equal_parameters(torus, name) for name in dict.fromkeys(options.networks)}
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return options


def by_longitude(error_map: Tensor) -> Tensor:
    """Root mean square over the latitudes of a map of root mean square errors, ``[H, W] -> [W]``."""
    return error_map.square().mean(0).sqrt()


def draw(path: Path, data: FieldData, wind: Tensor, scores: dict[str, FieldScores], patch: int) -> None:
    """The tracer and the winds of one trajectory, the error of every network on the map, and by longitude.

    The dateline, where the array was cut, is in the middle of every panel.
    """
    rows, columns = data.grid
    figure = Figure(figsize=(12, 10), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1)
    top.suptitle("a tracer, and the wind that carries it")
    middle.suptitle(f"error of the predicted tracer {HOURS:.0f} hours ahead, as a part of the tracer's size")
    bottom.suptitle("the same by longitude")

    def draw_map(axes, x: Tensor, title: str, **colours):
        image = axes.imshow(x.roll(columns // 2, -1).numpy(), origin="lower", extent=(0, 360, -90, 90), aspect="auto",
                            interpolation="nearest", **colours)
        axes.axvline(180, color="0.5", ls="--", lw=1)
        axes.set(title=title, xticks=range(0, 361, 90), yticks=range(-90, 91, 45))
        return image

    first, last, profile = top.subplots(1, 3, width_ratios=(2, 2, 1), sharey=True)
    limit = data.frames[-1].abs().max().item()
    for axes, frame in ((first, 0), (last, LATER)):
        image = draw_map(axes, data.frames[-1, frame, 0], f"after {frame * HOURS:.0f} hours", cmap="RdBu_r",
                         vmin=-limit, vmax=limit)
    top.colorbar(image, ax=(first, last))
    first.set_ylabel("latitude (degrees)")
    profile.plot(wind.numpy(), latitudes(rows).rad2deg().numpy(), color="0.2")
    profile.axvline(0, color="0.7", lw=0.8)
    profile.set(xlabel="eastward wind (m/s)")

    limit = max(s.one_step_map.max().item() for s in scores.values())
    panels = middle.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for axes, (name, s) in zip(panels, scores.items(), strict=True):
        image = draw_map(axes, s.one_step_map, LABELS.get(name, name), cmap="magma", vmin=0, vmax=limit)
    middle.colorbar(image, ax=panels)
    panels[0].set_ylabel("latitude (degrees)")

    axes = bottom.subplots()
    east = longitudes(columns).rad2deg() + 180  # the columns rolled by half of them: from 0 to 360 degrees
    for name, s in scores.items():
        axes.plot(east.numpy(), by_longitude(s.one_step_map).roll(columns // 2).numpy(),
                  label=f"{LABELS.get(name, name)}: at the dateline {s.seam_one_step:.2f} times the error elsewhere")
    reach = 360 * patch / columns
    axes.axvspan(180 - reach, 180 + reach, color="0.9", zorder=0, label="within one patch of the dateline")
    axes.axvline(180, color="0.5", ls="--", lw=1, label="the dateline, where the array was cut")
    axes.set(xlabel="longitude (degrees east)", ylabel="error", xlim=(0, 360), ylim=(0, None),
             xticks=range(0, 361, 45))
    bottom.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    options = parse_arguments()
    scores, sizes = {}, {}
    for name, config in options.models.items():
        model = train(options.training, config, options.data, options.output / name).model
        scores[name] = evaluate(model, options.test, progress=True)
        sizes[name] = number_of_parameters(model)

    wind = random_winds(len(options.data), options.grid[0], options.seed)[-1]
    picture = options.output / "globe.png"
    draw(picture, options.data, wind, scores, next(iter(options.models.values())).patch)

    print(f"\n{'':18}{'parameters':>11}{'error':>9}{'at the dateline':>17}{'rolled input':>14}")
    for name, s in scores.items():
        print(f"{name:18}{sizes[name]:11,}{s.one_step:9.4f}{s.seam_one_step:16.2f}x{s.equivariance_patches:14.1e}")
    first = next(iter(scores.values()))
    print(f"{'nothing changes':18}{'':11}{first.persistence_one_step:9.4f}")
    print("\nerror: relative L2 error of the next frame, on winds and tracers not trained on"
          "\nat the dateline: root mean square error within one patch of it, divided by that elsewhere"
          f" (the tracer itself: {first.seam_one_step_target:.2f}x)"
          "\nrolled input: roll all longitudes by a random number of patches and predict, against predict and roll;"
          "\n              the difference as a part of the predicted change")
    print(f"\n{picture}: the tracer, the winds and the errors by longitude")


if __name__ == "__main__":
    try:
        main()
    except (OSError, TrainingError) as error:
        raise SystemExit(f"globe.py: {' '.join(str(error).split())}") from error
