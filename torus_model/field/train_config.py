"""Configuration of the training of a field model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import check_numbers, check_positive_integers, check_seed


@dataclass(frozen=True)
class FieldTrainConfig:
    """Everything that determines a run but the model and the data. Exactly one of ``epochs`` and ``seconds`` is its
    budget.

    Args:
        epochs: passes through all windows of the training trajectories. Such a run is reproducible.
        seconds: time of the training steps; validation and checkpoints do not count. The learning rate follows it.
        train_trajectories: how many of the data's first trajectories to train on; None for all but those of the test.
        test_trajectories: how many of its last trajectories to test on; None for a sixth of them.
        batch_size: windows per step.
        learning_rate: peak of the schedule: a linear warm-up, then a half cosine.
        warmup: part of the budget that the warm-up takes.
        final_learning_rate: where the schedule begins and ends, as a part of the peak.
        weight_decay: of AdamW, on the weights of linear maps (attention, feed-forward, convolutions, Fourier modes).
        clip: largest norm of the gradient.
        unroll: time steps, each from the predictions before it, that the loss is taken over and passes through.
        augment: train on windows under random symmetries of the grid.
        seed: of the initial weights, the order of the windows, the symmetries and the dropout; at least 0 and below
            2**63.
        backend: backend of `torus_attention`; None for the best that can run.
        device: where to train, as torch names it: ``"cpu"``, ``"cuda"``.
        checkpoint_epochs: epochs from one validation and checkpoint to the next; the end of the run has both.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    epochs: int | None = None
    seconds: float | None = None
    train_trajectories: int | None = None
    test_trajectories: int | None = None
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.05
    final_learning_rate: float = 0.01
    weight_decay: float = 0.01
    clip: float = 1.0
    unroll: int = 1
    augment: bool = False
    seed: int = 0
    backend: str | None = None
    device: str = "cpu"
    checkpoint_epochs: int = 1

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.seconds is None):
            raise ValueError("a run has a budget of either epochs or seconds: give exactly one")
        check_positive_integers(
            self, "batch_size", "unroll", "checkpoint_epochs",
            optional=("epochs", "train_trajectories", "test_trajectories"),
        )
        check_numbers(
            self, "learning_rate", "clip", optional=["seconds"], where=lambda x: 0 < x < math.inf, needs="positive"
        )
        check_numbers(self, "warmup", where=lambda x: 0 < x < 1, needs="between 0 and 1")
        check_numbers(self, "final_learning_rate", where=lambda x: 0 <= x <= 1, needs="at least 0 and at most 1")
        check_numbers(self, "weight_decay", where=lambda x: 0 <= x < math.inf, needs="at least 0")
        if not isinstance(self.augment, bool):
            raise TypeError(f"augment must be a bool, got {self.augment!r}")
        check_seed(self.seed)
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be one that torch knows, got {self.device!r}") from error

    def trajectories(self, available: int) -> tuple[int, int]:
        """How many to train and to test on, out of ``available``; `split` checks them."""
        test = max(1, available // 6) if self.test_trajectories is None else self.test_trajectories
        return available - test if self.train_trajectories is None else self.train_trajectories, test

    def to_dict(self) -> dict[str, Any]:
        """Fields as values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FieldTrainConfig:
        """The configuration of `to_dict`, also after a way through JSON."""
        return cls(**fields)
