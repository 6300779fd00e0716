"""The ``torus_kernels`` operator namespace and what every registration in it shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("torus_kernels", "DEF")
DEVICES = ("CPU", "CUDA")


def define(
    name: str, arguments: str, returns: str, compute: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Defines ``torus_kernels::name`` with its one schema, its computation on every device and its fake."""
    LIBRARY.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        LIBRARY.impl(name, compute, device)
    torch.library.register_fake(f"torus_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.torus_kernels, name).default


def differentiable(
    op: torch._ops.OpOverload, setup_context: Callable[..., Any], backward: Callable[..., Any], of: str
) -> Callable[..., Any]:
    """Registers the first-order gradient of an operator of the public function ``of``; returns what calls it.

    What `torch.library.register_autograd` does, serving autograd and `torch.compile` alike, but for its price: it reads
    the schema's arguments anew in every call, which for attention's thirteen takes longer than all else on the way to
    the kernels.

    The registration has nothing for the transforms of `torch.func`, under which PyTorch would raise an error about
    itself, or for forward-mode differentiation, which would silently take the operator for a constant: calls under
    either are refused.
    """

    def compute(keyset, arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *arguments):
            output = compute(keyset, arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            d_keyset = None
            return d_keyset, *backward(ctx, *grads)

    def kernel(keyset, *arguments):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Differentiable.apply(keyset, *arguments)
        return compute(keyset, arguments)

    LIBRARY.impl(op._schema.name, kernel, "Autograd", with_keyset=True)

    def call(*arguments):
        refuse_transforms(of)
        return op(*arguments)

    return call


def refuse_transforms(of: str) -> None:
    """Raises where a `torch.func` transform or a level of forward-mode differentiation is active."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{of} cannot be transformed by torch.func (vmap, grad, jvp, ...) or differentiated in forward mode: "
            "use its batch dimension, and backward() or torch.autograd.grad"
        )


def first_order_only(op: torch._ops.OpOverload, of: str) -> Callable[..., Any]:
    """`differentiable` of a backward operator: its gradient is an error that says that there is none."""

    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(f"{of} is differentiable once: double backward is not implemented")

    return differentiable(op, lambda ctx, inputs, output: None, backward, of)


def empty_tokens(x: Tensor) -> Tensor:
    """An unwritten ``[B, H, T, D]`` tensor in x's dtype, in x's memory order where that is ``[B, T, H, D]``.

    A model that projects to ``[B, T, H * D]`` and transposes gets its output back without a copy.
    """
    batch, heads, seq_len, head_dim = x.shape
    if heads > 1 and x.stride(1) == head_dim and x.stride(2) == heads * head_dim and x.stride(3) == 1:
        return x.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)
    return x.new_empty(batch, heads, seq_len, head_dim)


def like_or_empty(x: Tensor | None, owner: Tensor) -> Tensor:
    """A gradient buffer for an optional argument; of no elements where the argument was not given."""
    return owner.new_empty(0) if x is None else x.new_empty(x.shape)


def tokens_or_empty(x: Tensor | None, owner: Tensor) -> Tensor:
    """`empty_tokens` for an optional argument; of no elements where the argument was not given."""
    return owner.new_empty(0) if x is None else empty_tokens(x)


def given(argument: Tensor | None, buffer: Tensor) -> Tensor | None:
    """The buffer of an optional argument as backends take it: None where the argument was not given."""
    return None if argument is None else buffer
