"""A training run in progress: one step, one validation, and everything that a checkpoint of it holds."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint, data
from .checkpoint import CheckpointError
from .coherence_tracking import CoherenceTracker
from .config import TrainConfig
from .distillation import Distillation, load_teacher
from .evaluation import score
from .history import History, Validation
from .lm import Criterion, TorusLM
from .optimizer import make_optimizer
from .parallel import ONE_PROCESS, Layout
from .parallel.processes import first_process_first
from .schedules import make_schedule
from .tokenizer import Tokenizer, TokenizerError, load_tokenizer
from .transfer import freeze, keep_zeros

_MAY_CHANGE_ON_RESUME = (
    "steps", "seconds", "validations", "backend", "data", "max_bytes", "activation_checkpointing", "patience",
    "tensorboard", "teacher", "coherence_every",
)
"""Fields that a continued run may set anew. Data and teacher may have moved, but their bytes must be the same."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


def training_step(
    model: TorusLM,
    optimizer: Optimizer,
    tokens: Tensor,
    targets: Tensor,
    clip: float,
    first_key: Tensor | None = None,
    accumulate: int = 1,
    autocast: bool = False,
    criterion: Criterion | None = None,
    layout: Layout = ONE_PROCESS,
) -> float:
    """One step of gradient descent.

    Args:
        model, optimizer: what it changes.
        tokens, targets, first_key: each ``[B, T]``, as in `TorusLM.loss`.
        clip: largest norm of the gradient.
        accumulate: parts of the batch that run one after the other.
        autocast: run the model in bfloat16 where PyTorch's autocast does.
        criterion: the loss, where it is not the cross-entropy of the targets.
        layout: where the model has been placed.

    Returns:
        The loss before the step, in nats per token.
    """
    optimizer.zero_grad()
    options: dict[str, Any] = {} if criterion is None else {"criterion": criterion}
    loss = layout.gradients(model, tokens, targets, first_key, accumulate, autocast, **options)
    layout.clip(model, clip)
    optimizer.step()
    return loss


