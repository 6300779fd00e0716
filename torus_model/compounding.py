"""EMA compounding from layer to layer beyond the operator's own: with momentum, and over several time constants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torus_kernels import ema_compound, ema_compound_multiscale
from torus_kernels.checks import parameter_dtype

ALPHA_RANGE = (0.1, 0.99)
"""Alpha is a sigmoid mapped into this range: a layer can neither ignore its own attention nor forget its state."""

INITIAL_ALPHA = 0.9

SLOWEST_INITIAL_ALPHA = 0.2
"""Initial alpha of the slowest of several time constants; the others lie between, in equal ratios."""

BETA_RANGE = (0.0, 0.95)
"""Range of the momentum: a twentieth of what is new always enters the velocity."""

INITIAL_BETA = 0.1
"""The velocity starts from zero, so that a layer moves ``1 - beta`` times as far as without momentum at first."""

State = Tensor | tuple[Tensor, Tensor]
"""What a layer hands to the next: its output ``[B, H, T, D]``; with momentum that and the velocity ``[B, H, T, D]``,
float32 or better; with S time constants their states ``[S, B, H, T, D]``. The first layer hands on its output alone."""


def bounded(raw: Tensor, bounds: tuple[float, float]) -> Tensor:
    """A sigmoid of ``raw`` mapped into ``bounds``, in float32 or better."""
    low, high = bounds
    return low + (high - low) * torch.sigmoid(raw.to(parameter_dtype(raw.dtype)))


def unbounded(values: Sequence[float], bounds: tuple[float, float]) -> Tensor:
    """What `bounded` maps to these values within ``bounds``, one for each."""
    low, high = bounds
    return torch.logit(torch.tensor([(value - low) / (high - low) for value in values]))


def initial_alphas(scales: int) -> list[float]:
    """One for each time constant, from `INITIAL_ALPHA` down to `SLOWEST_INITIAL_ALPHA`."""
    ratio = SLOWEST_INITIAL_ALPHA / INITIAL_ALPHA
    return [INITIAL_ALPHA * ratio ** (s / max(1, scales - 1)) for s in range(scales)]


def check_memory(ema_momentum: bool, ema_scales: int) -> None:
    """Raises ValueError where momentum and several time constants are asked for together."""
    if ema_momentum and ema_scales > 1:
        raise ValueError(f"ema_momentum takes one time constant, got ema_scales = {ema_scales}")


class MomentumCompounding(nn.Module):
    """Compounding by `torus_kernels.ema_compound` with momentum, whose velocity travels with the state::

        velocity' = beta * velocity + (1 - beta) * (x - state)
        state'    = state + alpha * velocity'

    This is heavy-ball momentum (Polyak 1964) in the averaged form of Adam's first moment (Kingma & Ba 2015, algorithm
    1), along the layers. The velocity is zero after the first layer. Beta is learned, one per head, in `BETA_RANGE`.

    Args:
        heads: query heads (H).
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts from `INITIAL_BETA`."""
        self.raw_beta.copy_(unbounded([INITIAL_BETA], BETA_RANGE))

    def beta(self) -> Tensor:
        """Momentum ``[H]``."""
        return bounded(self.raw_beta, BETA_RANGE)

    def forward(self, x: Tensor, state: State, alpha: Tensor) -> tuple[Tensor, State]:
        """The compounded output ``[B, H, T, D]`` and the state for the next layer.

        Args:
            x: what the layer attends to, ``[B, H, T, D]``.
            state: that of the layer before.
            alpha: rate of compounding ``[H]``.
        """
        if isinstance(state, Tensor):
            state = state, torch.zeros_like(x, dtype=parameter_dtype(x.dtype))
        before, velocity = state
        out, velocity = ema_compound(x, before, alpha, beta=self.beta(), velocity=velocity)
        return out, (out, velocity)


class MultiscaleCompounding(nn.Module):
    """Compounding by `torus_kernels.ema_compound_multiscale` over S time constants, whose states travel together::

        states'[s] = states[s] + alphas[s] * (x - states[s])
        out        = sum_s scale_weights[s] * states'[s]

    A state with rate alpha remembers about ``1 / alpha`` layers. All of them start from the output of the first layer.
    The weights are a learned softmax, so that the output is a mean of the states; they start equal.

    Args:
        scales: number of time constants (S), at least 2.
    """

    def __init__(self, scales: int) -> None:
        super().__init__()
        self.scale_logits = nn.Parameter(torch.empty(scales))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts from equal weights."""
        self.scale_logits.zero_()

    def scale_weights(self) -> Tensor:
        """Weights of the time constants ``[S]``."""
        return self.scale_logits.to(parameter_dtype(self.scale_logits.dtype)).softmax(dim=0)

    def forward(self, x: Tensor, state: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The compounded output ``[B, H, T, D]`` and the states for the next layer ``[S, B, H, T, D]``.

        Args:
            x: what the layer attends to, ``[B, H, T, D]``.
            state: that of the layer before, or the output of the first layer ``[B, H, T, D]``.
            alpha: rates of compounding ``[S, H]``.
        """
        states = state.expand(len(self.scale_logits), *x.shape) if state.dim() == x.dim() else state
        return ema_compound_multiscale(x, states, alpha, self.scale_weights())
