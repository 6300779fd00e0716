"""What the training of a field model measured: as JSON, and as a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


@dataclass(frozen=True)
class Epoch:
    """The run at the end of an epoch, or where its time ran out.

    Attributes:
        epoch: passes through the training windows made so far; 0 for the untrained model.
        step: training steps made so far.
        seconds: time of all these steps; validation and checkpoints do not count.
        training_loss: mean loss of the steps since the point before; None for the untrained model.
        test_error: one-step relative L2 on the test trajectories; None where it was not computed.
    """

    epoch: float
    step: int
    seconds: float
    training_loss: float | None
    test_error: float | None


@dataclass
class FieldHistory:
    """Everything measured in a run.

    Attributes:
        losses: loss of every training step.
        epochs: the first is the untrained model, which predicts that nothing changes.
    """

    losses: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Fields as values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FieldHistory:
        """The history of `to_dict`."""
        return cls(list(fields["losses"]), [Epoch(**epoch) for epoch in fields["epochs"]])

    def write_plot(self, path: Path, title: str) -> None:
        """Draws training loss and test error over the epochs as a PNG."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, label, style in (("training_loss", "training loss", {"color": "0.6"}),
                                   ("test_error", "test, one step", {"color": "C0", "marker": "o", "ms": 4})):
            points = [(e.epoch, y) for e in self.epochs if (y := getattr(e, name)) is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
        axes.set(xlabel="epoch", ylabel="relative L2 error", title=title, yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        figure.savefig(path, dpi=150)
