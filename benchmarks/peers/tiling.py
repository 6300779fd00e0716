"""A partition of the tokens into equal blocks, so that a stream is a batch of small dense attentions.

A family of streams is given by the queries of a block alone (a row, a column, a strand, a square tile, a run of
tokens of one residue class). Which keys a block needs, its masks and its distances follow from the lattice's own
geometry. Everything here is computed once per lattice and kept; none of it is timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torus_kernels import Stream, TorusLattice

TILE = 8
"""Side of the square query tiles of the cross flows."""

RUN = 64
"""Queries in a block of a causal line stream."""


@dataclass(frozen=True)
class StreamMask:
    """What one stream sees of a block's keys: columns ``first:last``, and within them ``visible`` and ``rho_squared``.
    """

    stream: Stream
    first: int
    last: int
    visible: Tensor  # [Q, last - first] bool
    rho_squared: Tensor  # [Q, last - first] float64, zero where not visible


@dataclass(frozen=True)
class Blocks:
    """``n`` blocks that look alike. Keys are ordered so that the columns of each stream are contiguous."""

    queries: Tensor  # [n, Q] tokens; a place without a token holds any token, and its result is dropped
    keys: Tensor  # [n, K] tokens
    masks: tuple[StreamMask, ...]


@dataclass(frozen=True)
class Family:
    """Streams that share one partition of the queries. ``place[t]`` is the row of token t among all blocks' queries."""

    blocks: tuple[Blocks, ...]
    place: Tensor  # [T]


def tile_side(length: int, target: int = TILE) -> int:
    """The divisor of ``length`` nearest to ``target`` within a factor of 1.6, else ``target`` (the last tile is then
    padded)."""
    near = [n for n in range(1, length + 1) if length % n == 0 and target / 1.6 <= n <= target * 1.6]
    return min(near, key=lambda n: abs(n - target), default=min(length, target))


def _visible_columns(seen: list[Tensor]) -> Tensor:
    """Indices of the candidates that any stream sees, ordered: the first stream's only, shared, the second's only."""
    columns = torch.stack([visible.any(dim=0) for visible in seen])  # [streams, candidates]
    index = columns.any(dim=0).nonzero().squeeze(1)
    rank = columns[-1, index].int() - columns[0, index].int()
    return index[rank.argsort(stable=True)]


def _masks(streams: tuple[Stream, ...], geometry: list[tuple[Tensor, Tensor]]) -> tuple[StreamMask, ...]:
    masks = []
    for stream, (visible, rho_squared) in zip(streams, geometry, strict=True):
        seen = visible.any(dim=0).nonzero()
        first, last = int(seen.min()), int(seen.max()) + 1
        visible, rho_squared = visible[:, first:last], rho_squared[:, first:last]
        masks.append(StreamMask(stream, first, last, visible, rho_squared.masked_fill(~visible, 0.0)))
    return tuple(masks)


def _places(queries: Tensor, seq_len: int) -> Tensor:
    """Where each token is among ``queries`` ``[rows]``; places outside the sequence and repetitions are ignored."""
    rows = ((queries >= 0) & (queries < seq_len)).nonzero().squeeze(1)
    place = torch.full((seq_len,), -1)
    place[queries[rows]] = rows
    if (place < 0).any():
        raise RuntimeError("the partition leaves out a token")
    return place


def _grid_family(lattice: TorusLattice, streams: tuple[Stream, ...], origins: Tensor, offsets: Tensor) -> Family:
    """Blocks on the closed grid: block n holds the queries ``origins[n] + offsets``, all ``(u, v)``."""
    size = torch.tensor([lattice.n_major, lattice.n_minor])
    sites = torch.cartesian_prod(torch.arange(lattice.n_major), torch.arange(lattice.n_minor))  # as seen from (0, 0)
    displacement = offsets[:, None] - sites[None]  # [Q, N, 2]
    geometry = [lattice._grid_geometry(stream, *displacement.unbind(-1)) for stream in streams]
    columns = _visible_columns([visible for visible, _ in geometry])
    geometry = [(visible[:, columns], rho_squared[:, columns]) for visible, rho_squared in geometry]

    def tokens(displaced: Tensor) -> Tensor:
        u, v = ((origins[:, None] + displaced[None]) % size).unbind(-1)
        return u * lattice.n_minor + v

    queries = tokens(offsets)
    blocks = Blocks(queries, tokens(sites[columns]), _masks(streams, geometry))
    return Family((blocks,), _places(queries.flatten(), lattice.num_sites))


