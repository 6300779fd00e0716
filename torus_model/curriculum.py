"""A curriculum of sequence lengths: from short sequences, whose tokens have little context, to the full length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SMOOTHING = 0.9
"""Of the loss that is held against the threshold: an average over some ten steps, batches are noisy."""


class Curriculum:
    """The stage that a run is in.

    Sequences grow from stage to stage, as in the sequence length warm-up of Li et al. (2022, section 4), but by what
    has been learned (Bengio et al. 2009): a stage ends when the smoothed loss ::

        m' = SMOOTHING * m + (1 - SMOOTHING) * loss        m / (1 - SMOOTHING**n) after n steps of the stage

    has been below the stage's threshold for ``patience`` steps in a row, or after the part ``limit`` of the budget,
    whichever is first, so that a threshold that is out of reach cannot keep a run from its full length.

    Args:
        lengths: tokens per sequence in each stage, and after the last one.
        thresholds: one for each stage or one for all, in nats per token.
        patience: steps.
        limit: part of the budget, above 0.
    """

    def __init__(self, lengths: Sequence[int], thresholds: Sequence[float], patience: int, limit: float) -> None:
        self._lengths, self._patience, self._limit = lengths, patience, limit
        stages = len(lengths) - 1
        self._thresholds = list(thresholds) * stages if len(thresholds) == 1 else list(thresholds)
        self.stage = 0
        self._enter(0.0)

    def _enter(self, progress: float) -> None:
        self._began, self._mean, self._steps, self._below = progress, 0.0, 0, 0

    @property
    def seq_len(self) -> int:
        """Tokens per sequence of the next step."""
        return self._lengths[self.stage]

    def observe(self, loss: float, progress: float) -> bool:
        """Takes the loss of a step and the progress after it; whether a stage has ended with it."""
        if self.stage == len(self._lengths) - 1:
            return False
        self._steps += 1
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * loss
        smoothed = self._mean / (1 - SMOOTHING**self._steps)
        self._below = self._below + 1 if smoothed < self._thresholds[self.stage] else 0
        if self._below < self._patience and progress - self._began < self._limit:
            return False
        self.stage += 1
        self._enter(progress)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"stage": self.stage, "began": self._began, "mean": self._mean, "steps": self._steps,
                "below": self._below}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.stage, self._began, self._mean, self._steps, self._below = (
            state[name] for name in ("stage", "began", "mean", "steps", "below"))
