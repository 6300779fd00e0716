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
    add(group, "--curriculum", "tokens per sequence of the stages before the full length (default: none)", type=int,
        nargs="+", metavar="TOKENS")
    add(group, "--curriculum-loss", "loss of the batch, in nats per token, below which a stage ends; one for each or "
        "one for all", type=float, nargs="+", metavar="LOSS")
    add(group, "--curriculum-patience", "steps in a row that the loss has to stay there", run.curriculum_patience,
        type=int, metavar="STEPS")
    add(group, "--curriculum-limit", "part of the budget after which a stage ends anyway", run.curriculum_limit,
        type=float, metavar="PART")
    add(group, "--max-batch-size", "let the batch grow to the gradient noise scale, up to so many sequences; needs "
        "--accumulate of 2 or more (default: one size)", type=int, metavar="SEQUENCES")
    add(group, "--noise-smoothing", "of the averages that the noise scale is made of", run.noise_smoothing, type=float)
    add(group, "--grow-at", "parts of the budget after which the model grows, without a change of what it computes "
        "(default: never)", type=float, nargs="+", metavar="PART")
    add(group, "--grow-layers", "number of blocks from each of these points on (default: as before)", type=int,
        nargs="+", metavar="LAYERS")
    add(group, "--grow-width", "width from each of these points on, a multiple of the one before; heads grow with it "
        "(default: as before)", type=int, nargs="+", metavar="WIDTH")
    add(group, "--alpha-schedule", "factors on every layer's rate of compounding at the start and at the end of a "
        "linear ramp (default: none)", type=float, nargs=2, metavar=("START", "END"))
    add(group, "--alpha-ramp", "part of the budget that this ramp takes", run.alpha_ramp, type=float, metavar="PART")


def _shown(values: tuple[float, ...]) -> str:
    return " ".join(f"{x:g}" for x in values)