def _periodic_families(lattice: TorusLattice) -> Iterator[Family]:
    major, minor = torch.arange(lattice.n_major), torch.arange(lattice.n_minor)
    rows, columns = major[:, None] * torch.tensor([1, 0]), minor[:, None] * torch.tensor([0, 1])
    yield _grid_family(lattice, (Stream.major_forward, Stream.major_backward), columns, rows)
    yield _grid_family(lattice, (Stream.minor_forward, Stream.minor_backward), rows, columns)
    for stream, slope in ((Stream.spiral_cw, lattice.winding), (Stream.spiral_ccw, -lattice.winding)):
        yield _grid_family(lattice, (stream,), columns, major[:, None] * torch.tensor([1, slope]))
    side_u, side_v = tile_side(lattice.n_major), tile_side(lattice.n_minor)
    origins = torch.cartesian_prod(major[::side_u], minor[::side_v])
    offsets = torch.cartesian_prod(torch.arange(side_u), torch.arange(side_v))
    yield _grid_family(lattice, (Stream.cross_u_to_v, Stream.cross_v_to_u), origins, offsets)


def _causal_family(
    lattice: TorusLattice, streams: tuple[Stream, ...], origins: Tensor, offsets: Tensor, seq_len: int
) -> Family:
    """Blocks on the line of time: block n holds the queries ``origins[n] + offsets``.

    Places past the end of the sequence are computed and dropped: no token sees them. Blocks at its beginning that
    lack the same keys are kept together, without those keys.
    """
    candidates = torch.arange(int(offsets.min()) - lattice.num_sites + 1, int(offsets.max()) + 1)
    lag = offsets[:, None] - candidates[None]
    geometry = [lattice.lag_geometry(stream, lag) for stream in streams]
    columns = _visible_columns([visible for visible, _ in geometry])
    geometry = [(visible[:, columns], rho_squared[:, columns]) for visible, rho_squared in geometry]
    keys = origins[:, None] + candidates[columns]  # [n, K]
    groups: dict[bytes, list[int]] = {}
    for n, exists in enumerate(keys >= 0):
        groups.setdefault(exists.numpy().tobytes(), []).append(n)
    blocks = []
    for members in groups.values():
        exists = keys[members[0]] >= 0
        present = [(visible[:, exists], rho_squared[:, exists]) for visible, rho_squared in geometry]
        blocks.append(Blocks(
            (origins[members, None] + offsets).clamp(max=seq_len - 1),
            keys[members][:, exists].clamp(max=seq_len - 1),
            _masks(streams, present),
        ))
    order = [n for members in groups.values() for n in members]
    queries = origins[order, None] + offsets
    return Family(tuple(blocks), _places(queries.flatten(), seq_len))


def _causal_families(lattice: TorusLattice, seq_len: int) -> Iterator[Family]:
    pairs = ((Stream.major_forward, Stream.major_backward), (Stream.minor_forward, Stream.minor_backward),
             (Stream.spiral_cw,), (Stream.spiral_ccw,))
    for streams in pairs:
        stride = lattice.stride(streams[0])
        length = math.ceil(seq_len / stride)  # tokens in a residue class
        run = min(RUN, length)
        starts = torch.arange(0, length, run) * stride
        origins = (starts[:, None] + torch.arange(min(stride, seq_len))).flatten()
        yield _causal_family(lattice, streams, origins[origins < seq_len], torch.arange(run) * stride, seq_len)
    minor = lattice.n_minor
    turns = math.ceil(seq_len / minor)
    side_u, side_v = tile_side(turns), tile_side(minor)
    origins = (torch.arange(0, turns, side_u)[:, None] * minor + torch.arange(0, minor, side_v)).flatten()
    offsets = (torch.arange(side_u)[:, None] * minor + torch.arange(side_v)).flatten()
    yield _causal_family(lattice, (Stream.cross_u_to_v, Stream.cross_v_to_u), origins[origins < seq_len], offsets,
                         seq_len)


@functools.lru_cache(maxsize=16)
def families(lattice: TorusLattice, seq_len: int) -> tuple[Family, ...]:
    """The families of all eight streams, kept for the lattice.

    Raises:
        ValueError: the topology is neither periodic nor causal, or the sequence does not fit it.
    """
    lattice.check_length(seq_len)
    if lattice.topology == "periodic":
        return tuple(_periodic_families(lattice))
    if lattice.is_causal:
        return tuple(_causal_families(lattice, seq_len))
    raise ValueError(f"compose covers the periodic and the causal topology, not {lattice.topology}")
