"""Torus attention by FlexAttention: one compiled kernel per stream."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from torus_kernels import Stream, TorusLattice

from .compiling import allow_recompiles


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    allow_recompiles()
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=1)
def _streams(lattice: TorusLattice, seq_len: int) -> tuple[tuple[Tensor, BlockMask], ...]:
    """Of each stream the squared distances ``[T, T]`` and the block mask.

    Tables of all pairs, because the compiled kernel reads them in vectors; on a CPU that is four times as fast as
    arithmetic on the indices, or a table of displacements.
    """
    streams = []
    for stream in Stream:
        visible, rho_squared = lattice.stream_geometry(stream, seq_len)

        def is_visible(b, h, query, key, visible=visible):
            return visible[query, key]

        mask = create_block_mask(is_visible, None, None, seq_len, seq_len, device="cpu")
        streams.append((rho_squared.float(), mask))
    return tuple(streams)


def _flex(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, state: Tensor,
    alpha: Tensor, lattice: TorusLattice,
) -> Tensor:
    y = torch.zeros((), dtype=weights.dtype)
    for stream, (rho_squared, mask) in enumerate(_streams(lattice, q.shape[2])):
        strength = -0.5 * decay[:, stream]

        def with_bias(score, b, h, query, key, strength=strength, rho_squared=rho_squared):
            return score + strength[h] * rho_squared[query, key]

        o = attend(q, k, v, score_mod=with_bias, block_mask=mask)
        y = torch.addcmul(y, weights[:, stream, None, None], o.to(y.dtype))
    return torch.lerp(state.to(alpha.dtype), y, alpha[:, None, None]).to(q.dtype)


def flex(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, state: Tensor, alpha: Tensor,
    lattice: TorusLattice,
) -> Tensor:
    """Torus attention by eight compiled ``flex_attention`` calls with block masks and score modifications.

    On a CPU FlexAttention has no backward. The first call on a lattice compiles for a minute or more. Shapes are
    those of `benchmarks.workloads.Attention`.
    """
    return _flex(_compiled(), q, k, v, weights, decay, state, alpha, lattice)


def flex_eager(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, state: Tensor, alpha: Tensor,
    lattice: TorusLattice,
) -> Tensor:
    """`flex` without the compiler: the same masks and score modifications over dense scores, to be checked, not timed.
    """
    return _flex(flex_attention, q, k, v, weights, decay, state, alpha, lattice)
