"""A batch that grows to the gradient noise scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class GradientNoise:
    """The gradient noise scale, estimated while training (McCandlish et al. 2018, appendix A.1).

    From the squared norms of the gradient of b sequences and of all B sequences of a step follow unbiased estimates ::

        |G|^2     = (B * |g_B|^2 - b * |g_b|^2) / (B - b)
        tr(Sigma) = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

    of the squared norm of the true gradient and of the trace of the covariance of one sequence's gradient. They are
    noisy, and their ratio would be biased: each is averaged exponentially, and the noise scale is
    ``B_simple = tr(Sigma) / |G|^2``, the batch size, in sequences, above which a step gains little from more.

    Args:
        smoothing: of the averages, at least 0 and below 1.
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing
        self.steps = 0
        self._squared_norm, self._trace = 0.0, 0.0

    def observe(self, of_part: float, of_all: float, part: int, whole: int) -> None:
        """Takes the squared norms of the gradients of ``part`` and of all ``whole`` sequences of a step, before
        clipping."""
        squared_norm = (whole * of_all - part * of_part) / (whole - part)
        trace = (of_part - of_all) / (1 / part - 1 / whole)
        self._squared_norm += (1 - self.smoothing) * (squared_norm - self._squared_norm)
        self._trace += (1 - self.smoothing) * (trace - self._trace)
        self.steps += 1

    @property
    def scale(self) -> float:
        """In sequences; infinite where the estimate of the true gradient is lost in noise."""
        if self._squared_norm <= 0:
            return math.inf
        return max(0.0, self._trace) / self._squared_norm

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"steps": self.steps, "squared_norm": self._squared_norm, "trace": self._trace}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.steps, self._squared_norm, self._trace = (state[name] for name in ("steps", "squared_norm", "trace"))


class GrowingBatch:
    """Sequences per step that follow the gradient noise scale upwards.

    Whenever the averages have seen ``1 / (1 - smoothing)`` steps with the present size, the batch grows to the noise
    scale, in whole parts, but at most to twice its size and to the largest allowed. It never shrinks: the noise scale
    grows as the loss falls (McCandlish et al. 2018, section 2.4), and a larger batch is to the noise what a smaller
    learning rate would be (Smith et al. 2018).

    Args:
        batch_size: at first.
        part: sequences that run together: the size is a multiple of it.
        largest: of the batch.
        smoothing: of `GradientNoise`.
    """

    def __init__(self, batch_size: int, part: int, largest: int, smoothing: float) -> None:
        self.size, self._part, self._largest = batch_size, part, largest
        self.noise = GradientNoise(smoothing)
        self._since = 0

    def grow(self) -> bool:
        """After a step that the noise has been measured in: whether the next one has more sequences."""
        self._since += 1
        if self._since < 1 / (1 - self.noise.smoothing):
            return False
        wanted = min(self.noise.scale, 2 * self.size, self._largest)
        size = int(wanted) // self._part * self._part
        if size <= self.size:
            return False
        self.size, self._since = size, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"size": self.size, "since": self._since, "noise": self.noise.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.size, self._since = state["size"], state["since"]
        self.noise.load_state_dict(state["noise"])
