"""A training run in progress: one step, one validation, and everything that a checkpoint of it holds."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint, data
from .batch_size import GradientNoise, GrowingBatch
from .checkpoint import CheckpointError
from .coherence_tracking import CoherenceTracker
from .config import TrainConfig
from .curriculum import Curriculum
from .distillation import Distillation, load_teacher
from .evaluation import score
from .growth import grow, grow_optimizer
from .history import History, Validation
from .lm import Criterion, ModelConfig, TorusLM
from .optimizer import make_optimizer
from .parallel import ONE_PROCESS, Layout
from .parallel.processes import first_process_first
from .schedules import make_schedule, ramp
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
    noise: GradientNoise | None = None,
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
        noise: is told the gradient's squared norms, of the first part that has targets and of the whole batch; on one
            process.

    Returns:
        The loss before the step, in nats per token.
    """
    optimizer.zero_grad()
    options: dict[str, Any] = {} if criterion is None else {"criterion": criterion}
    layout = layout if noise is None else _Measured()
    loss = layout.gradients(model, tokens, targets, first_key, accumulate, autocast, **options)
    if noise is not None and isinstance(layout, _Measured) and layout.first is not None:
        noise.observe(layout.first[0], _gradient_norm(model) ** 2, layout.first[1], len(tokens))
    layout.clip(model, clip)
    optimizer.step()
    return loss


class _Measured(Layout):
    """One process that keeps the squared norm of the mean gradient of a batch's first part, and its number of
    sequences."""

    first: tuple[float, int] | None = None

    def added(self, model: TorusLM, share: float, sequences: int) -> None:
        if self.first is None:
            self.first = (_gradient_norm(model) / share) ** 2, sequences


