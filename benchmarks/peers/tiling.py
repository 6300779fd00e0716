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

RUN = 128
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


def _seen(geometry: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The candidates that any stream sees, ordered: the first stream's only, shared, the second's only; and the
    geometry on these columns."""
    columns = torch.stack([visible.any(dim=0) for visible, _ in geometry])  # [streams, candidates]
    index = columns.any(dim=0).nonzero().squeeze(1)
    rank = columns[-1, index].int() - columns[0, index].int()
    index = index[rank.argsort(stable=True)]
    return index, [(visible[:, index], rho_squared[:, index]) for visible, rho_squared in geometry]


def _masks(streams: tuple[Stream, ...], geometry: list[tuple[Tensor, Tensor]]) -> tuple[StreamMask, ...]:
    masks = []
    for stream, (visible, rho_squared) in zip(streams, geometry, strict=True):
        seen = visible.any(dim=0).nonzero()
        first, last = int(seen.min()), int(seen.max()) + 1
        visible, rho_squared = visible[:, first:last], rho_squared[:, first:last]
        masks.append(StreamMask(stream, first, last, visible, rho_squared.masked_fill(~visible, 0.0)))
    return tuple(masks)


def _places(queries: Tensor, seq_len: int) -> Tensor:
    """Where each token is among ``queries`` ``[rows]``; places outside the sequence are ignored, and of repetitions one
    counts."""
    rows = (queries < seq_len).nonzero().squeeze(1)
    place = torch.full((seq_len,), -1)
    place[queries[rows]] = rows
    if (place < 0).any():
        raise RuntimeError("the partition leaves out a token")
    return place


def _family(
    streams: tuple[Stream, ...], geometry: list[tuple[Tensor, Tensor]], queries: Tensor, keys: Tensor, seq_len: int
) -> Family:
    """Blocks of ``queries`` ``[n, Q]`` that see ``keys`` ``[n, K]`` by one ``geometry``: of each stream ``visible`` and
    ``rho_squared`` ``[Q, K]``.

    A negative key does not exist: blocks that lack the same keys are kept together, without those keys. Tokens past
    the end of the sequence are computed and dropped; nothing before the end sees them.
    """
    groups: dict[bytes, list[int]] = {}
    for n, exists in enumerate(keys >= 0):
        groups.setdefault(exists.numpy().tobytes(), []).append(n)
    blocks = []
    for members in groups.values():
        exists = keys[members[0]] >= 0
        present = [(visible[:, exists], rho_squared[:, exists]) for visible, rho_squared in geometry]
        blocks.append(Blocks(
            queries[members].clamp(max=seq_len - 1), keys[members][:, exists].clamp(max=seq_len - 1),
            _masks(streams, present),
        ))
    order = [n for members in groups.values() for n in members]
    return Family(tuple(blocks), _places(queries[order].flatten(), seq_len))


def _grid_family(lattice: TorusLattice, streams: tuple[Stream, ...], origins: Tensor, offsets: Tensor) -> Family:
    """Blocks on the grid: block n holds the queries ``origins[n] + offsets``, all ``(u, v)``."""
    u = torch.arange(lattice.n_major)
    is_open = lattice.topology == "cylinder"
    if is_open:
        low, high = (int(limit) for limit in offsets[:, 0].aminmax())
        u = torch.arange(low - lattice.n_major + 1, high + lattice.n_major)
    sites = torch.cartesian_prod(u, torch.arange(lattice.n_minor))  # as seen from (0, 0)
    displacement = offsets[:, None] - sites[None]  # [Q, C, 2]
    seen, geometry = _seen([lattice.displacement_geometry(stream, *displacement.unbind(-1)) for stream in streams])

    def tokens(displaced: Tensor) -> Tensor:
        u, v = (origins[:, None] + displaced[None]).unbind(-1)
        token = u % lattice.n_major * lattice.n_minor + v % lattice.n_minor
        return token.masked_fill((u < 0) | (u >= lattice.n_major), -1) if is_open else token

    return _family(streams, geometry, tokens(offsets), tokens(sites[seen]), lattice.num_sites)


def _tile_starts(length: int, side: int, is_open: bool) -> Tensor:
    """First rows of tiles that cover an axis: the last tile goes on round a closed one, and overlaps on an open one."""
    starts = torch.arange(0, length, side)
    return starts.clamp(max=length - side) if is_open else starts


def _grid_families(lattice: TorusLattice) -> Iterator[Family]:
    major, minor = torch.arange(lattice.n_major), torch.arange(lattice.n_minor)
    rows, columns = major[:, None] * torch.tensor([1, 0]), minor[:, None] * torch.tensor([0, 1])
    yield _grid_family(lattice, (Stream.major_forward, Stream.major_backward), columns, rows)
    yield _grid_family(lattice, (Stream.minor_forward, Stream.minor_backward), rows, columns)
    for stream, slope in ((Stream.spiral_cw, lattice.winding), (Stream.spiral_ccw, -lattice.winding)):
        yield _grid_family(lattice, (stream,), columns, major[:, None] * torch.tensor([1, slope]))
    side_u, side_v = tile_side(lattice.n_major), tile_side(lattice.n_minor)
    origins = torch.cartesian_prod(_tile_starts(lattice.n_major, side_u, lattice.topology == "cylinder"),
                                   _tile_starts(lattice.n_minor, side_v, False))
    offsets = torch.cartesian_prod(torch.arange(side_u), torch.arange(side_v))
    yield _grid_family(lattice, (Stream.cross_u_to_v, Stream.cross_v_to_u), origins, offsets)


def _causal_family(
    lattice: TorusLattice, streams: tuple[Stream, ...], origins: Tensor, offsets: Tensor, seq_len: int
) -> Family:
    """Blocks on the line of time: block n holds the queries ``origins[n] + offsets``."""
    candidates = torch.arange(int(offsets.min()) - lattice.num_sites + 1, int(offsets.max()) + 1)
    lag = offsets[:, None] - candidates[None]
    seen, geometry = _seen([lattice.lag_geometry(stream, lag) for stream in streams])
    return _family(streams, geometry, origins[:, None] + offsets, origins[:, None] + candidates[seen], seq_len)


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
        ValueError: the sequence does not fit the lattice.
    """
    lattice.check_length(seq_len)
    return tuple(_causal_families(lattice, seq_len) if lattice.is_causal else _grid_families(lattice))
