"""Hypothesis strategies: lattices, and attention problems on them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from support import LAYOUTS, NUM_STREAMS, Problem, make_problem

from torus_kernels import TorusLattice

TOPOLOGIES = ("periodic", "causal", "cylinder")


@st.composite
def lattices(draw, topologies: tuple[str, ...] = TOPOLOGIES, max_side: int = 10) -> TorusLattice:
    """Valid lattices: odd and even sides, any winding (that closes), radii in any order, any set of streams."""
    topology = draw(st.sampled_from(topologies))
    n_minor = draw(st.integers(2, max_side))
    winding = draw(st.integers(1, n_minor - 1))
    # n_minor itself always closes, so there is a side to draw.
    sides = [n for n in range(2, max_side + 1) if topology != "periodic" or winding * n % n_minor == 0]
    return TorusLattice(
        draw(st.sampled_from(sides)), n_minor, topology, winding,
        cross_radius=draw(st.tuples(*[st.integers(0, max_side + 3)] * 2)),
        streams=draw(st.one_of(st.none(), st.sets(st.integers(0, NUM_STREAMS - 1), min_size=1))),
    )


@st.composite
def problems(draw, topologies: tuple[str, ...] = TOPOLOGIES, max_side: int = 10) -> Problem:
    """Problems in float64 with every optional argument present or absent."""
    lattice = draw(lattices(topologies, max_side))
    seq_len = draw(st.integers(1, 2 * lattice.num_sites + 5)) if lattice.is_causal else lattice.num_sites
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)]))
    batch = draw(st.integers(1, 2))
    problem = make_problem(
        lattice, seq_len, batch=batch, heads=kv_heads * group, kv_heads=kv_heads,
        head_dim=8 * draw(st.integers(1, 8)), token_weights=draw(st.booleans()), state=draw(st.booleans()),
        token_alpha=draw(st.booleans()), seed=draw(st.integers(0, 2**16)),
    )
    absent = draw(st.sets(st.sampled_from(["stream_weights", "decay"])))
    scale = draw(st.one_of(st.none(), st.floats(-2, 2)))
    first_key = None
    if lattice.is_causal and draw(st.booleans()):
        first_key = draw(first_keys(batch, seq_len))
    return problem.replace(scale=scale, first_key=first_key, **dict.fromkeys(absent))


@st.composite
def first_keys(draw, batch: int, seq_len: int) -> torch.Tensor:
    """``[B, T]`` positions before, at, between and beyond the tokens, in both integer types."""
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    position = st.one_of(st.integers(-2, seq_len + 1), st.sampled_from([-(2**31), 2**31 - 1]))
    starts = draw(st.lists(position, min_size=batch, max_size=8))
    rows = [[starts[(b + t // max(1, seq_len // 3)) % len(starts)] for t in range(seq_len)] for b in range(batch)]
    return torch.tensor(rows, dtype=dtype)


layouts = st.sampled_from(sorted(LAYOUTS))
