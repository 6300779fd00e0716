"""Which implementation computes an operator: names, availability with reasons, and the choice.

A backend is a module with ``unavailable() -> str | None`` (why it cannot run on this machine at all),
``can_run(problem) -> str | None`` (why it cannot run this problem) and one function per operator. Both return
None for yes. Backends differ in how they compute, never in what.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import NamedTuple, cast

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
AUTO = "auto"

# A backend stands before another where a committed result shows that it is right there and faster. No result shows the
# CUDA kernels on a GPU yet.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
_IMPLEMENTED = {"reference": ".reference", "cpu": ".cpu", "triton": ".triton", "cuda": ".cuda"}
_warned: set[str] = set()


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse a call."""

    device: str
    dtype: torch.dtype
    head_dim: int
    operator: str = "attention"  # or decode, compounding, rope


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


def check_name(name: object, source: str = "backend") -> str:
    """Raises where ``name`` is not a backend; ``source`` is what the user wrote it in."""
    if not isinstance(name, str):
        raise TypeError(f"{source} must be a string, got {type(name).__name__}")
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)} or {AUTO}, got {name!r}")
    return name


@functools.cache
def load(name: str) -> ModuleType | None:
    """The backend's module, or None where this version has none."""
    path = _IMPLEMENTED.get(name)
    return None if path is None else importlib.import_module(path, __package__)


def unavailable(name: str) -> str | None:
    """Why the backend cannot run on this machine, or None where it can."""
    module = load(name)
    return f"this version of torus_kernels has no {name} backend" if module is None else module.unavailable()


def can_run(name: str, problem: Problem) -> str | None:
    """Why the backend cannot run this problem here, or None where it can."""
    return unavailable(name) or _module(name).can_run(problem)


def _module(name: str) -> ModuleType:
    """`load` of a backend that is not unavailable."""
    return cast(ModuleType, load(name))


def select(requested: str, problem: Problem) -> ModuleType:
    """The module that computes this problem.

    ``requested`` is a name or ``"auto"``, which means the variable ``TORUS_BACKEND`` and, without it, the first of
    the device's backends that can run. A backend named by either never gives way to another.

    Raises:
        BackendError: the backend named cannot run this problem here.
    """
    if requested == AUTO and (forced := os.environ.get("TORUS_BACKEND")):
        requested = check_name(forced, "the variable TORUS_BACKEND")
    if requested != AUTO:
        if reason := can_run(requested, problem):
            raise BackendError(f"backend {requested!r} cannot run here: {reason}")
        return _module(requested)
    refused: dict[str, str] = {}
    for name in _PREFERENCE.get(problem.device, ("reference",)):
        reason = can_run(name, problem)
        if reason is None:
            _warn_of_slow_choice(name, refused)
            return _module(name)
        refused[name] = reason
    raise BackendError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))


def _warn_of_slow_choice(chosen: str, refused: dict[str, str]) -> None:
    if chosen == "reference" and refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items() if name in _IMPLEMENTED)
        if reasons and reasons not in _warned:
            _warned.add(reasons)
            warnings.warn(f"torus_kernels runs on its slow reference backend, because {reasons}", stacklevel=2)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, out of reference, cpu, triton and cuda."""
    return tuple(name for name in BACKENDS if unavailable(name) is None)


def backend_report() -> dict[str, str]:
    """For every backend ``"available"`` or the reason why it cannot run here, the compiler's message included."""
    return {name: unavailable(name) or "available" for name in BACKENDS}
