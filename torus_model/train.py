"""Training of the language model.

    from torus_model.train import TrainConfig, train
    result = train(TrainConfig(seconds=120), "runs/model")
    result.bits_per_byte
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import checkpoint
from .checkpoint import CheckpointError
from .config import TrainConfig
from .files import remove_leftovers
from .history import History, Validation
from .lm import ModelConfig, TorusLM
from .optimizer import make_optimizer
from .parallel import check_layout, make_layout, processes
from .run import Run, TrainingError, training_step
from .tensorboard import TensorBoardLog

__all__ = [
    "TrainConfig", "TrainingError", "TrainingResult", "load_config", "resumable_config", "steps_per_second", "train",
]

_EXPORTS = ("history.json", "validation.png")

COHERENCE_PLOT = "coherence.png"
"""Beside them in the folder of a run that measures coherence."""


@dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        model: trained, in evaluation mode.
        history: losses and validation curve.
        checkpoint: the newest safetensors file, for `checkpoint.load_model` and for resuming.
        history_file: the history as JSON.
        plot_file: the validation curve as PNG.
        stopped_early: whether the patience was spent before the budget.
    """

    model: TorusLM
    history: History
    checkpoint: Path
    history_file: Path
    plot_file: Path
    stopped_early: bool = False

    @property
    def bits_per_byte(self) -> float:
        """The last point of the validation curve."""
        return self.history.validation[-1].bits_per_byte

    @property
    def perplexity(self) -> float:
        """Of a token, at the last point of the validation curve."""
        return self.history.validation[-1].perplexity

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second of the whole run, validations included."""
        last = self.history.validation[-1]
        return last.tokens / last.seconds if last.seconds > 0 else 0.0


def steps_per_second(
    model: ModelConfig, backend: str | None = None, *, batch_size: int, seq_len: int, steps: int = 3
) -> float:
    """How many training steps per second this model makes with this backend: the mean of ``steps`` steps on random
    tokens after one that is not counted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = TorusLM(model, backend=backend)
        optimizer = make_optimizer(lm, 1e-3, 0.0)
        tokens, targets = torch.randint(model.vocab_size, (2, batch_size, seq_len))
        training_step(lm, optimizer, tokens, targets, clip=1.0)
        started = time.perf_counter()
        for _ in range(steps):
            training_step(lm, optimizer, tokens, targets, clip=1.0)
        return steps / (time.perf_counter() - started)


def load_config(path: str | os.PathLike) -> tuple[TrainConfig, str]:
    """The configuration of the run that a checkpoint is of, and the fingerprint of its text.

    Raises:
        CheckpointError: there is no checkpoint, or none of a run.
    """
    metadata = checkpoint.load_metadata(path)
    try:
        return TrainConfig.from_dict(metadata["train_config"]), metadata["data_fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold a run: {error!r}") from error


def resumable_config(run_dir: str | os.PathLike, **changes: Any) -> TrainConfig:
    """The configuration of the run in this folder, with changes: of the budget, for instance.

    Raises:
        CheckpointError: there is no run.
        TypeError, ValueError: a change is wrong.
    """
    return dataclasses.replace(load_config(run_dir)[0], **changes)


