"""Settings of a run that change what it trains, or how, while it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checks import check_numbers, check_positive_integers, check_tuple
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

        curriculum: tokens per sequence in the stages before the full length, ascending; validations always have the
            full length. See `curriculum.Curriculum`, as for the following.
        curriculum_loss: loss of the batch, in nats per token, below which a stage ends: one for each or one for all.
        curriculum_patience: steps in a row that it has to stay there.
        curriculum_limit: part of the budget after which a stage ends anyway.
        max_batch_size: let the batch grow to the gradient noise scale, by further parts of ``batch_size / accumulate``
            sequences, up to so many sequences; None for one size. Needs ``accumulate`` of 2 or more. See
            `batch_size.GrowingBatch`, as for the following.
        noise_smoothing: of the averages that the noise scale is made of, at least 0 and below 1.
        grow_at: parts of the budget after which the model grows, ascending, with the function that it computes
            unchanged. See `growth.grow`.
        grow_layers: number of blocks from each of these points on; empty where the depth stays.
        grow_width: width from each of them on, a multiple of the one before; empty where it stays.
        alpha_schedule: factors on every layer's alpha at the start and at the end of a linear ramp, above 0 and at most
            1; None for none.
        alpha_ramp: part of the budget that the ramp takes.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    milestone_factor: float = 0.1
    layer_decay: float = 1.0
    curriculum: tuple[int, ...] = ()
    curriculum_loss: tuple[float, ...] = ()
    curriculum_patience: int = 20
    curriculum_limit: float = 0.2
    max_batch_size: int | None = None
    noise_smoothing: float = 0.95
    grow_at: tuple[float, ...] = ()
    grow_layers: tuple[int, ...] = ()
    grow_width: tuple[int, ...] = ()
    alpha_schedule: tuple[float, float] | None = None
    alpha_ramp: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        check_tuple(self, "milestones", where=lambda x: 0 < x < 1, needs="between 0 and 1", ascending=True)
        check_numbers(self, "milestone_factor", where=lambda x: 0 < x < 1, needs="between 0 and 1")
        check_numbers(self, "layer_decay", where=lambda x: 0 < x <= 1, needs="above 0 and at most 1")
        self._check_curriculum()
        check_positive_integers(self, optional=["max_batch_size"])
        check_numbers(self, "noise_smoothing", where=lambda x: 0 <= x < 1, needs="at least 0 and below 1")
        self._check_growth()
        if self.alpha_schedule is not None:
            check_tuple(self, "alpha_schedule", where=lambda x: 0 < x <= 1, needs="above 0 and at most 1")
            if len(self.alpha_schedule) != 2:
                raise ValueError(f"alpha_schedule must be 2 numbers, got {len(self.alpha_schedule)}")
        check_numbers(self, "alpha_ramp", where=lambda x: 0 < x <= 1, needs="above 0 and at most 1")

    def _check_curriculum(self) -> None:
        check_tuple(self, "curriculum", where=lambda x: x >= 1, needs="at least 1", integers=True, ascending=True)
        check_tuple(self, "curriculum_loss", where=lambda x: 0 < x < math.inf, needs="positive")
        check_positive_integers(self, "curriculum_patience")
        check_numbers(self, "curriculum_limit", where=lambda x: 0 < x <= 1, needs="above 0 and at most 1")
        if len(self.curriculum_loss) not in {len(self.curriculum), min(1, len(self.curriculum))}:
            raise ValueError(f"curriculum_loss must be one number, or one for each of the {len(self.curriculum)} "
                             f"stages of curriculum, got {len(self.curriculum_loss)}")

    def _check_growth(self) -> None:
        check_tuple(self, "grow_at", where=lambda x: 0 < x < 1, needs="between 0 and 1", ascending=True)
        for name in ("grow_layers", "grow_width"):
            check_tuple(self, name, where=lambda x: x >= 1, needs="at least 1", integers=True)
            if len(getattr(self, name)) not in {0, len(self.grow_at)}:
                raise ValueError(f"{name} must be one number for each of the {len(self.grow_at)} points of grow_at, or "
                                 f"none, got {len(getattr(self, name))}")
        if self.grow_at and not self.grow_layers and not self.grow_width:
            raise ValueError("grow_at needs grow_layers, grow_width or both")

    @property
    def growths(self) -> list[tuple[float, int | None, int | None]]:
        """When the model grows, as a part of the budget, and to how many layers and which width."""
        layers = self.grow_layers or (None,) * len(self.grow_at)
        width = self.grow_width or (None,) * len(self.grow_at)
        return list(zip(self.grow_at, layers, width, strict=True))
