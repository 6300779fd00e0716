"""A training run of a field model in progress: one step, one epoch, and everything that a checkpoint of it holds."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..checkpoint import CheckpointError
from ..optimizer import make_optimizer
from ..run import TrainingError
from ..schedules import make_schedule
from .baselines.fourier import SpectralConvolution
from .config import FieldConfig
from .data import FieldData, Windows, split
from .evaluate import check_fits, one_step_error
from .history import Epoch, FieldHistory
from .losses import relative_l2
from .networks import build_model
from .symmetries import apply, random_symmetry
from .train_config import FieldTrainConfig

_LINEAR_MAPS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, SpectralConvolution)
"""Modules whose weights decay: what a convolution or a matrix of Fourier modes does to the channels is what a linear
layer does to those of a token, and all networks are to be regularised alike."""

_MAY_CHANGE_ON_RESUME = ("epochs", "seconds", "checkpoint_epochs", "backend", "device")
"""Settings that a continued run may have anew."""


def fingerprint(data: FieldData) -> str:
    """SHA-256 of frames and static fields: tells whether a resumed run trains on the same data."""
    digest = hashlib.sha256()
    for x in (data.frames, data.static):
        if x is not None:
            digest.update(repr(tuple(x.shape)).encode())
            digest.update(x.contiguous().numpy())
    return digest.hexdigest()


def augment(
    history: Tensor, static: Tensor | None, target: Tensor, config: FieldConfig, data: FieldData,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A batch of windows under random symmetries of the grid, one for each window.

    Args:
        history: ``[B, history, C, H, W]``.
        static: ``[B or 1, S, H, W]``, or None.
        target: ``[B, horizon, C, H, W]``.
        config: grid and topology.
        data: parities.
        generator: of the symmetries.

    Returns:
        The same, ``static`` with a batch of B.
    """
    symmetries = [random_symmetry(config, generator) for _ in history]
    frames = torch.cat((history, target), 1)
    frames = torch.stack([apply(s, x, data.parity) for s, x in zip(symmetries, frames, strict=True)])
    if static is not None:
        static = static.expand(len(history), -1, -1, -1)
        static = torch.stack([apply(s, x, data.static_parity) for s, x in zip(symmetries, static, strict=True)])
    return frames[:, :history.shape[1]], static, frames[:, history.shape[1]:]


class FieldRun:
    """The state of a run, all of which a checkpoint holds."""

    def __init__(self, config: FieldTrainConfig, model_config: FieldConfig, data: FieldData) -> None:
        self.config = config
        check_fits(model_config, data, horizon=config.unroll)
        self.training, self.test = split(data, *config.trajectories(len(data)))
        self.windows = Windows(self.training, model_config.history, config.unroll)
        self.fingerprint = fingerprint(data)
        self.history = FieldHistory()
        self.seconds = 0.0
        torch.manual_seed(config.seed)
        self.model = build_model(model_config, config.backend)
        self.model.set_scales(self.training.frames, self.training.static)
        self.model.to(config.device)
        self.optimizer = make_optimizer(self.model, config.learning_rate, config.weight_decay, _LINEAR_MAPS)
        self.scheduler = make_schedule(
            self.optimizer, config.warmup, config.final_learning_rate, lambda: self.progress
        )
        self.generator = torch.Generator().manual_seed(config.seed)

    @property
    def step(self) -> int:
        return len(self.history.losses)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.windows) // self.config.batch_size)

    @property
    def progress(self) -> float:
        """Part of the budget that is spent."""
        config = self.config
        spent = self.step / self.steps_per_epoch / config.epochs if config.epochs else self.seconds / config.seconds
        return min(1.0, spent)

    def epoch(self) -> Iterator[float]:
        """Trains on every window once, or until the budget is spent; yields the loss of every step.

        A checkpoint between epochs has all that determines the next one.
        """
        batches = self.windows.batches(self.config.batch_size, self.generator)
        self.model.train()
        while self.progress < 1:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            loss = self._step(*batch)
            self.seconds += time.perf_counter() - started
            self.scheduler.step()
            yield loss

    def _step(self, history: Tensor, static: Tensor | None, target: Tensor) -> float:
        config, model = self.config, self.model
        if config.augment:
            history, static, target = augment(history, static, target, model.config, self.training, self.generator)
        history, target = history.to(config.device), target.to(config.device)
        static = None if static is None else static.to(config.device)
        self.optimizer.zero_grad()
        predicted = model.rollout(history, config.unroll, static)  # [B, unroll, C, H, W]
        loss = relative_l2(predicted.flatten(0, 1), target.flatten(0, 1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss became {value} at step {self.step + 1}; a lower learning rate may help")
        self.optimizer.step()
        self.history.losses.append(value)
        return value

    def record(self, validate: bool) -> Epoch:
        """Adds a point to the history."""
        before = self.history.epochs[-1].step if self.history.epochs else 0
        losses = self.history.losses[before:]
        self.history.epochs.append(Epoch(
            self.step / self.steps_per_epoch, self.step, self.seconds,
            sum(losses) / len(losses) if losses else None,
            one_step_error(self.model, self.test, batch_size=self.config.batch_size) if validate else None,
        ))
        return self.history.epochs[-1]

    def save(self, path: Path) -> None:
        checkpoint.save(path, checkpoint.training_tensors(self.model, self.optimizer, self.generator), {
            "field_config": self.model.config.to_dict(),
            "field_train_config": self.config.to_dict(),
            "data_fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "history": self.history.to_dict(),
            # With the learning rate: the schedule has no state of its own.
            "param_groups": self.optimizer.state_dict()["param_groups"],
        })

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint: weights, optimiser, schedule, random numbers, time and history.

        Raises:
            CheckpointError: it is of another run, or not complete.
        """
        tensors, metadata = checkpoint.load(path)
        try:
            before = FieldTrainConfig.from_dict(metadata["field_train_config"])
            checkpoint.check_same_config(path, before, self.config, _MAY_CHANGE_ON_RESUME)
            model_before = FieldConfig.from_dict(metadata["field_config"])
            checkpoint.check_same_config(path, model_before, self.model.config, ())
            if metadata["data_fingerprint"] != self.fingerprint:
                raise CheckpointError(f"{path} was made with other data")
            history = FieldHistory.from_dict(metadata["history"])
            checkpoint.load_training(
                self.model, self.optimizer, self.generator, tensors, metadata["param_groups"],
                started=bool(history.losses),
            )
            self.history = history
            self.seconds = metadata["seconds"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not hold a run that can be resumed: {error!r}") from error
