"""The curves of a run as logs for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .coherence import MEASURES
from .coherence_tracking import CoherencePoint
from .history import Validation
from .run import TrainingError

FOLDER = "tensorboard"


def import_writer() -> Any:
    """PyTorch's ``SummaryWriter``.

    Raises:
        TrainingError: the package that it needs is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            "logs for TensorBoard need the package tensorboard: pip install 'torus-kernels[tensorboard]'"
        ) from error
    return SummaryWriter


class TensorBoardLog:
    """Writes the logs of one run.

    Args:
        run_dir: folder of the run; the logs are in ``tensorboard`` there.
        step: where the run begins or continues. Later steps, of a process that was interrupted, are no longer shown; at
            0 the logs of a run before are removed.

    Raises:
        TrainingError: the package is missing.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        folder = run_dir / FOLDER
        if step == 0:
            for file in folder.glob("events.out.tfevents.*"):
                file.unlink()
        self._writer = import_writer()(folder, purge_step=step + 1)

    def write_step(self, step: int, loss: float, learning_rate: float) -> None:
        """A training step: its loss in nats per token, and the learning rate of the next one."""
        self._writer.add_scalar("training/loss", loss, step)
        self._writer.add_scalar("training/learning_rate", learning_rate, step)

    def write_validation(self, point: Validation) -> None:
        """A point of the validation curve."""
        self._writer.add_scalar("validation/bits_per_byte", point.bits_per_byte, point.step)
        self._writer.add_scalar("validation/perplexity", point.perplexity, point.step)
        self._writer.flush()

    def write_coherence(self, point: CoherencePoint) -> None:
        """The means over the layers of what was measured, and the score of each layer."""
        for name in MEASURES:
            self._writer.add_scalar(f"coherence/{name}", point.mean(name), point.step)
        for layer, score in enumerate(point.score):
            self._writer.add_scalar(f"coherence_score/layer_{layer}", score, point.step)

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
