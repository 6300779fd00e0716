"""What a training run measured: as JSON, and as a plot of the validation curve."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .coherence_tracking import CoherencePoint
from .files import replacing


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes values that JSON can hold; a crash leaves the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True)
class Validation:
    """One point of the validation curve.

    Attributes:
        step: training steps made before.
        tokens: tokens trained on before.
        seconds: time of the run before, validations included.
        bits_per_byte: cross-entropy on the validation windows over the bytes that they stand for, in bits.
        perplexity: of a token of the validation windows.
    """

    step: int
    tokens: int
    seconds: float
    bits_per_byte: float
    perplexity: float


@dataclass
class History:
    """Everything measured in a run.

    Attributes:
        losses: what every training step descended, in nats per token: the mean cross-entropy and, where there are
            any, the terms of a teacher and of a mixture of experts.
        validation: the validation curve; the first point is the untrained model.
        coherence: of the layers over training, where it is measured.
        batch_sizes, seq_lens: sequences, and tokens in each of them, of every training step.
        noise_scales: estimate of the gradient noise scale after every step, in sequences, None where the estimate of
            the true gradient's norm is not positive; empty where the batch does not follow it.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[Validation] = field(default_factory=list)
    coherence: list[CoherencePoint] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    seq_lens: list[int] = field(default_factory=list)
    noise_scales: list[float | None] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Fields as values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> History:
        """The history of `to_dict`."""
        # Runs of bytes have been recorded without the perplexity.
        points = [{"perplexity": 2 ** point["bits_per_byte"]} | point for point in fields["validation"]]
        coherence = [CoherencePoint(**point) for point in fields.get("coherence", [])]
        return cls(list(fields["losses"]), [Validation(**point) for point in points], coherence,
                   *(list(fields.get(name, [])) for name in ("batch_sizes", "seq_lens", "noise_scales")))

    @property
    def tokens(self) -> int:
        """Trained on in all steps."""
        return sum(b * t for b, t in zip(self.batch_sizes, self.seq_lens, strict=True))

    @property
    def best(self) -> int | None:
        """Index of the first validation with the fewest bits per byte, or None before the first."""
        bits = [point.bits_per_byte for point in self.validation]
        return bits.index(min(bits)) if bits else None

    def write_json(self, path: Path, **about: Any) -> None:
        """Writes the history and what it is ``about``."""
        write_json(path, about | self.to_dict())

    def write_plot(
        self, path: Path, title: str = "Language model on torus attention", bytes_per_token: float = 1.0
    ) -> None:
        """Draws the validation curve over the training loss, both in bits per byte, as a PNG."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        if self.losses:
            steps = range(1, len(self.losses) + 1)
            bits = [loss / math.log(2) / bytes_per_token for loss in self.losses]
            axes.plot(steps, bits, color="0.8", lw=0.8, label="training batch")
        axes.plot(
            [point.step for point in self.validation], [point.bits_per_byte for point in self.validation],
            color="C0", marker="o", ms=4, label="validation",
        )
        if self.validation:
            last = self.validation[-1]
            axes.annotate(f"{last.bits_per_byte:.2f}", (last.step, last.bits_per_byte), (0, 8),
                          textcoords="offset points", ha="center", color="C0")
        axes.set(xlabel="step", ylabel="bits per byte", title=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)
