"""The workloads, by the names under which results are reported, and their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torus_kernels import DEFAULT_DECAY, TorusLattice, torus_attention
from torus_kernels.lattice import NUM_STREAMS

# In the order in which peers take them and gradients are reported.
DIFFERENTIABLE = ("q", "k", "v", "weights", "decay", "state", "alpha")

Attention = Callable[..., Tensor]
"""``(q, k, v, weights, decay, state, alpha, lattice) -> out``: tokens ``[B, H, T, D]``, weights and decay ``[H, 8]``,
alpha ``[H]``, differentiable with respect to all seven tensors. Operator and peers are called this way."""


def operator_on(backend: str) -> Attention:
    """The operator on a backend, called as an `Attention`."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, state: Tensor, alpha: Tensor,
        lattice: TorusLattice,
    ) -> Tensor:
        return torus_attention(q, k, v, lattice, stream_weights=weights, decay=decay, ema_state=state,
                               ema_alpha=alpha, backend=backend)

    return attention


@dataclass(frozen=True)
class Workload:
    """A lattice and the sizes of the tokens on it. Heads are not grouped: every query head has its own keys.

    Attributes:
        batch: B where a GPU computes; on the CPU it is ``cpu_batch``.
        seq_len: T; the number of sites, also in the causal topology.
    """

    name: str
    lattice: TorusLattice
    batch: int
    heads: int
    head_dim: int
    cpu_batch: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    @property
    def seq_len(self) -> int:
        return self.lattice.num_sites

    def describe(self) -> str:
        """Topology, lattice and sizes on the CPU, as tables show them."""
        lattice = self.lattice
        winding = "" if lattice.winding == 1 else f", winding {lattice.winding}"
        return (f"{lattice.topology} {lattice.n_major}x{lattice.n_minor}{winding}, "
                f"B={self.cpu_batch} H={self.heads} D={self.head_dim}")


def _torus(n_major: int, n_minor: int, topology: str = "periodic", winding: int = 1) -> TorusLattice:
    return TorusLattice(n_major, n_minor, topology, winding, cross_radius=(3, 7))


_BF16 = (torch.bfloat16,)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("seed-512", _torus(32, 16), batch=8, heads=8, head_dim=32, cpu_batch=8),
        Workload("field-4k", _torus(64, 64), batch=4, heads=8, head_dim=64),
        Workload("field-16k", _torus(128, 128), batch=2, heads=8, head_dim=64, dtypes=_BF16),
        Workload("field-64k", _torus(256, 256), batch=1, heads=8, head_dim=64, dtypes=_BF16),
        Workload("text-4k", _torus(64, 64, "causal"), batch=4, heads=12, head_dim=64),
        Workload("text-32k", _torus(128, 256, "causal"), batch=1, heads=16, head_dim=128, dtypes=_BF16),
        # Loops whose length is no multiple of a vector.
        Workload("field-60x36", _torus(60, 36, winding=3), batch=1, heads=8, head_dim=64),
        Workload("field-90x180", _torus(90, 180, winding=2), batch=1, heads=8, head_dim=64),
        # The third topology: longitude is closed, latitude is open.
        Workload("cylinder-4k", _torus(64, 64, "cylinder"), batch=4, heads=8, head_dim=64),
    )
}


def head_dimension(x: Tensor) -> int:
    """Which dimension of an input, an output or a gradient counts heads: 1 of tokens ``[B, H, T, D]``, 0 of
    parameters."""
    return 1 if x.dim() == 4 else 0


@dataclass
class Inputs:
    """Arguments of one call, and the gradient that flows into its output."""

    lattice: TorusLattice
    q: Tensor  # [B, H, T, D], as k, v, state and d_out
    k: Tensor
    v: Tensor
    weights: Tensor  # [H, 8]
    decay: Tensor  # [H, 8]
    state: Tensor
    alpha: Tensor  # [H]
    d_out: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The seven differentiable tensors, in the order of `DIFFERENTIABLE`."""
        return tuple(getattr(self, name) for name in DIFFERENTIABLE)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers with tokens in ``dtype`` and parameters in the dtype that goes with it."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        parameters = ("weights", "decay", "alpha")
        return dataclasses.replace(self, **{
            name: getattr(self, name).to(wide if name in parameters else dtype)
            for name in (*DIFFERENTIABLE, "d_out")
        })

    def of_heads(self, heads: Sequence[int]) -> Inputs:
        """The inputs of these heads alone."""
        index = torch.tensor(heads)
        return dataclasses.replace(self, **{
            name: (x := getattr(self, name)).index_select(head_dimension(x), index)
            for name in (*DIFFERENTIABLE, "d_out")
        })

    def forward(self, attention: Attention) -> Tensor:
        """``out`` alone, without a graph."""
        with torch.no_grad():
            return attention(*self.tensors(), self.lattice)

    def forward_backward(self, attention: Attention) -> tuple[Tensor | None, ...]:
        """``out`` and the gradients of the seven inputs; None for an input that ``attention`` does not use."""
        leaves = tuple(x.detach().requires_grad_() for x in self.tensors())
        out = attention(*leaves, self.lattice)
        return (out.detach(), *torch.autograd.grad(out, leaves, self.d_out, allow_unused=True))


def make_inputs(
    lattice: TorusLattice,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seq_len: int | None = None,
    seed: int = 0,
) -> Inputs:
    """Unit normal tokens, random weights, the default decay and an EMA state; equal numbers up to rounding for every
    dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, lattice.num_sites if seq_len is None else seq_len, head_dim)
    q, k, v, state, d_out = (torch.randn(shape, generator=generator) for _ in range(5))
    weights = torch.randn(heads, NUM_STREAMS, generator=generator)
    alpha = torch.rand(heads, generator=generator)
    decay = torch.tensor(DEFAULT_DECAY).repeat(heads, 1)
    return Inputs(lattice, q, k, v, weights, decay, state, alpha, d_out).to(dtype)


def smaller(workload: Workload, side: int) -> Workload:
    """The workload on a square lattice of ``side`` x ``side`` sites, named after its number of sites."""
    lattice = dataclasses.replace(workload.lattice, n_major=side, n_minor=side, winding=1)
    name = f"{workload.name.partition('-')[0]}-{lattice.num_sites}"
    return dataclasses.replace(workload, name=name, lattice=lattice)


def cpu_inputs(workload: Workload, dtype: torch.dtype) -> Inputs:
    """Inputs of a workload at its CPU batch."""
    return make_inputs(workload.lattice, batch=workload.cpu_batch, heads=workload.heads, head_dim=workload.head_dim,
                       dtype=dtype)
