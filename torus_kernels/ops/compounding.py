"""``torus_kernels::ema_compound`` and ``torus_kernels::ema_multiscale``: memory from layer to layer."""

from __future__ import annotations

from torch import Tensor

from ..backends import Problem, select
from ._library import define, differentiable, empty_tokens, first_order_only, given, like_or_empty, tokens_or_empty


def _select(backend: str, x: Tensor):
    return select(backend, Problem(x.device.type, x.dtype, x.shape[-1], "compounding"))


def _compound_outputs(x, velocity) -> tuple[Tensor, Tensor]:
    return empty_tokens(x), tokens_or_empty(velocity, x)


def _compound(x, state, alpha, beta, velocity, backend):
    module = _select(backend, x)
    out, new_velocity = _compound_outputs(x, velocity)
    if x.numel() > 0:
        module.ema_compound(x, state, alpha, beta, velocity, out, given(velocity, new_velocity))
    return out, new_velocity


def _compound_fake(x, state, alpha, beta, velocity, backend):
    return _compound_outputs(x, velocity)


def _compound_backward_outputs(x, state, alpha, beta, velocity) -> tuple[Tensor, ...]:
    return (empty_tokens(x), empty_tokens(state), like_or_empty(alpha, x), like_or_empty(beta, x),
            tokens_or_empty(velocity, x))


def _compound_backward(d_out, d_new_velocity, x, state, alpha, beta, velocity, backend):
    module = _select(backend, x)
    grads = _compound_backward_outputs(x, state, alpha, beta, velocity)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    d_x, d_state, d_alpha, d_beta, d_velocity = grads
    module.ema_compound_backward(
        d_out, given(velocity, d_new_velocity), x, state, alpha, beta, velocity,
        d_x, d_state, d_alpha, given(beta, d_beta), given(velocity, d_velocity),
    )
    return grads


def _compound_backward_fake(d_out, d_new_velocity, x, state, alpha, beta, velocity, backend):
    return _compound_backward_outputs(x, state, alpha, beta, velocity)


def _compound_setup_context(ctx, inputs, output) -> None:
    x, state, alpha, beta, velocity, ctx.backend = inputs
    ctx.save_for_backward(x, state, alpha, beta, velocity)


def _compound_autograd_backward(ctx, d_out, d_new_velocity):
    x, state, alpha, beta, velocity = ctx.saved_tensors
    d_x, d_state, d_alpha, d_beta, d_velocity = compound_backward_op(
        d_out, d_new_velocity, x, state, alpha, beta, velocity, ctx.backend
    )
    d_backend = None
    return d_x, d_state, d_alpha, given(beta, d_beta), given(velocity, d_velocity), d_backend


_GATES = "Tensor x, Tensor state, Tensor alpha, Tensor? beta, Tensor? velocity, str backend"
compound_op = differentiable(
    define("ema_compound", _GATES, "(Tensor, Tensor)", _compound, _compound_fake),
    _compound_setup_context, _compound_autograd_backward, of="ema_compound",
)
compound_backward_op = first_order_only(
    define("ema_compound_backward", f"Tensor d_out, Tensor d_new_velocity, {_GATES}",
           "(Tensor, Tensor, Tensor, Tensor, Tensor)", _compound_backward, _compound_backward_fake),
    of="ema_compound",
)


def _multiscale_outputs(x, states) -> tuple[Tensor, Tensor]:
    return empty_tokens(x), states.new_empty(states.shape)


def _multiscale(x, states, alphas, scale_weights, backend):
    module = _select(backend, x)
    mixed, new_states = _multiscale_outputs(x, states)
    if x.numel() > 0:
        module.ema_multiscale(x, states, alphas, scale_weights, mixed, new_states)
    return mixed, new_states


def _multiscale_fake(x, states, alphas, scale_weights, backend):
    return _multiscale_outputs(x, states)


def _multiscale_backward_outputs(x, states, alphas, scale_weights) -> tuple[Tensor, ...]:
    return (empty_tokens(x), states.new_empty(states.shape), like_or_empty(alphas, x), like_or_empty(scale_weights, x))


def _multiscale_backward(d_mixed, d_new_states, x, states, alphas, scale_weights, backend):
    module = _select(backend, x)
    grads = _multiscale_backward_outputs(x, states, alphas, scale_weights)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    module.ema_multiscale_backward(d_mixed, d_new_states, x, states, alphas, scale_weights, *grads)
    return grads


def _multiscale_backward_fake(d_mixed, d_new_states, x, states, alphas, scale_weights, backend):
    return _multiscale_backward_outputs(x, states, alphas, scale_weights)


def _multiscale_setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _multiscale_autograd_backward(ctx, d_mixed, d_new_states):
    grads = multiscale_backward_op(d_mixed, d_new_states, *ctx.saved_tensors, ctx.backend)
    d_backend = None
    return (*grads, d_backend)


_SCALES = "Tensor x, Tensor states, Tensor alphas, Tensor scale_weights, str backend"
multiscale_op = differentiable(
    define("ema_multiscale", _SCALES, "(Tensor, Tensor)", _multiscale, _multiscale_fake),
    _multiscale_setup_context, _multiscale_autograd_backward, of="ema_compound_multiscale",
)
multiscale_backward_op = first_order_only(
    define("ema_multiscale_backward", f"Tensor d_mixed, Tensor d_new_states, {_SCALES}",
           "(Tensor, Tensor, Tensor, Tensor)", _multiscale_backward, _multiscale_backward_fake),
    of="ema_compound_multiscale",
)
