"""Schedules: numbers that follow the part of the budget that is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("cosine", "linear", "step")
"""How the learning rate falls after the warm-up."""


def learning_rate_factor(
    progress: float,
    warmup: float,
    final: float,
    kind: str = "cosine",
    milestones: Sequence[float] = (),
    milestone_factor: float = 0.1,
) -> float:
    """Part of the peak learning rate after the part ``progress`` of the budget.

    A linear warm-up from ``final`` to 1 up to ``progress == warmup``. Then, with x from 0 to 1 over the rest:

    - ``"cosine"``: ``final + (1 - final) * (1 + cos(pi * x)) / 2`` (SGDR without restarts, Loshchilov & Hutter 2017,
      equation 5);
    - ``"linear"``: ``final + (1 - final) * (1 - x)``;
    - ``"step"``: ``milestone_factor ** n`` after n of the ``milestones``, which are parts of the budget; never below
      ``final``.
    """
    if progress < warmup:
        height = progress / warmup
    elif kind == "step":
        return max(final, milestone_factor ** sum(progress >= milestone for milestone in milestones))
    elif kind == "linear":
        height = 1 - min(1.0, (progress - warmup) / (1 - warmup))
    else:
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
    return final + (1 - final) * height


def make_schedule(
    optimizer: Optimizer,
    warmup: float,
    final: float,
    progress: Callable[[], float],
    kind: str = "cosine",
    milestones: Sequence[float] = (),
    milestone_factor: float = 0.1,
) -> LambdaLR:
    """Learning rates by `learning_rate_factor` of the ``progress`` at every step."""
    return LambdaLR(
        optimizer, lambda _: learning_rate_factor(progress(), warmup, final, kind, milestones, milestone_factor)
    )


def ramp(progress: float, start: float, end: float, length: float) -> float:
    """Linear from ``start`` to ``end`` over the first part ``length`` of the budget, and ``end`` from then on."""
    return start + (end - start) * min(1.0, progress / length)
