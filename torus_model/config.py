"""Configuration of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .checks import check_numbers, check_positive_integers, check_seed
from .data import DEFAULT_MAX_BYTES
from .dynamics import DynamicsConfig
from .growth import grown_config
from .lm import ModelConfig
from .tokenizer import ByteTokenizer
from .transfer import TransferConfig

SIZES = {
    "tiny": ModelConfig(),
    "small": ModelConfig(width=384, layers=6, heads=6, n_major=32, n_minor=32),
    "gpt2": ModelConfig(width=768, layers=12, heads=12, n_major=32, n_minor=32),
}
"""Named models: the default one, one between, and the width, layers, heads and context of GPT-2's smallest (Radford et
al. 2019, table 2). The vocabulary is the tokenizer's. The learning rate of `TrainConfig` was chosen for the default one
alone; larger models want smaller ones (6e-4 for one as large as ``gpt2`` in Brown et al. 2020, table 2.1)."""


def recommended_model(sizes: ModelConfig, context: int) -> ModelConfig:
    """The settings with which a `TorusLM` did best on text that is as long as its lattice, in the comparison that
    ``docs/language.md`` shows.

    Args:
        sizes: everything that is not settled here.
        context: tokens that the lattice holds, a power of two from 4 on.

    Returns:
        ``sizes`` with a minor loop as long as the major one or twice as long, rotary positions of the sequence, graded
        heads and a larger gain of queries.

    Raises:
        ValueError: ``context`` is no power of two.
    """
    if context < 4 or context & (context - 1):
        raise ValueError(f"context must be a power of two from 4 on, got {context}")
    n_major = 1 << (context.bit_length() - 1) // 2
    return dataclasses.replace(sizes, n_major=n_major, n_minor=context // n_major, rotary="sequence",
                               graded_heads=True, qk_gain=2.0)


@dataclass(frozen=True)
class TrainConfig(DynamicsConfig, TransferConfig):
    """Everything that determines a run. Exactly one of ``steps`` and ``seconds`` is its budget.

    What changes while the run goes on is in the fields of `DynamicsConfig`, what it takes over from other runs in those
    of `TransferConfig`.

    Args:
        model: the architecture; its vocabulary must be that of the tokenizer.
        steps: length of the run in optimiser steps. Such a run is reproducible.
        seconds: length of the run in seconds of wall-clock time, validations included and the first one, which
            also loads the backend, excluded. The learning rate follows the time.
        data: file or folder of text; None for the standard library's sources.
        max_bytes: the text is cut there.
        tokenizer: file of a `BPETokenizer`; None for bytes.
        pack_documents: keep documents apart: no token sees another document than its own, and none is predicted from
            one. The tokenizer of bytes then has the special tokens, too.
        validation_fraction: part of the text that is validated on, after the part that is trained on.
        test_fraction: part of the text, at its end, that the run does not look at; 0 for none.
        seq_len: tokens per sequence.
        batch_size: sequences per step.
        learning_rate: peak of the schedule: a linear warm-up, then by default a half cosine.
        warmup: part of the budget that the warm-up takes.
        final_learning_rate: where the schedule begins and ends, as a part of the peak.
        accumulate: how many parts the sequences of a step are split into, whose gradients add up: less memory for the
            same step.
        autocast: run the steps in bfloat16 where PyTorch's autocast does; weights, optimiser and validations stay in
            float32.
        activation_checkpointing: as in `TorusLM`.
        weight_decay: of AdamW, on the matrices of linear layers and the embedding only.
        clip: largest norm of the gradient.
        validations: how many times the run is validated and saved, evenly over the budget.
        validation_windows: sequences in the validation set, spread evenly over the validation part.
        patience: stop after so many validations without an improvement, and keep the best checkpoint; None to go on.
        tensorboard: write logs for TensorBoard.
        coherence_every: measure the coherence of the layers every so many steps; None for never. A model with
            ``adaptive_alpha`` needs it.
        seed: of the initial weights, the batches and the dropout; at least 0 and below 2**63.
        backend: backend of `torus_attention`; None for the best that can run.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int | None = None
    seconds: float | None = None
    data: str | None = None
    max_bytes: int = DEFAULT_MAX_BYTES
    tokenizer: str | None = None
    pack_documents: bool = False
    validation_fraction: float = 0.1
    test_fraction: float = 0.05
    seq_len: int = 256
    batch_size: int = 2
    accumulate: int = 1
    autocast: bool = False
    activation_checkpointing: bool = False
    learning_rate: float = 3e-3
    warmup: float = 0.05
    final_learning_rate: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    validations: int = 10
    validation_windows: int = 32
    patience: int | None = None
    tensorboard: bool = False
    coherence_every: int | None = None
    seed: int = 0
    backend: str | None = None

    def __post_init__(self) -> None:
        DynamicsConfig.__post_init__(self)
        TransferConfig.__post_init__(self)
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("a run has a budget of either steps or seconds: give exactly one")
        check_positive_integers(
            self, "max_bytes", "seq_len", "batch_size", "accumulate", "validations", "validation_windows",
            optional=["steps", "patience", "coherence_every"],
        )
        check_numbers(
            self, "learning_rate", "clip", optional=["seconds"], where=lambda x: 0 < x < math.inf, needs="positive"
        )
        check_numbers(self, "validation_fraction", "warmup", where=lambda x: 0 < x < 1, needs="between 0 and 1")
        check_numbers(self, "final_learning_rate", where=lambda x: 0 <= x <= 1, needs="at least 0 and at most 1")
        check_numbers(self, "test_fraction", where=lambda x: 0 <= x < 1 - self.validation_fraction,
                      needs=f"at least 0 and below 1 - validation_fraction = {1 - self.validation_fraction}")
        check_numbers(self, "weight_decay", where=lambda x: 0 <= x < math.inf, needs="at least 0")
        check_seed(self.seed)
        if self.batch_size % self.accumulate != 0:
            raise ValueError(f"accumulate must divide batch_size = {self.batch_size}, got {self.accumulate}")
        if self.model.adaptive_alpha and self.coherence_every is None:
            raise ValueError("adaptive_alpha follows what is measured: it needs coherence_every, got None")
        if self.initial is not None and self.tokenizer is not None:
            raise ValueError(f"a run from an initial checkpoint has its tokenizer, but got tokenizer = "
                             f"{self.tokenizer!r}")
        of_bytes = self.initial is None and self.tokenizer is None
        if of_bytes and self.model.vocab_size != ByteTokenizer(self.pack_documents).vocab_size:
            needed = ByteTokenizer(self.pack_documents).vocab_size
            raise ValueError(f"vocab_size must be {needed} for training on bytes with pack_documents = "
                             f"{self.pack_documents}, got {self.model.vocab_size}")

        self._check_dynamics()

    def _check_dynamics(self) -> None:
        if self.curriculum and self.curriculum[-1] >= self.seq_len:
            raise ValueError(f"curriculum must stay below seq_len = {self.seq_len}, got {self.curriculum[-1]}")
        if self.max_batch_size is not None:
            part = self.batch_size // self.accumulate
            if self.accumulate < 2:
                raise ValueError("max_batch_size needs accumulate of at least 2: the noise scale is estimated from the "
                                 f"gradients of a part and of the whole batch; got {self.accumulate}")
            if self.max_batch_size < self.batch_size or self.max_batch_size % part != 0:
                raise ValueError(f"max_batch_size must be a multiple of batch_size / accumulate = {part} and at least "
                                 f"batch_size = {self.batch_size}, got {self.max_batch_size}")
        if self.grow_at and self.keep_zeros:
            raise ValueError("grow_at takes no keep_zeros: the branches of new blocks begin as zeros")
        if self.grow_layers and self.coherence_every is not None:
            raise ValueError("grow_layers takes no coherence_every: the averages are of a fixed number of layers")
        model = self.model
        for at, layers, width in self.growths:
            try:
                model = grown_config(model, layers=layers, width=width)
            except ValueError as error:
                raise ValueError(f"the model cannot grow at {at:g} of the budget: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Fields as values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        """The configuration of `to_dict`, also after a way through JSON."""
        # Runs that say nothing of a test part were made without.
        return cls(**{"test_fraction": 0.0, **fields, "model": ModelConfig.from_dict(fields["model"])})
