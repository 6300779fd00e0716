"""The options of dynamic training."""

from __future__ import annotations

from typing import Any

from ..dynamics import DynamicsConfig
from ..options import add_option as add
from ..schedules import SCHEDULES


def add_dynamics_options(group: Any, run: DynamicsConfig) -> None:
    """The fields of `DynamicsConfig`, with the defaults of ``run``."""
    add(group, "--schedule", "how the learning rate falls after the warm-up", run.schedule, choices=SCHEDULES)
    add(group, "--milestones", "parts of the budget after which the schedule 'step' lowers the rate",
        _shown(run.milestones), type=float, nargs="+", metavar="PART")
    add(group, "--milestone-factor", "what it multiplies the rate by", run.milestone_factor, type=float)
    add(group, "--layer-decay", "learning rate of a block as a part of that of the block above it", run.layer_decay,
        type=float)


def _shown(values: tuple[float, ...]) -> str:
    return " ".join(f"{x:g}" for x in values)
