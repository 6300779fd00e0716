"""``torus_kernels::attention``: the eight streams, their mixing and EMA compounding as one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Problem, select
from ..checks import parameter_dtype
from ..lattice import NUM_STREAMS, TorusLattice
from ._library import define, differentiable, empty_tokens, first_order_only, given, like_or_empty, tokens_or_empty

# The part of the schema that the forward and the backward operator, and the native kernels behind them, share.
OPERANDS = (
    "Tensor stream_weights, Tensor decay, Tensor? ema_state, Tensor? ema_alpha, Tensor? first_key, "
    "int[] lattice, float scale"
)
_FORWARD = f"Tensor q, Tensor k, Tensor v, {OPERANDS}, bool with_lse, bool with_entropy, str backend"
_BACKWARD = f"Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor lse, {OPERANDS}, str backend"


def _forward_outputs(q: Tensor, with_lse: bool, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = (*q.shape[:3], NUM_STREAMS)
    dtype = parameter_dtype(q.dtype)
    lse = q.new_empty(rows if with_lse else (0,), dtype=dtype)
    entropy = q.new_empty(rows if with_entropy else (0,), dtype=dtype)
    return empty_tokens(q), lse, entropy


def _problem(q: Tensor) -> Problem:
    return Problem(q.device.type, q.dtype, q.shape[-1])


def _forward(
    q, k, v, stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale, with_lse, with_entropy, backend
) -> tuple[Tensor, Tensor, Tensor]:
    module = select(backend, _problem(q))
    out, lse, entropy = _forward_outputs(q, with_lse, with_entropy)
    if q.numel() > 0:
        module.attention_forward(
            q, k, v, stream_weights, decay, ema_state, ema_alpha, first_key, TorusLattice.from_spec(lattice), scale,
            out, lse if with_lse else None, entropy if with_entropy else None,
        )
    return out, lse, entropy


def _forward_fake(
    q, k, v, stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale, with_lse, with_entropy, backend
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward_outputs(q, with_lse, with_entropy)


def _backward_outputs(q, k, v, stream_weights, decay, ema_state, ema_alpha) -> tuple[Tensor, ...]:
    return (
        empty_tokens(q), empty_tokens(k), empty_tokens(v), like_or_empty(stream_weights, q), like_or_empty(decay, q),
        tokens_or_empty(ema_state, q), like_or_empty(ema_alpha, q),
    )


def _backward(
    d_out, q, k, v, lse, stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale, backend
) -> tuple[Tensor, ...]:
    module = select(backend, _problem(q))
    grads = _backward_outputs(q, k, v, stream_weights, decay, ema_state, ema_alpha)
    if q.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    *required, d_state, d_alpha = grads
    module.attention_backward(
        d_out, q, k, v, lse, stream_weights, decay, ema_state, ema_alpha, first_key,
        TorusLattice.from_spec(lattice), scale, *required, given(ema_state, d_state), given(ema_alpha, d_alpha),
    )
    return grads


def _backward_fake(
    d_out, q, k, v, lse, stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale, backend
) -> tuple[Tensor, ...]:
    return _backward_outputs(q, k, v, stream_weights, decay, ema_state, ema_alpha)


def _setup_context(ctx, inputs, output) -> None:
    (q, k, v, stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale, with_lse, _, backend) = inputs
    _, lse, entropy = output
    if not with_lse:
        raise RuntimeError("torus_kernels::attention needs with_lse=True where a gradient is wanted")
    ctx.save_for_backward(q, k, v, lse, stream_weights, decay, ema_state, ema_alpha, first_key)
    ctx.lattice, ctx.scale, ctx.backend = lattice, scale, backend
    ctx.mark_non_differentiable(lse, entropy)
    ctx.set_materialize_grads(False)  # theirs would be filled with zeros that nobody reads


def _autograd_backward(ctx, d_out, d_lse, d_entropy):
    if d_out is None:
        return (None,) * len(ctx.needs_input_grad[1:])
    q, k, v, lse, stream_weights, decay, ema_state, ema_alpha, first_key = ctx.saved_tensors
    d_q, d_k, d_v, d_weights, d_decay, d_state, d_alpha = backward_op(
        d_out, q, k, v, lse, stream_weights, decay, ema_state, ema_alpha, first_key, ctx.lattice, ctx.scale,
        ctx.backend,
    )
    d_first_key = d_lattice = d_scale = d_with_lse = d_with_entropy = d_backend = None
    return (d_q, d_k, d_v, d_weights, d_decay, given(ema_state, d_state), given(ema_alpha, d_alpha),
            d_first_key, d_lattice, d_scale, d_with_lse, d_with_entropy, d_backend)


forward_op = differentiable(
    define("attention", _FORWARD, "(Tensor, Tensor, Tensor)", _forward, _forward_fake),
    _setup_context, _autograd_backward, of="torus_attention",
)
backward_op = first_order_only(
    define("attention_backward", _BACKWARD, "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
           _backward, _backward_fake),
    of="torus_attention",
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, stream_weights: Tensor, decay: Tensor, ema_state: Tensor | None,
    ema_alpha: Tensor | None, first_key: Tensor | None, lattice: TorusLattice, scale: float, *,
    with_stats: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, lse, entropy)``; statistics are written where ``with_stats``, the LSE also where backward needs it."""
    differentiated = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, stream_weights, decay, ema_state, ema_alpha)
    )
    return forward_op(
        q, k, v, stream_weights, decay, ema_state, ema_alpha, first_key, lattice.spec, scale,
        with_stats or differentiated, with_stats, backend,
    )
