"""Draws who sees whom, on the surface and on the unrolled lattice: ``python docs/streams.py``.

``streams.png`` has all eight streams of one query; ``images/`` has a picture of each family of streams, of the causal
winding and of the cylinder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from torus_kernels import Stream, TorusLattice

COLOURS = {
    Stream.major_forward: "#1f77b4", Stream.major_backward: "#aec7e8",
    Stream.minor_forward: "#d62728", Stream.minor_backward: "#ff9896",
    Stream.spiral_cw: "#2ca02c", Stream.spiral_ccw: "#bcbd22",
    Stream.cross_u_to_v: "#9467bd", Stream.cross_v_to_u: "#e377c2",
}
FAMILIES = {
    "major_loop": (Stream.major_forward, Stream.major_backward),
    "minor_loop": (Stream.minor_forward, Stream.minor_backward),
    "spirals": (Stream.spiral_cw, Stream.spiral_ccw),
    "cross_flows": (Stream.cross_u_to_v, Stream.cross_v_to_u),
}
SURFACE, UNROLLED = (0.0, 0.0, 0.46, 1.0), (0.5, 0.12, 0.34, 0.82)  # places in a figure


def broad_first(streams: Iterable[Stream]) -> list[Stream]:
    """The order of drawing: windows before lines, so that the lines stay visible on them."""
    return sorted(streams, key=lambda s: (not s.is_cross, s))


def visible_sites(lattice: TorusLattice, stream: Stream, query: int) -> Tensor:
    """Sites that the query sees through a stream; in a causal lattice the query is the newest of N tokens."""
    visible, _ = lattice.stream_geometry(stream, lattice.num_sites)
    return visible[query].nonzero().squeeze(1)


def surface(lattice: TorusLattice) -> Tensor:
    """Sites in space ``[M, m, 3]``: on the torus, or on a cylinder whose axis is the open major one."""
    if lattice.topology != "cylinder":
        return lattice.embed().view(lattice.n_major, lattice.n_minor, 3)
    _, theta_v = lattice.angles()
    height = torch.linspace(-1.5, 1.5, lattice.n_major, dtype=torch.float64).repeat_interleave(lattice.n_minor)
    return torch.stack((theta_v.cos(), theta_v.sin(), height), -1).view(lattice.n_major, lattice.n_minor, 3)


def draw_surface(axes, lattice: TorusLattice, query: int, streams: Iterable[Stream]) -> None:
    """The lattice in space, one colour a stream."""
    grid = surface(lattice)
    closed = grid if lattice.topology == "cylinder" else torch.cat((grid, grid[:1]))
    closed = torch.cat((closed, closed[:, :1]), dim=1)
    axes.plot_wireframe(*closed.unbind(-1), color="0.8", linewidth=0.4)
    points = grid.flatten(0, 1)
    for stream in broad_first(streams):
        sites = points[visible_sites(lattice, stream, query)]
        axes.scatter(*sites.unbind(-1), color=COLOURS[stream], s=6 if stream.is_cross else 14, depthshade=False)
    axes.scatter(*points[query], color="black", s=40, depthshade=False)
    axes.set_box_aspect((1, 1, 1.5) if lattice.topology == "cylinder" else (3, 3, 1))
    axes.view_init(elev=20 if lattice.topology == "cylinder" else 55, azim=20)
    axes.set_axis_off()


def draw_unrolled(axes, lattice: TorusLattice, query: int, streams: Iterable[Stream]) -> None:
    """The lattice as a grid, one colour a stream."""
    for stream in broad_first(streams):
        sites = visible_sites(lattice, stream, query)
        axes.scatter(sites % lattice.n_minor, sites // lattice.n_minor, color=COLOURS[stream], marker="s",
                     s=10 if stream.is_cross else 24, label=stream.name)
    axes.scatter(query % lattice.n_minor, query // lattice.n_minor, color="black", marker="s", s=40, label="query")
    open_major = lattice.topology == "cylinder"
    axes.set(xlim=(-1, lattice.n_minor), ylim=(-1, lattice.n_major), aspect="equal",
             xlabel="v, minor loop", ylabel="u, major axis (open)" if open_major else "u, major loop")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)


def draw_streams(lattice: TorusLattice, query: int, streams: Iterable[Stream] = tuple(Stream)) -> Figure:
    """Both views of the streams of one query."""
    figure = plt.figure(figsize=(11, 4.6))
    draw_surface(figure.add_axes(SURFACE, projection="3d"), lattice, query, streams)
    draw_unrolled(figure.add_axes(UNROLLED), lattice, query, streams)
    return figure


def draw_winding(axes, lattice: TorusLattice) -> None:
    """The last N tokens of a sequence as a thread on the torus, the newest in black."""
    points_per_token = 8
    t = torch.arange(lattice.num_sites * points_per_token) / points_per_token
    theta_u, theta_v = 2 * math.pi * t / lattice.num_sites, 2 * math.pi * t / lattice.n_minor
    ring = 2 + theta_v.cos()
    thread = torch.stack((ring * theta_u.cos(), ring * theta_u.sin(), theta_v.sin()), -1)
    axes.plot(*thread.unbind(-1), color="0.6", linewidth=0.8)
    newest = thread[(lattice.num_sites - 1) * points_per_token]
    tokens = thread[::points_per_token]
    for stream in broad_first(COLOURS):
        seen = tokens[visible_sites(lattice, stream, lattice.num_sites - 1)]
        axes.scatter(*seen.unbind(-1), color=COLOURS[stream], s=8 if stream.is_cross else 16, depthshade=False)
    axes.scatter(*newest, color="black", s=40, depthshade=False)
    axes.set_box_aspect((3, 3, 1))
    axes.view_init(elev=55, azim=20)
    axes.set_axis_off()


def draw_lags(axes, lattice: TorusLattice) -> None:
    """What a causal query sees through each stream, by lag."""
    lags = torch.arange(lattice.num_sites)
    for stream, colour in COLOURS.items():
        visible, _ = lattice.lag_geometry(stream, lags)
        seen = lags[visible]
        axes.scatter(seen, torch.full_like(seen, int(stream)), color=colour, marker="|", s=90)
    axes.set_yticks([int(s) for s in COLOURS], [s.name for s in COLOURS])
    axes.set(xlabel=f"lag in tokens, M = {lattice.n_major}, m = {lattice.n_minor}", xlim=(-4, lattice.num_sites))
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)


def draw_causal(lattice: TorusLattice) -> Figure:
    """The winding in space, and the visible lags."""
    figure = plt.figure(figsize=(11, 4.6))
    draw_winding(figure.add_axes((0.0, 0.0, 0.42, 1.0), projection="3d"), lattice)
    draw_lags(figure.add_axes((0.54, 0.14, 0.44, 0.78)), lattice)
    return figure


def save(figure: Figure, path: Path, colours: int | None = None) -> None:
    """Writes a PNG, of so many colours where given: a third of the size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    if colours is not None:
        with Image.open(path) as image:
            image.convert("RGB").quantize(colours).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR",
                        help="folder to write into (default: the one of this script)")
    arguments = parser.parse_args()
    # A query beside the corner of the grid: every stream wraps.
    square, query = TorusLattice(32, 32), 4 * 32 + 5
    figures = {"streams": draw_streams(square, query)}
    for name, streams in FAMILIES.items():
        figures[f"images/{name}"] = draw_streams(square, query, streams)
    figures["images/causal"] = draw_causal(TorusLattice(16, 16, "causal", cross_radius=(2, 4)))
    figures["images/cylinder"] = draw_streams(TorusLattice(24, 32, "cylinder"), 4 * 32 + 5)
    for name, figure in figures.items():
        save(figure, arguments.output / f"{name}.png", colours=64)


if __name__ == "__main__":
    main()
