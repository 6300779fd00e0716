"""The executable specification: dense, slow, plainly right; any device, float16 to float64."""

from .. import Problem
from .attention import attention_backward, attention_forward
from .compounding import ema_compound, ema_compound_backward, ema_multiscale, ema_multiscale_backward
from .decode import attention_decode
from .rope import rope

name = "reference"


def unavailable() -> str | None:
    return None


def can_run(problem: Problem) -> str | None:
    return None


__all__ = ["attention_backward", "attention_decode", "attention_forward", "can_run", "ema_compound",
           "ema_compound_backward", "ema_multiscale", "ema_multiscale_backward", "name", "rope", "unavailable"]
