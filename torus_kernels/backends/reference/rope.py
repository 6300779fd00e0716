"""Rotary positions on the torus by their definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checks import parameter_dtype
from ...lattice import TorusLattice


def _turns(lattice: TorusLattice, seq_len: int, pairs: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Angles of the major and the minor half, each ``[T, D/4]`` float64; reduced in integers, so exact at any t."""
    t = torch.arange(seq_len, device=device)
    if lattice.is_causal:
        positions, periods = (t + offset % lattice.num_sites, t + offset % lattice.n_minor), \
            (lattice.num_sites, lattice.n_minor)
    else:
        positions, periods = (t // lattice.n_minor, t % lattice.n_minor), (lattice.n_major, lattice.n_minor)
    full_turn = (math.pi if lattice.topology == "cylinder" else 2 * math.pi, 2 * math.pi)
    angles = []
    for position, period, turn, length in zip(
        positions, periods, full_turn, (lattice.n_major, lattice.n_minor), strict=True
    ):
        harmonics = 1 + torch.arange(pairs, device=device) % max(1, length // 2)
        steps = (position % period)[:, None] * harmonics
        if turn == 2 * math.pi:
            steps = steps % period
        angles.append(turn * steps.double() / period)
    return angles[0], angles[1]


def rope(x: Tensor, lattice: TorusLattice, offset: int, inverse: bool, out: Tensor) -> None:
    """Writes ``x`` ``[B, H, T, D]`` turned by its lattice positions, or back where ``inverse``."""
    acc = parameter_dtype(x.dtype)
    halves = []
    angles = _turns(lattice, x.shape[2], x.shape[3] // 4, offset, x.device)
    for half, angle in zip(x.to(acc).chunk(2, dim=-1), angles, strict=True):
        cos, sin = angle.cos().to(acc), angle.sin().to(acc)  # [T, D/4]
        if inverse:
            sin = -sin
        x1, x2 = half.chunk(2, dim=-1)
        halves += [x1 * cos - x2 * sin, x1 * sin + x2 * cos]
    out.copy_(torch.cat(halves, dim=-1))
