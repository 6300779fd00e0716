"""Training runs of the comparison of language models, kept in a folder and not repeated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torus_model import checkpoint, data
from torus_model.checkpoint import CheckpointError
from torus_model.data import DEFAULT_MAX_BYTES
from torus_model.dense import DenseLM, number_of_parameters
from torus_model.lm import ModelConfig, TorusLM
from torus_model.run import make_optimizer, make_schedule, training_step
from torus_model.train import TrainingError

from .progress import Say

DENSE = "dense"
"""The network that is a `DenseLM`; all others are `TorusLM` s."""

FIRST = "first"
"""The torus with the defaults of `ModelConfig`."""

SAME_SECONDS = 0.05
"""Relative difference up to which two numbers of steps stand for the same seconds: what a timing is good for."""

_ENTRY = "language_comparison"


@dataclass(frozen=True)
class Training:
    """What all networks share.

    Attributes:
        batch_size: windows per step.
        learning_rate: peak of the schedule of the torus, and of the torus with parts left out.
        other_learning_rates: those of other networks. Each is the best of a few, by ``torus_model/NOTES.md``.
        warmup, final_learning_rate, weight_decay, clip: as in `torus_model.train.TrainConfig`.
        validations: points of a validation curve.
        validation_tokens: scored at every point, in windows spread evenly over the validation part.
        test_tokens: of the test part, scored once, after the last step.
        validation_fraction, test_fraction: parts of the text.
        data, max_bytes: as in `torus_model.data.load_corpus`.
        device: where to train.
    """

    batch_size: int = 1
    learning_rate: float = 4.5e-3
    other_learning_rates: dict[str, float] = field(default_factory=lambda: {DENSE: 6e-3, FIRST: 3e-3})
    warmup: float = 0.05
    final_learning_rate: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    validations: int = 6
    validation_tokens: int = 2**15
    test_tokens: int = 2**17
    validation_fraction: float = 0.1
    test_fraction: float = 0.05
    data: str | None = None
    max_bytes: int = DEFAULT_MAX_BYTES
    device: str = "cpu"


@dataclass(frozen=True)
class Trained:
    """One network trained from one seed.

    Attributes:
        network: its name.
        context: tokens per window.
        budget: ``"tokens"`` or ``"seconds"``: what it shares with the torus.
        seed: of weights and batches.
        steps: of training.
        parameters: learned numbers.
        curve: validations: ``(step, bits per byte)``.
        bits_per_byte: on the test part, after the last step.
    """

    network: str
    context: int
    budget: str
    seed: int
    steps: int
    parameters: int
    curve: tuple[tuple[int, float], ...]
    bits_per_byte: float

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Trained:
        """The result whose fields went through JSON."""
        return cls(**{**fields, "curve": tuple((int(step), float(bits)) for step, bits in fields["curve"])})


def build(network: str, config: ModelConfig) -> nn.Module:
    """The untrained network."""
    return DenseLM(config) if network == DENSE else TorusLM(config)


class Runs:
    """Trains networks on one text, the same windows in the same order for the same context and seed.

    Args:
        training: what they share.
        folder: where results are kept.

    Raises:
        DataError: there is too little text.
    """

    def __init__(self, training: Training, folder: Path) -> None:
        self.settings, self.folder = training, folder
        self.corpus = data.load_corpus(training.data, training.max_bytes)

    def split(self, context: int) -> tuple[torch.Tensor, ...]:
        """The parts to train, validate and test on."""
        settings = self.settings
        return data.split(self.corpus.data, settings.validation_fraction, context + 1, settings.test_fraction)

    def about(self, network: str, config: ModelConfig) -> dict[str, Any]:
        """What a run must have in common with another one to stand for it, its steps aside."""
        training = dataclasses.asdict(self.settings)
        del training["other_learning_rates"]
        return {"training": training | {"learning_rate": self._learning_rate(network)}, "model": config.to_dict(),
                "text": self.corpus.fingerprint}

    def _learning_rate(self, network: str) -> float:
        return self.settings.other_learning_rates.get(network, self.settings.learning_rate)

    def steps_of(self, network: str, config: ModelConfig, context: int, seed: int, steps: int) -> Iterator[float]:
        """Makes a training step whenever its loss is asked for."""
        return self._steps(network, self._new_model(network, config, seed), context, seed, steps)

    def _new_model(self, network: str, config: ModelConfig, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(network, config).to(self.settings.device)

    def _steps(self, network: str, model: nn.Module, context: int, seed: int, steps: int) -> Iterator[float]:
        settings = self.settings
        part, *_ = self.split(context)
        optimizer = make_optimizer(model, self._learning_rate(network), settings.weight_decay)
        done = 0
        schedule = make_schedule(optimizer, settings.warmup, settings.final_learning_rate, lambda: done / steps)
        generator = torch.Generator().manual_seed(seed)
        while done < steps:
            tokens, targets = data.random_batch(part, settings.batch_size, context, generator)
            loss = training_step(
                model, optimizer, tokens.to(settings.device), targets.to(settings.device), settings.clip
            )
            done += 1
            schedule.step()
            yield loss

    def _bits(self, model: nn.Module, part: torch.Tensor, most_tokens: int, context: int) -> float:
        windows = max(1, most_tokens // context)
        nats = 0.0
        model.eval()
        with torch.inference_mode():
            for tokens, targets in data.fixed_batches(part, windows, self.settings.batch_size, context):
                loss = model.loss(tokens.to(self.settings.device), targets.to(self.settings.device))
                nats += loss.item() * len(tokens)
        model.train()
        return nats / windows / math.log(2)

    def train(
        self, network: str, config: ModelConfig, context: int, budget: str, seed: int, steps: int, say: Say
    ) -> Trained:
        """The result of a run: from the folder, where it is complete there, or trained now.

        A run on a budget of seconds is also taken from the folder where its steps differ by up to `SAME_SECONDS`.

        Raises:
            TrainingError: a loss is no longer finite.
            OSError: the result cannot be written.
        """
        if (found := self.find(network, config, context, budget, seed, steps)) is not None:
            return found
        model = self._new_model(network, config, seed)
        _, validation, test = self.split(context)
        curve: list[tuple[int, float]] = []
        validated = 0
        for done, loss in enumerate(self._steps(network, model, context, seed, steps), 1):
            if not math.isfinite(loss):
                raise TrainingError(f"the loss of {network} became {loss} at step {done}")
            if (due := done * self.settings.validations // steps) > validated:
                validated = due
                curve.append((done, self._bits(model, validation, self.settings.validation_tokens, context)))
                say(f"step {done} of {steps}: {curve[-1][1]:.3f} bits per byte")
        trained = Trained(network, context, budget, seed, steps, number_of_parameters(model), tuple(curve),
                          self._bits(model, test, self.settings.test_tokens, context))
        file = self._file(network, context, budget, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(file, checkpoint.model_tensors(model), {
            "model_config": config.to_dict(),
            _ENTRY: self.about(network, config) | {"trained": dataclasses.asdict(trained)},
        })
        return trained

    def _file(self, network: str, context: int, budget: str, seed: int) -> Path:
        return self.folder / f"{network}-{context}-{budget}-{seed}" / checkpoint.FILE_NAME

    def find(
        self, network: str, config: ModelConfig, context: int, budget: str, seed: int, steps: int
    ) -> Trained | None:
        """The result of a run that is complete in the folder; None where it is not."""
        about = self.about(network, config)
        try:
            entry = checkpoint.load_metadata(self._file(network, context, budget, seed))[_ENTRY]
            trained = Trained.from_dict(entry.pop("trained"))
            same = entry["training"] == about["training"] and entry["text"] == about["text"] and (
                ModelConfig.from_dict(entry["model"]) == ModelConfig.from_dict(about["model"])
            )
        except (CheckpointError, KeyError, TypeError, ValueError):
            return None
        tolerance = SAME_SECONDS * steps if budget == "seconds" else 0.0
        return trained if same and abs(trained.steps - steps) <= tolerance else None
