"""Checks of configurations: every message names the field, what it got and what it needs."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torus_kernels.checks import MAX_HEAD_DIM


def _fields(config: object, names: Iterable[str], optional: Iterable[str]) -> Iterator[tuple[str, Any]]:
    yield from ((name, getattr(config, name)) for name in names)
    yield from ((name, value) for name in optional if (value := getattr(config, name)) is not None)


def check_positive_integers(config: object, *names: str, optional: Iterable[str] = ()) -> None:
    """Raises where a field is not an integer of at least 1; an ``optional`` one may be None."""
    for name, value in _fields(config, names, optional):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_heads(width: int, heads: int) -> None:
    """Raises where a width does not divide into heads of a size that the operator takes."""
    if width % (8 * heads) != 0 or width > MAX_HEAD_DIM * heads:
        raise ValueError(f"width / heads must be a multiple of 8 up to {MAX_HEAD_DIM}, got {width} / {heads}")


def check_seed(seed: object) -> None:
    """Raises where a seed is not an integer that every generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")


def check_numbers(
    config: object, *names: str, optional: Iterable[str] = (), where: Callable[[float], bool], needs: str
) -> None:
    """Raises where a field is not a number that satisfies ``where``, which ``needs`` puts in words."""
    for name, value in _fields(config, names, optional):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not where(float(value)):
            raise ValueError(f"{name} must be {needs}, got {value}")


def check_tuple(
    config: object, name: str, *, where: Callable[[float], bool], needs: str, integers: bool = False,
    ascending: bool = False,
) -> None:
    """Raises where a field is not a sequence of numbers, or integers, that each satisfy ``where``, which ``needs`` puts
    in words, and rise if ``ascending``. Keeps it as a tuple, also where it came from JSON as a list."""
    values = getattr(config, name)
    kinds, noun = (int, "integers") if integers else (numbers.Real, "numbers")
    if not isinstance(values, (tuple, list)) or any(isinstance(x, bool) or not isinstance(x, kinds) for x in values):
        raise TypeError(f"{name} must be {noun}, got {values!r}")
    if not all(where(float(x)) for x in values):
        raise ValueError(f"{name} must be {needs}, got {' '.join(map(str, values))}")
    if ascending and any(a >= b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name} must ascend, got {' '.join(map(str, values))}")
    object.__setattr__(config, name, tuple(values))  # of a frozen dataclass
