"""Training of a field model.

    from torus_model.field import FieldConfig, FieldTrainConfig, load_data, train
    result = train(FieldTrainConfig(epochs=10), FieldConfig(), load_data("flow.safetensors"), "runs/field")
    result.test_error
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import checkpoint
from ..checkpoint import CheckpointError
from ..history import write_json
from ..run import TrainingError
from .config import FieldConfig
from .data import FieldData
from .history import Epoch, FieldHistory
from .model import FieldModel
from .networks import build_model
from .run import FieldRun
from .train_config import FieldTrainConfig

__all__ = [
    "FieldTrainConfig", "FieldTrainingResult", "TrainingError", "load_field_model", "resumable_configs", "train",
]

_EXPORTS = ("history.json", "history.png")


@dataclass(frozen=True)
class FieldTrainingResult:
    """A finished run.

    Attributes:
        model: trained, in evaluation mode.
        history: losses and test errors.
        checkpoint: the safetensors file, for `load_field_model` and for resuming.
        history_file: the history as JSON.
        plot_file: the history as PNG.
    """

    model: FieldModel
    history: FieldHistory
    checkpoint: Path
    history_file: Path
    plot_file: Path

    @property
    def test_error(self) -> float:
        """One-step relative L2 on the test trajectories at the end."""
        return self.history.epochs[-1].test_error  # type: ignore[return-value]  # the last epoch has one

    @property
    def seconds_per_epoch(self) -> float:
        """Time of one pass through the training windows, validation and checkpoints excluded."""
        last = self.history.epochs[-1]
        return last.seconds / last.epoch


def load_field_model(path: str | os.PathLike, backend: str | None = None) -> FieldModel:
    """The model of a checkpoint, on the CPU and in evaluation mode.

    Args:
        path: the checkpoint, or the folder of a run.
        backend: backend of `torus_attention`; None for the best that can run.

    Raises:
        CheckpointError: the file is not there, not complete, or does not hold a model of fields.
    """
    tensors, metadata = checkpoint.load(path, checkpoint.WEIGHTS)
    try:
        model = build_model(FieldConfig.from_dict(metadata["field_config"]), backend)
        checkpoint.load_weights(model, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{checkpoint.locate(path)} does not hold a model of fields: {reason}") from error
    return model.eval()


def resumable_configs(run_dir: str | os.PathLike) -> tuple[FieldTrainConfig, FieldConfig]:
    """How the run in this folder was configured.

    Raises:
        CheckpointError: there is no run.
    """
    _, metadata = checkpoint.load(checkpoint.locate(run_dir), prefix=checkpoint.WEIGHTS)
    try:
        return (FieldTrainConfig.from_dict(metadata["field_train_config"]),
                FieldConfig.from_dict(metadata["field_config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run_dir} does not hold a run that can be resumed: {error!r}") from error


def train(
    config: FieldTrainConfig,
    model_config: FieldConfig,
    data: FieldData,
    run_dir: str | os.PathLike,
    *,
    resume: bool = False,
    progress: bool = True,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> FieldTrainingResult:
    """Trains a model to predict the next frame, by the relative L2 loss.

    An epoch passes every window of ``history + unroll`` frames of every training trajectory once, in random order.
    Checkpoint and history go into ``run_dir``; the plot follows at the end, also at an early one. A run that
    ``run_dir`` already holds is overwritten, unless it is resumed.

    Args:
        config: the run.
        model_config: the model; its grid, channels and static channels must be those of the data.
        data: trajectories to train and to test on.
        run_dir: folder of the run; made where it does not exist.
        resume: continue the run whose checkpoint lies in ``run_dir``. With a budget of epochs, on the CPU, a run that
            was interrupted has the same losses as one that was not.
        progress: show a progress bar on stderr.
        on_epoch: called with every new point of the history, after the checkpoint is written where one is due.

    Raises:
        CheckpointError: there is nothing to resume, or it does not fit what is asked for.
        FieldDataError: the data does not fit the model, or has too few trajectories or frames.
        BackendError: the backend that was asked for cannot run.
        TrainingError: the loss is no longer finite.
        OSError: a file cannot be written.
    """
    run_dir = Path(run_dir)
    checkpoint_file, history_file, plot_file = (run_dir / name for name in (checkpoint.FILE_NAME, *_EXPORTS))
    device = torch.device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = FieldRun(config, model_config, data)
        if resume:
            run.restore(checkpoint.locate(run_dir))
        run_dir.mkdir(parents=True, exist_ok=True)
        about = {"train_config": config.to_dict(), "model_config": model_config.to_dict(), "data": data.parameters}
        with _ProgressBar(run, progress) as bar:

            def record(epochs: int) -> None:
                is_due = epochs % config.checkpoint_epochs == 0 or run.progress >= 1
                point = run.record(validate=is_due)
                if is_due:
                    run.save(checkpoint_file)
                write_json(history_file, about | run.history.to_dict())
                bar.show(point)
                if on_epoch is not None:
                    on_epoch(point)

            try:
                if not resume:
                    record(0)
                epochs = len(run.history.epochs) - 1
                while run.progress < 1:
                    for loss in run.epoch():
                        bar.update(loss)
                    epochs += 1
                    record(epochs)
            finally:
                run.history.write_plot(plot_file, f"{model_config.network}, {bar.parameters:,} parameters")
    return FieldTrainingResult(run.model.eval(), run.history, checkpoint_file, history_file, plot_file)


class _ProgressBar:
    """Budget spent and loss on stderr: a bar on a terminal, and a line for each validation anywhere."""

    def __init__(self, run: FieldRun, enabled: bool) -> None:
        self._run, self._enabled = run, enabled
        self.parameters = sum(p.numel() for p in run.model.parameters())
        config = run.config
        self._bar = tqdm(
            total=config.epochs * run.steps_per_epoch if config.epochs else config.seconds,
            disable=None if enabled else True,  # None: off where stderr is not a terminal
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]",
            unit="steps" if config.epochs else "s",
        )

    def __enter__(self) -> _ProgressBar:
        run = self._run
        self._write(f"{run.model.config.network}: {self.parameters:,} parameters; {len(run.training)} trajectories, "
                    f"{len(run.windows)} windows to train on, {len(run.test)} trajectories to test on")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()

    def update(self, loss: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(self._run.progress * self._bar.total - self._bar.n)

    def show(self, point: Epoch) -> None:
        if point.test_error is not None:
            self._write(f"epoch {point.epoch:.4g}, {point.seconds:.0f} s: "
                        f"relative L2 error {point.test_error:.4f} in one step")

    def _write(self, line: str) -> None:
        if self._enabled:
            tqdm.write(line, file=sys.stderr)
