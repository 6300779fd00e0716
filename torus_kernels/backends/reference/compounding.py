"""EMA compounding by its formulas, in float32 or better with one final rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import parameter_dtype


def _gate(gate: Tensor) -> Tensor:
    """``[H]`` or ``[B, H, T]`` made to broadcast against ``[B, H, T, D]``."""
    return gate[None, :, None, None] if gate.dim() == 1 else gate[..., None]


def _reduce_gate(per_channel: Tensor, gate: Tensor) -> Tensor:
    """Gradient of a gate from its gradient per channel ``[B, H, T, D]``."""
    per_token = per_channel.sum(dim=-1)
    return per_token.sum(dim=(0, 2)) if gate.dim() == 1 else per_token


def ema_compound(
    x: Tensor, state: Tensor, alpha: Tensor, beta: Tensor | None, velocity: Tensor | None,
    out: Tensor, new_velocity: Tensor | None,
) -> None:
    """Writes ``state + alpha * step``; the step is ``x - state``, or the velocity updated with it."""
    with torch.autocast(x.device.type, enabled=False):
        acc = parameter_dtype(x.dtype)
        state = state.to(acc)
        step = x.to(acc) - state
        if beta is not None and velocity is not None and new_velocity is not None:  # all or none
            step = _gate(beta) * velocity + (1 - _gate(beta)) * step
            new_velocity.copy_(step)
        out.copy_(state + _gate(alpha) * step)


def ema_compound_backward(
    d_out: Tensor, d_new_velocity: Tensor | None,
    x: Tensor, state: Tensor, alpha: Tensor, beta: Tensor | None, velocity: Tensor | None,
    d_x: Tensor, d_state: Tensor, d_alpha: Tensor, d_beta: Tensor | None, d_velocity: Tensor | None,
) -> None:
    """Writes the gradients of `ema_compound`."""
    with torch.autocast(x.device.type, enabled=False):
        acc = parameter_dtype(x.dtype)
        d_out = d_out.to(acc)
        gap = x.to(acc) - state.to(acc)
        d_step = _gate(alpha) * d_out
        step, d_gap = gap, d_step
        if (
            beta is not None and velocity is not None and d_new_velocity is not None
            and d_beta is not None and d_velocity is not None  # all or none
        ):
            step = _gate(beta) * velocity + (1 - _gate(beta)) * gap
            d_step = d_step + d_new_velocity.to(acc)
            d_beta.copy_(_reduce_gate(d_step * (velocity - gap), beta))
            d_velocity.copy_(_gate(beta) * d_step)
            d_gap = (1 - _gate(beta)) * d_step
        d_alpha.copy_(_reduce_gate(d_out * step, alpha))
        d_x.copy_(d_gap)
        d_state.copy_(d_out - d_gap)


def ema_multiscale(
    x: Tensor, states: Tensor, alphas: Tensor, scale_weights: Tensor, mixed: Tensor, new_states: Tensor
) -> None:
    """Writes ``new_states[s] = states[s] + alphas[s] * (x - states[s])`` and their weighted sum."""
    with torch.autocast(x.device.type, enabled=False):
        acc = parameter_dtype(x.dtype)
        states = states.to(acc)
        updated = states + alphas[:, None, :, None, None] * (x.to(acc) - states)  # [S, B, H, T, D]
        new_states.copy_(updated)
        mixed.copy_((scale_weights[:, None, None, None, None] * updated).sum(dim=0))


def ema_multiscale_backward(
    d_mixed: Tensor, d_new_states: Tensor,
    x: Tensor, states: Tensor, alphas: Tensor, scale_weights: Tensor,
    d_x: Tensor, d_states: Tensor, d_alphas: Tensor, d_scale_weights: Tensor,
) -> None:
    """Writes the gradients of `ema_multiscale`."""
    with torch.autocast(x.device.type, enabled=False):
        acc = parameter_dtype(x.dtype)
        alpha = alphas[:, None, :, None, None]
        gap = x.to(acc) - states.to(acc)
        d_mixed = d_mixed.to(acc)
        d_updated = scale_weights[:, None, None, None, None] * d_mixed + d_new_states.to(acc)  # [S, B, H, T, D]
        d_scale_weights.copy_((d_mixed * (states.to(acc) + alpha * gap)).sum(dim=(1, 2, 3, 4)))
        d_alphas.copy_((d_updated * gap).sum(dim=(1, 3, 4)))
        d_x.copy_((alpha * d_updated).sum(dim=0))
        d_states.copy_((1 - alpha) * d_updated)
