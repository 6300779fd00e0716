"""``torus_kernels::rope``: rotary positions on the lattice; its own gradient, turned the other way."""

from __future__ import annotations

from torch import Tensor

from ..backends import Problem, select
from ..lattice import TorusLattice
from ._library import define, differentiable, empty_tokens


def _rope(x, lattice, offset, inverse, backend) -> Tensor:
    module = select(backend, Problem(x.device.type, x.dtype, x.shape[-1], "rope"))
    out = empty_tokens(x)
    if x.numel() > 0:
        module.rope(x, TorusLattice.from_spec(lattice), offset, inverse, out)
    return out


def _rope_fake(x, lattice, offset, inverse, backend) -> Tensor:
    return empty_tokens(x)


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.lattice, ctx.offset, ctx.inverse, ctx.backend = inputs


def _autograd_backward(ctx, d_out):
    # A rotation's transpose is its inverse.
    return rope_op(d_out, ctx.lattice, ctx.offset, not ctx.inverse, ctx.backend), None, None, None, None


rope_op = differentiable(
    define("rope", "Tensor x, int[] lattice, SymInt offset, bool inverse, str backend", "Tensor", _rope, _rope_fake),
    _setup_context, _autograd_backward, of="lattice_rope",
)