def _gradient_norm(model: nn.Module) -> float:
    return float(nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


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

    Attributes:
        on_change: called with a line when dynamic training changes sizes.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: Tokenizer | None = None, layout: Layout = ONE_PROCESS
    ) -> None:
        self.config, self.layout = config, layout
        self.on_change: Callable[[str], None] = lambda line: None
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
        self.history, self.tokens = History(), 0
        self.stopwatch = _Stopwatch(layout)
        self.curriculum = Curriculum((*config.curriculum, config.seq_len), config.curriculum_loss,
                                     config.curriculum_patience, config.curriculum_limit)
        self._part = config.batch_size // config.accumulate
        self.batch = None if config.max_batch_size is None else GrowingBatch(
            config.batch_size, self._part, config.max_batch_size, config.noise_smoothing)
        self.growths = 0
        torch.manual_seed(config.seed)
        self.model = self._make_model(config.model)
        if is_new and config.initial is not None:
            checkpoint.load_initial(self.model, config.initial)
        if config.alpha_schedule is not None:
            self.model.schedule_alpha()
        freeze(self.model, config.freeze)
        if is_new and config.keep_zeros:
            keep_zeros(self.model)
        self.distillation = None
        if config.teacher is not None:
            self.distillation = Distillation(
                load_teacher(config.teacher, tokenizer, config.backend), config.distill_weight,
                config.distill_temperature,
            )
        self.parameters = _size(self.model)
        layout.place(self.model)
        layout.separate_random_numbers()
        self._optimize(self._make_optimizer(self.model))
        self._set_alpha()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.coherence = None if config.coherence_every is None else CoherenceTracker(config.model.layers)

    def _make_model(self, model: ModelConfig) -> TorusLM:
        config = self.config
        return TorusLM(model, backend=config.backend, activation_checkpointing=config.activation_checkpointing)

    def _make_optimizer(self, model: TorusLM) -> Optimizer:
        config = self.config
        return make_optimizer(model, config.learning_rate, config.weight_decay, layer_decay=config.layer_decay)

    def _optimize(self, optimizer: Optimizer) -> None:
        config = self.config
        self.optimizer = optimizer
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

    @property
    def batch_size(self) -> int:
        """Sequences of the next step."""
        return self.config.batch_size if self.batch is None else self.batch.size

    def advance(self) -> float:
        """One training step; returns its loss."""
        self._grow()
        config, noise = self.config, None if self.batch is None else self.batch.noise
        batch_size, seq_len = self.batch_size, self.curriculum.seq_len
        tokens, targets = data.random_batch(self.training, batch_size, seq_len, self.generator)
        first_key = None
        if config.pack_documents:
            first_key, targets = data.within_documents(tokens, targets, self.tokenizer)
        loss = training_step(
            self.model, self.optimizer, tokens, targets, config.clip, first_key, batch_size // self._part,
            config.autocast, self.distillation, self.layout, noise,
        )
        self.stopwatch.read()
        if not math.isfinite(loss):
            raise TrainingError(f"the loss became {loss} at step {self.step + 1}; a lower learning rate may help")
        self.history.losses.append(loss)
        self.history.batch_sizes.append(batch_size)
        self.history.seq_lens.append(seq_len)
        self.tokens += batch_size * seq_len
        self._adapt(loss)
        self.scheduler.step()
        if self.coherence is not None and self.step % (config.coherence_every or 1) == 0:
            part = slice(self._part)
            keys = None if first_key is None else first_key[part]
            self.history.coherence.append(self.coherence.observe(self.model, self.step, tokens[part], keys))
        return loss

    def _adapt(self, loss: float) -> None:
        """What the next step is to have otherwise than the last one, whose ``loss`` it is."""
        if self.batch is not None:
            scale = self.batch.noise.scale
            self.history.noise_scales.append(scale if math.isfinite(scale) else None)
            if self.batch.grow():
                self.on_change(f"step {self.step}: {self.batch.size} sequences per step, noise scale {scale:.3g}")
        if self.curriculum.observe(loss, self.progress):
            self.on_change(f"step {self.step}: {self.curriculum.seq_len} tokens per sequence")
        self._set_alpha()

    def _set_alpha(self) -> None:
        if self.config.alpha_schedule is not None:
            self.model.set_alpha_factor(ramp(self.progress, *self.config.alpha_schedule, self.config.alpha_ramp))

    def _grow(self) -> None:
        """Grows the model where the budget has come so far."""
        for at, layers, width in self.config.growths[self.growths:]:
            if self.progress < at:
                return
            generator = torch.Generator().manual_seed(self.config.seed + self.growths)
            model = grow(self.model, layers=layers, width=width, generator=generator)
            freeze(model, self.config.freeze)
            optimizer = grow_optimizer(self.optimizer, self.model, model, self._make_optimizer)
            self.model, self.parameters = model, _size(model)
            self._optimize(optimizer)
            self.growths += 1
            self.on_change(f"step {self.step}: {model.config.layers} layers of width {model.config.width}, "
                           f"{self.parameters:,} parameters")

    def validate(self) -> Validation:
        """Adds a point to the validation curve."""
        config = self.config
        self.stopwatch.read()
        seconds = self.stopwatch.seconds
        windows = data.fixed_batches(
            self.validation, config.validation_windows, self._part, config.seq_len
        )
        found = score(
            self.model, windows, self.tokenizer, pack_documents=config.pack_documents,
            loss=functools.partial(self.layout.loss, self.model),
        )
        self.history.validation.append(
            Validation(self.step, self.tokens, seconds, found.bits_per_byte, found.perplexity)
        )
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
            "model_config": self.model.config.to_dict(),
            "train_config": self.config.to_dict(),
            "tokenizer": self.tokenizer.to_dict(),
            "data_fingerprint": self.fingerprint,
            "teacher_fingerprint": None if self.distillation is None else self.distillation.fingerprint,
            "seconds": self.stopwatch.seconds,
            "history": self.history.to_dict(),
            "dynamics": {
                "growths": self.growths, "curriculum": self.curriculum.state_dict(),
                "batch": None if self.batch is None else self.batch.state_dict(),
            },
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
            history = self._history(metadata["history"])
            self._restore_dynamics(metadata)
            checkpoint.load_training(
                self.model, self.optimizer, self.generator, self.layout.scatter(self.model, tensors),
                metadata["param_groups"], started=bool(history.losses),
            )
            if self.config.keep_zeros:
                keep_zeros(self.model)
            if self.coherence is not None:
                self.coherence.load(tensors)
            self.layout.separate_random_numbers()
            self.history, self.tokens = history, history.tokens
            self.stopwatch.start(before=metadata["seconds"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not hold a run that can be resumed: {error!r}") from error

    def _history(self, fields: Mapping[str, Any]) -> History:
        """That of a checkpoint; one from before sizes could change does not list them."""
        steps, config = len(fields["losses"]), self.config
        constant = {"batch_sizes": [config.batch_size] * steps, "seq_lens": [config.seq_len] * steps}
        return History.from_dict(constant | dict(fields))

    def _restore_dynamics(self, metadata: Mapping[str, Any]) -> None:
        """The sizes that a run has come to; those of the model before its weights."""
        if (dynamics := metadata.get("dynamics")) is None:
            return
        self.growths = dynamics["growths"]
        if (model := ModelConfig.from_dict(metadata["model_config"])) != self.model.config:
            self.model = self._make_model(model)
            self.parameters = _size(self.model)
            freeze(self.model, self.config.freeze)
            self._optimize(self._make_optimizer(self.model))
        self.curriculum.load_state_dict(dynamics["curriculum"])
        if self.batch is not None:
            self.batch.load_state_dict(dynamics["batch"])

    def _check_same_run(self, path: Path, metadata: Mapping[str, Any]) -> None:
        before = TrainConfig.from_dict(metadata["train_config"])
        checkpoint.check_same_config(path, before, self.config, _MAY_CHANGE_ON_RESUME)
        if metadata["data_fingerprint"] != self.fingerprint:
            raise CheckpointError(f"{path} was made with other text than {self.corpus.source}")
        if self.distillation is not None and metadata["teacher_fingerprint"] != self.distillation.fingerprint:
            raise CheckpointError(f"{path} was made with another teacher than {self.config.teacher}")
