"""Draws the eight streams of one query, on the torus and on the unrolled lattice: ``python docs/streams.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from torus_kernels import Stream, TorusLattice

COLOURS = {
    Stream.major_forward: "#1f77b4", Stream.major_backward: "#aec7e8",
    Stream.minor_forward: "#d62728", Stream.minor_backward: "#ff9896",
    Stream.spiral_cw: "#2ca02c", Stream.spiral_ccw: "#bcbd22",
    Stream.cross_u_to_v: "#9467bd", Stream.cross_v_to_u: "#e377c2",
}
# Broad strokes first, so that the lines stay visible on the windows.
ORDER = sorted(COLOURS, key=lambda s: (not s.is_cross, s))


def visible_sites(lattice: TorusLattice, stream: Stream, query: int) -> torch.Tensor:
    """Sites that the query sees through a stream."""
    visible, _ = lattice.stream_geometry(stream, lattice.num_sites)
    return visible[query].nonzero().squeeze(1)


def draw_torus(axes, lattice: TorusLattice, query: int) -> None:
    """The lattice on the surface of the torus."""
    grid = lattice.embed().view(lattice.n_major, lattice.n_minor, 3)
    closed = torch.cat((grid, grid[:1]))
    closed = torch.cat((closed, closed[:, :1]), dim=1)
    axes.plot_wireframe(*closed.unbind(-1), color="0.8", linewidth=0.4)
    points = grid.flatten(0, 1)
    for stream in ORDER:
        sites = points[visible_sites(lattice, stream, query)]
        axes.scatter(*sites.unbind(-1), color=COLOURS[stream], s=6 if stream.is_cross else 14, depthshade=False)
    axes.scatter(*points[query], color="black", s=40, depthshade=False)
    axes.set_box_aspect((3, 3, 1))
    axes.view_init(elev=55, azim=20)
    axes.set_axis_off()


def draw_unrolled(axes, lattice: TorusLattice, query: int) -> None:
    """The lattice as a grid, one colour a stream."""
    for stream in ORDER:
        sites = visible_sites(lattice, stream, query)
        axes.scatter(sites % lattice.n_minor, sites // lattice.n_minor, color=COLOURS[stream], marker="s",
                     s=10 if stream.is_cross else 24, label=stream.name)
    axes.scatter(query % lattice.n_minor, query // lattice.n_minor, color="black", marker="s", s=40, label="query")
    axes.set(xlim=(-1, lattice.n_minor), ylim=(-1, lattice.n_major), xlabel="v, minor loop", ylabel="u, major loop",
             aspect="equal")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("streams.png"), metavar="FILE")
    arguments = parser.parse_args()
    lattice = TorusLattice(32, 32)
    figure = plt.figure(figsize=(11, 4.6))
    # A query beside the corner of the grid: every stream wraps.
    query = 4 * lattice.n_minor + 5
    draw_torus(figure.add_axes((0.0, 0.0, 0.46, 1.0), projection="3d"), lattice, query)
    draw_unrolled(figure.add_axes((0.5, 0.12, 0.34, 0.82)), lattice, query)
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