def train(
    config: TrainConfig,
    run_dir: str | os.PathLike,
    *,
    resume: bool = False,
    progress: bool = True,
    on_validation: Callable[[Validation], None] | None = None,
    parallel: str | None = None,
) -> TrainingResult:
    """Trains a `TorusLM` on text.

    Every validation writes checkpoint and history into ``run_dir`` and keeps the checkpoint before; with a ``patience``
    also the best one. The plot follows at the end, also at an early one. A run that ``run_dir`` already holds is
    overwritten, unless it is resumed.

    Args:
        config: the run.
        run_dir: folder of the run; made where it does not exist.
        resume: continue the run whose checkpoint lies in ``run_dir``, the previous one where the newest is damaged.
            With a budget of steps, a run that was interrupted has the same losses as one that was not.
        progress: show a progress bar on stderr.
        on_validation: called with every new point of the validation curve, after the checkpoint is written.
        parallel: layout on the processes that torchrun started, out of `parallel.LAYOUTS`. All of them call this
            function; the first one writes and shows progress, and in the others the model of the result is what they
            hold of it. ``run_dir`` must be one folder for all of them.

    Raises:
        ValueError: the run does not divide into the processes.
        CheckpointError: there is nothing to resume, or it does not fit ``config``.
        DataError: the text is missing or too short.
        TokenizerError: the tokenizer is missing or not that of the model.
        BackendError: the backend that was asked for cannot run.
        TrainingError: the loss is no longer finite, or a package for the logs is missing.
        OSError: a file cannot be read or written.
    """
    run_dir = Path(run_dir)
    checkpoint_file, best_file, history_file, plot_file = (
        run_dir / name for name in (checkpoint.FILE_NAME, checkpoint.BEST_FILE_NAME, *_EXPORTS)
    )
    with processes.process_group(), torch.random.fork_rng(devices=[]):
        check_layout(parallel, processes.count(), config)
        layout = make_layout(parallel)
        resumed = checkpoint.locate(run_dir) if resume else None
        run = Run(config, None if resumed is None else checkpoint.load_tokenizer(resumed), layout)
        if resumed is not None:
            run.restore(resumed)
        if layout.is_first:
            _make_room(run_dir, checkpoint_file, best_file, resume=resume)
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # Gains stay in float32 under autocast, for which PyTorch has no fused norm.
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            bar = stack.enter_context(_ProgressBar(run, progress and layout.is_first))
            run.on_change = bar.write
            logs = config.tensorboard and layout.is_first
            log = stack.enter_context(TensorBoardLog(run_dir, run.step)) if logs else None
            if layout.is_first:  # called while the stack unwinds, also at an early end
                stack.callback(run.history.write_plot, plot_file, bytes_per_token=run.bytes_per_token)
                if run.coherence is not None:
                    stack.callback(run.coherence.write_plot, run.history.coherence, run_dir / COHERENCE_PLOT)

            def record() -> None:
                point = run.validate()
                run.save(checkpoint_file, keep_previous=run.step > 0)
                if config.patience is not None and run.history.best == len(run.history.validation) - 1:
                    run.save(best_file)
                if layout.is_first:
                    run.history.write_json(history_file, config=config.to_dict(), data=run.corpus.source)
                bar.write(f"step {point.step}, {point.seconds:.0f} s: {point.bits_per_byte:.3f} bits per byte, "
                          f"perplexity {point.perplexity:.2f}")
                if log is not None:
                    log.write_validation(point)
                if on_validation is not None:
                    on_validation(point)

            if not resume:
                record()
                run.stopwatch.start()
            validated = int(run.progress * config.validations)
            while not run.is_over:
                loss = run.advance()
                bar.update(loss)
                if log is not None:
                    log.write_step(run.step, loss, max(map(float, run.scheduler.get_last_lr())))
                    if run.history.coherence and run.history.coherence[-1].step == run.step:
                        log.write_coherence(run.history.coherence[-1])
                if (due := int(run.progress * config.validations)) > validated:
                    record()
                    validated = due
            if run.has_stopped_early:
                bar.write(f"stopped early: {config.patience} validations without an improvement")
    return TrainingResult(
        run.model.eval(), run.history, checkpoint_file, history_file, plot_file, run.has_stopped_early
    )


def _make_room(run_dir: Path, checkpoint_file: Path, best_file: Path, *, resume: bool) -> None:
    """Makes the folder, and removes what killed processes left and, unless resumed, the run that is overwritten."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for file in (checkpoint_file, best_file):
        remove_leftovers(file)
    if not resume:  # nothing must go back to the run that this one overwrites
        for file in (checkpoint.previous_of(checkpoint_file), best_file):
            file.unlink(missing_ok=True)


class _ProgressBar:
    """Budget spent, loss and speed on stderr: a bar on a terminal, and a line for each validation anywhere."""

    def __init__(self, run: Run, enabled: bool) -> None:
        config = run.config
        self._run, self._enabled = run, enabled
        self._first_tokens, self._started = run.tokens, time.perf_counter()
        self._bar = tqdm(
            total=config.steps or config.seconds,
            disable=None if enabled else True,  # None: off where stderr is not a terminal
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]",
            unit="steps" if config.steps else "s",
        )

    def __enter__(self) -> _ProgressBar:
        corpus = self._run.corpus
        self.write(f"{self._run.parameters:,} parameters; {corpus.bytes / 1e6:.1f} MB of text in {corpus.files} files "
                   f"from {corpus.source}")
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, loss: float) -> None:
        speed = (self._run.tokens - self._first_tokens) / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(self._run.progress * self._bar.total - self._bar.n)

    def write(self, line: str) -> None:
        if self._enabled:
            tqdm.write(line, file=sys.stderr)
