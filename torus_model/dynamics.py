"""Settings of a run that change what it trains, or how, while it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_numbers, check_tuple
from .schedules import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig:
    """Dynamic training. Every default is a run in which nothing of this changes.

    Args:
        schedule: how the learning rate falls after the warm-up, one of `schedules.SCHEDULES`.
        milestones: parts of the budget after which the schedule ``"step"`` multiplies the rate by
            ``milestone_factor``; ascending.
        milestone_factor: what it multiplies by, between 0 and 1.
        layer_decay: learning rate of a block as a part of that of the block above it, see `optimizer.make_optimizer`.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    milestone_factor: float = 0.1
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        check_tuple(self, "milestones", where=lambda x: 0 < x < 1, needs="between 0 and 1", ascending=True)
        check_numbers(self, "milestone_factor", where=lambda x: 0 < x < 1, needs="between 0 and 1")
        check_numbers(self, "layer_decay", where=lambda x: 0 < x <= 1, needs="above 0 and at most 1")
