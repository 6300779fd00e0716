"""Timing side by side: every round runs every candidate once, so that ratios are of the same moment."""

from __future__ import annotations

import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WARM_UPS = 3
"""Calls before the first that counts: caches fill, and the heap reaches the size at which it stops growing."""

LONG_CALL = 2.0
"""Seconds of warming up after which a candidate is warm, however few its calls."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        lower, median, upper = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate in every round, and the pages that it made the kernel map in the median round."""

    seconds: tuple[float, ...]
    page_faults: float

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)

    def ratio_to(self, other: Timing) -> Spread:
        """How many times as long as ``other`` this candidate takes, round by round."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)])


def timings_of(fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Timing]:
    """Timings that went through JSON."""
    return {name: Timing(tuple(x["seconds"]), x["page_faults"]) for name, x in fields.items()}


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _warm_up(name: str, run: Callable[[], object], prepare: Callable[[str], None] | None) -> None:
    if prepare is not None:
        prepare(name)
    started = time.perf_counter()
    for _ in range(WARM_UPS):
        run()
        if time.perf_counter() - started > LONG_CALL:
            break


def time_side_by_side(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 10.0,
    min_rounds: int = 5,
    max_rounds: int = 50,
    on_round: Callable[[int], None] | None = None,
    prepare: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Runs all candidates in turn, round after round, until ``seconds`` have passed.

    Args:
        candidates: functions to time, by name.
        seconds: how long to go on, warm-up excluded.
        min_rounds: rounds made however long they take.
        max_rounds: rounds after which to stop early.
        on_round: called after every round with the number of rounds made.
        prepare: called with the name of each candidate before it runs, untimed.
    """
    for name, run in candidates.items():
        _warm_up(name, run, prepare)
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    faults: dict[str, list[int]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    started = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > seconds:
            break
        shuffle(order)  # nobody always runs after the same neighbour
        for name in order:
            if prepare is not None:
                prepare(name)
            run, faults_before, before = candidates[name], _page_faults(), time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - before)
            faults[name].append(_page_faults() - faults_before)
        if on_round is not None:
            on_round(done + 1)
    return {name: Timing(tuple(taken[name]), statistics.median(faults[name])) for name in candidates}
