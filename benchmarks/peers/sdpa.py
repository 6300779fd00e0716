"""The two peers without structure: every stream as one masked dense attention, and one dense attention alone."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from torus_kernels import Stream, TorusLattice


@functools.lru_cache(maxsize=1)
def _masks(lattice: TorusLattice, seq_len: int, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
    """Of each stream ``[T, T]``: 0 where visible and else -inf, and the squared geodesic distance."""
    masks = []
    for stream in Stream:
        visible, rho_squared = lattice.stream_geometry(stream, seq_len)
        hidden = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
        masks.append((hidden, rho_squared.to(dtype)))
    return tuple(masks)


def dense(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, state: Tensor, alpha: Tensor,
    lattice: TorusLattice,
) -> Tensor:
    """Torus attention by eight SDPA calls with T x T float masks; differentiable, any topology, O(T^2) memory.

    Shapes are those of `benchmarks.workloads.Attention`.
    """
    y = torch.zeros((), dtype=weights.dtype)
    for stream, (hidden, rho_squared) in enumerate(_masks(lattice, q.shape[2], decay.dtype)):
        bias = torch.addcmul(hidden, decay[:, stream, None, None], rho_squared, value=-0.5)  # [H, T, T]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])
        y = torch.addcmul(y, weights[:, stream, None, None], o)
    return torch.lerp(state.to(alpha.dtype), y, alpha[:, None, None]).to(q.dtype)


def flash(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, state: Tensor, alpha: Tensor,
    lattice: TorusLattice,
) -> Tensor:
    """One dense SDPA call on the same q, k, v, causal where the lattice is: what one ordinary attention costs.

    It is a unit of cost and computes something else; weights, decay, state and alpha are not used.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=lattice.is_causal)
