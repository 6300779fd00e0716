"""What the forward and the backward pass share on the host: devices, chunks of heads, the window's arguments."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from ...lattice import TorusLattice
from .primitives.lattice import cross_window


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the tensors' device; the interpreter plays an early one."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache; a guess under the interpreter."""
    if device.type != "cuda":
        return 1 << 25
    return torch.cuda.get_device_properties(device).L2_cache_size


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


_NO_WINDOW = (0.0,) * 4


@functools.lru_cache(maxsize=256)
def window_arguments(lattice: TorusLattice, seq_len: int) -> tuple[int | float, ...]:
    """The window as kernels of the cross flows take it, from ``a_lo`` on."""
    window = cross_window(lattice, seq_len)
    if window is None:
        rows, cols = -(-seq_len // lattice.n_minor), min(lattice.n_minor, seq_len)
        return (0, 0, 0, 0, rows, cols, 0, 0, 0, 0, *_NO_WINDOW)
    return (window.a_lo, window.a_hi, window.b_lo, window.b_hi, window.num_rows, window.num_cols, *window.radii,
            *window.inverse_squares)


def rows(x: Tensor) -> Tensor:
    """Tokens whose last dimension is contiguous; any other strides are read as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x: Tensor):
    """Makes the device of x current where it is not; kernels are launched on the current device."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
