"""The ``torus_kernels`` operator namespace and what every registration in it shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("torus_kernels", "DEF")
DEVICES = ("CPU", "CUDA")


def define(name: str, arguments: str, returns: str, compute: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Defines ``torus_kernels::name`` with its one schema, its computation on every device and its fake."""
    LIBRARY.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        LIBRARY.impl(name, compute, device)
    torch.library.register_fake(f"torus_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.torus_kernels, name).default


def differentiable(name: str, setup_context: Callable, backward: Callable) -> None:
    """Registers the first-order gradient of ``torus_kernels::name``."""
    torch.library.register_autograd(f"torus_kernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def first_order_only(name: str, of: str) -> None:
    """Makes differentiating the backward operator ``name`` an error that says so."""

    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(f"{of} is differentiable once: double backward is not implemented")

    differentiable(name, lambda ctx, inputs, output: None, backward)


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
    return owner.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def tokens_or_empty(x: Tensor | None, owner: Tensor) -> Tensor:
    """`empty_tokens` for an optional argument; of no elements where the argument was not given."""
    return owner.new_empty(0) if x is None else empty_tokens(x)


def given(argument: Tensor | None, buffer: Tensor) -> Tensor | None:
    """The buffer of an optional argument as backends take it: None where the argument was not given."""
    return None if argument is None else buffer
