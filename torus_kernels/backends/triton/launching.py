"""What the forward and the backward pass share on the host: devices, chunks of heads, the cross flows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...lattice import Stream, TorusLattice
from .primitives.lattice import LineFamily, cross_window
from .primitives.tiles import block_d


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability that configurations go by: that of the tensors' device, or an early one where it has neither
    wgmma nor more shared memory than those had; for tensors on the CPU, under the interpreter, an early one too."""
    if device.type == "cpu":
        return 8, 0
    major, minor = torch.cuda.get_device_capability(device)
    return (8, 9) if major == 12 else (major, minor)


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache; a guess for tensors on the CPU, under the interpreter."""
    return 1 << 25 if device.type == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size


MAX_GRID_Y = 65535


def chunk_heads(heads: int, head_bytes: int, device: torch.device) -> int:
    """Heads to a chunk, such that what passes from its first launch to its second stays in the L2 cache."""
    fitting = max(1, int(0.75 * l2_bytes(device)) // max(1, head_bytes))
    if fitting >= heads:
        fitting = heads
    else:
        chunks = -(-heads // fitting)
        fitting = -(-heads // chunks)  # of even size
    return min(fitting, MAX_GRID_Y)


def family_mask(families: Iterable[LineFamily]) -> int:
    """Line families as kernels take them, a bit for each."""
    return sum(1 << family.family for family in families)


class Blocks(NamedTuple):
    """How the lines of one size are visited: blocks of queries by blocks of keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1  # of the channels, each with sums of its own
    summed: int = 1  # blocks of keys in a step of the backward's sweep for ``delta``, queries first


def is_light(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether tiles of 64 rows leave registers for anything else."""
    return block_d(head_dim) <= 64 and dtype != torch.float32


def parts_of(parts: int, head_dim: int) -> int:
    """As many parts of the channels, or so many that each has 32 or more."""
    return min(parts, max(1, block_d(head_dim) // 32))


class Flow(NamedTuple):
    """A cross flow as kernels take it; without a stream, what is left to do where neither takes part."""

    stream: int  # or -1
    arguments: tuple[int | float, ...]  # num_rows, num_cols, a_lo, a_hi, b_lo, b_hi, inverse squares of the radii
    by_rows: bool  # whether keys are walked by rows of the lattice: along the shorter axis of the window
    depth: int  # displacements along it
    width: int  # and along the longer one

    def tile(self, across: int, along: int) -> tuple[int, int]:
        """``(TILE_U, TILE_V)`` of a tile with that many sites along either axis."""
        return (across, along) if self.by_rows else (along, across)

    def walked(self, along: int) -> int:
        """Sites along the steps of the walk around a tile with that many sites along them."""
        return along + self.width - 1

    def rows_a_step(self, across: int, lattice: TorusLattice, most: int, spare: bool) -> int:
        """Rows of keys, at most ``most``, to take in a step of the walk around a tile with that many sites across them.

        No row is left over, as what would follow it may not exist, but where ``spare`` rows may be walked, of whose
        sites time says whether they exist. Where the ends of a cylinder cut the walk its rows are any number.
        """
        rows = across + self.depth - 1
        cut = self.by_rows and lattice.topology != "periodic"
        timed = spare and lattice.is_causal
        fitting = [n for n in range(1, most + 1) if n == 1 or timed or not (cut or rows % n)]
        # A step costs some four tenths of a row, whatever it takes: sums are rescaled, maxima exchanged.
        return min(fitting, key=lambda n: -(-rows // n) * (n + 0.4))

    def tiles(self, across: int, along: int) -> int:
        """Tiles of the lattice."""
        tile_u, tile_v = self.tile(across, along)
        return -(-self.arguments[0] // tile_u) * -(-self.arguments[1] // tile_v)


_FLOWS = (Stream.cross_u_to_v, Stream.cross_v_to_u)


@functools.lru_cache(maxsize=256)
def cross_flows(lattice: TorusLattice, seq_len: int) -> tuple[Flow, ...]:
    """The cross flows that take part, in order, each with the window that it sees; or one that is none."""
    window = cross_window(lattice, seq_len)
    if window is None:
        rows, cols = -(-seq_len // lattice.n_minor), min(lattice.n_minor, seq_len)
        return (Flow(-1, (rows, cols, 0, 0, 0, 0, 0.0, 0.0), True, 1, 1),)
    flows = []
    for place, stream in enumerate(_FLOWS):
        if stream in lattice.streams:
            radius_u, radius_v = window.radii[2 * place:2 * place + 2]
            a_lo, a_hi = max(window.a_lo, -radius_u), min(window.a_hi, radius_u)
            b_lo, b_hi = max(window.b_lo, -radius_v), min(window.b_hi, radius_v)
            flows.append(Flow(
                stream.index, (window.num_rows, window.num_cols, a_lo, a_hi, b_lo, b_hi,
                               *window.inverse_squares[2 * place:2 * place + 2]),
                a_hi - a_lo <= b_hi - b_lo, 1 + min(a_hi - a_lo, b_hi - b_lo), 1 + max(a_hi - a_lo, b_hi - b_lo),
            ))
    return tuple(flows)


def rows(x: Tensor) -> Tensor:
    """Tokens whose last dimension is contiguous; any other strides are read as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x: Tensor):
    """Makes the device of x current where it is not; kernels are launched on the current device."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
