"""Triton kernels for NVIDIA GPUs from sm_80 on, deterministic, memory O(T).

Under ``TRITON_INTERPRET=1`` the same kernels run, slowly, on CPU tensors. Importing this module imports neither
triton nor CUDA; the operators are loaded when they are first asked for.
"""

from __future__ import annotations

import functools
import importlib

import torch

from .. import Problem

name = "triton"

MIN_CAPABILITY = (8, 0)

INTERPRETED_DTYPES = {torch.float32, torch.float16}
"""Dtypes that Triton's interpreter computes rightly: it multiplies the bits of bfloat16."""

_OPERATORS = {
    "attention_forward": ".forward",
    "attention_backward": ".backward",
    "attention_decode": ".decode",
    "ema_compound": ".compounding",
    "ema_compound_backward": ".compounding",
    "ema_multiscale": ".compounding",
    "ema_multiscale_backward": ".compounding",
    "rope": ".rotary",
}


def __getattr__(operator: str):
    if operator not in _OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {operator!r}")
    function = getattr(importlib.import_module(_OPERATORS[operator], __name__), operator)
    globals()[operator] = function  # the next look-up does not come here
    return function


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, as it decides from ``TRITON_INTERPRET`` when kernels are defined."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def unavailable() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation may raise anything
        return f"triton cannot be imported: {error}"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    if torch.version.hip is not None:
        return "these kernels are for NVIDIA GPUs"
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if best < MIN_CAPABILITY:
        return f"it needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer, got {best}"
    return None


def can_run(problem: Problem) -> str | None:
    device = "cpu" if interpreting() else "cuda"
    if problem.device != device:
        where = "the CPU under TRITON_INTERPRET=1" if device == "cpu" else "CUDA devices"
        return f"it runs on {where}, and these tensors are on {problem.device}"
    if problem.dtype == torch.float64:
        return "it has no float64"
    if interpreting() and problem.dtype not in INTERPRETED_DTYPES:
        return f"Triton's interpreter computes {problem.dtype} wrongly"
    return None