class _Stopwatch:
    """Seconds of the run, those before an interruption included.

    Processes must agree on when a run is over: on several of them, the time is that of the first one when it was last
    `read`.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._before = self._read = 0.0
        self._started: float | None = None

    def start(self, before: float = 0.0) -> None:
        self._before, self._started = before, time.perf_counter()
        self.read()

    def read(self) -> None:
        self._read = self._layout.agree(self._elapsed)

    @property
    def _elapsed(self) -> float:
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    @property
    def seconds(self) -> float:
        return self._elapsed if self._layout.size == 1 else self._read


class Run:
    """The state of a run, all of which a checkpoint holds.

    Args:
        config: the run.
        tokenizer: that of the checkpoint that the run continues from; None for the one that ``config`` names.
        layout: of the processes. All make the same run and call its methods at the same points.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: Tokenizer | None = None, layout: Layout = ONE_PROCESS
    ) -> None:
        self.config, self.layout = config, layout
        is_new = tokenizer is None
        if tokenizer is None and config.initial is not None:
            tokenizer = checkpoint.load_tokenizer(config.initial)
        if tokenizer is None:
            tokenizer = load_tokenizer(config.tokenizer, special_tokens=config.pack_documents)
        if tokenizer.vocab_size != config.model.vocab_size:
            raise TokenizerError(f"vocab_size must be the {tokenizer.vocab_size} of the tokenizer, "
                                 f"got {config.model.vocab_size}")
        self.tokenizer = tokenizer
        with first_process_first():
            self.corpus = data.load_corpus(config.data, config.max_bytes, tokenizer)
        self.training, self.validation, _ = data.split(
            self.corpus.data, config.validation_fraction, config.seq_len + 1, config.test_fraction
        )
        self.fingerprint = self.corpus.fingerprint
        self.history = History()
        self.stopwatch = _Stopwatch(layout)
        torch.manual_seed(config.seed)
        self.model = TorusLM(
            config.model, backend=config.backend, activation_checkpointing=config.activation_checkpointing
        )
        if is_new and config.initial is not None:
            checkpoint.load_initial(self.model, config.initial)
        freeze(self.model, config.freeze)
        if is_new and config.keep_zeros:
            keep_zeros(self.model)
        self.distillation = None
        if config.teacher is not None:
            self.distillation = Distillation(
                load_teacher(config.teacher, tokenizer, config.backend), config.distill_weight,
                config.distill_temperature,
            )
        self.parameters = sum(p.numel() for p in self.model.parameters())
        layout.place(self.model)
        layout.separate_random_numbers()
        self._make_optimizer()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.coherence = None if config.coherence_every is None else CoherenceTracker(config.model.layers)

    def _make_optimizer(self) -> None:
        config = self.config
        self.optimizer = make_optimizer(
            self.model, config.learning_rate, config.weight_decay, layer_decay=config.layer_decay
        )
        self.scheduler = make_schedule(
            self.optimizer, config.warmup, config.final_learning_rate, lambda: self.progress, config.schedule,
            config.milestones, config.milestone_factor,
        )

    @property
    def step(self) -> int:
        return len(self.history.losses)

    @property
    def progress(self) -> float:
        """Part of the budget that is spent."""
        config = self.config
        spent = self.step / config.steps if config.steps else self.stopwatch.seconds / (config.seconds or math.inf)
        return min(1.0, spent)

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent, or the patience."""
        return self.progress >= 1 or self.has_stopped_early

    @property
    def has_stopped_early(self) -> bool:
        """Whether the last ``patience`` validations brought no improvement."""
        best = self.history.best
        if self.config.patience is None or best is None:
            return False
        return len(self.history.validation) - 1 - best >= self.config.patience

    @property
    def bytes_per_token(self) -> float:
        """Mean over the text."""
        return self.corpus.bytes / len(self.corpus.data)

    def advance(self) -> float:
        """One training step; returns its loss."""
        config = self.config
        tokens, targets = data.random_batch(self.training, config.batch_size, config.seq_len, self.generator)
        first_key = None
        if config.pack_documents:
            first_key, targets = data.within_documents(tokens, targets, self.tokenizer)
        loss = training_step(
            self.model, self.optimizer, tokens, targets, config.clip, first_key, config.accumulate, config.autocast,
            self.distillation, self.layout,
        )
        self.stopwatch.read()
        if not math.isfinite(loss):
            raise TrainingError(f"the loss became {loss} at step {self.step + 1}; a lower learning rate may help")
        self.history.losses.append(loss)
        self.scheduler.step()
        if self.coherence is not None and self.step % (config.coherence_every or 1) == 0:
            part = slice(config.batch_size // config.accumulate)
            keys = None if first_key is None else first_key[part]
            self.history.coherence.append(self.coherence.observe(self.model, self.step, tokens[part], keys))
        return loss

    def validate(self) -> Validation:
        """Adds a point to the validation curve."""
        config = self.config
        self.stopwatch.read()
        seconds = self.stopwatch.seconds
        windows = data.fixed_batches(
            self.validation, config.validation_windows, config.batch_size // config.accumulate, config.seq_len
        )
        found = score(
            self.model, windows, self.tokenizer, pack_documents=config.pack_documents,
            loss=functools.partial(self.layout.loss, self.model),
        )
        tokens = self.step * config.batch_size * config.seq_len
        self.history.validation.append(Validation(self.step, tokens, seconds, found.bits_per_byte, found.perplexity))
        return self.history.validation[-1]

    def save(self, path: Path, *, keep_previous: bool = False) -> None:
        """Writes a checkpoint of the whole run, from the first process."""
        tensors = checkpoint.training_tensors(self.model, self.optimizer, self.generator)
        if self.coherence is not None:
            tensors |= self.coherence.checkpoint_tensors()
        tensors, param_groups = self.layout.gather(tensors), self.layout.param_groups(self.optimizer)
        if not self.layout.is_first:
            return
        checkpoint.save(path, tensors, {
            "model_config": self.config.model.to_dict(),
            "train_config": self.config.to_dict(),
            "tokenizer": self.tokenizer.to_dict(),
            "data_fingerprint": self.fingerprint,
            "teacher_fingerprint": None if self.distillation is None else self.distillation.fingerprint,
            "seconds": self.stopwatch.seconds,
            "history": self.history.to_dict(),
            # With the learning rate: the schedule has no state of its own.
            "param_groups": param_groups,
        }, keep_previous=keep_previous)

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint: weights, optimiser, schedule, random numbers, clock and history.

        Raises:
            CheckpointError: it is of another run, or not complete.
        """
        tensors, metadata = checkpoint.load(path)
        try:
            self._check_same_run(path, metadata)
            history = History.from_dict(metadata["history"])
            checkpoint.load_training(
                self.model, self.optimizer, self.generator, self.layout.scatter(self.model, tensors),
                metadata["param_groups"], started=bool(history.losses),
            )
            if self.config.keep_zeros:
                keep_zeros(self.model)
            if self.coherence is not None:
                self.coherence.load(tensors)
            self.layout.separate_random_numbers()
            self.history = history
            self.stopwatch.start(before=metadata["seconds"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not hold a run that can be resumed: {error!r}") from error

    def _check_same_run(self, path: Path, metadata: Mapping[str, Any]) -> None:
        before = TrainConfig.from_dict(metadata["train_config"])
        checkpoint.check_same_config(path, before, self.config, _MAY_CHANGE_ON_RESUME)
        if metadata["data_fingerprint"] != self.fingerprint:
            raise CheckpointError(f"{path} was made with other text than {self.corpus.source}")
        if self.distillation is not None and metadata["teacher_fingerprint"] != self.distillation.fingerprint:
            raise CheckpointError(f"{path} was made with another teacher than {self.config.teacher}")
