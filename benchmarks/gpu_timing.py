"""Timing on a GPU: events on the device around every call, and a cold L2 cache before it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import Spread

WARM_UPS = 3
MIN_REPEATS = 5
MAX_REPEATS = 200

GRAPH_BELOW = 1e-3
"""Seconds of device time below which a call is replayed from a graph: its launches would take longer than it does."""

_FLUSHED_BYTES = 256 * 2**20
"""More than any L2 cache; writing it also gives the host a head start."""


@dataclass(frozen=True)
class GpuTiming:
    """One function on one case.

    Attributes:
        seconds: on the device, of each repeat.
        host_seconds: median of what the host takes to launch one eager call while the device is idle.
        peak_bytes: device memory that one call adds at its peak, outputs included.
        from_graph: the repeats were replays of a CUDA graph.
    """

    seconds: tuple[float, ...]
    host_seconds: float
    peak_bytes: int
    from_graph: bool

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)


def _capture(run: Callable[[], object]) -> Callable[[], object] | None:
    """A function that replays ``run`` from a graph, None where it cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()  # lives as long as the graph writes to it
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return lambda: (graph.replay(), kept)


class Stopwatch:
    """Measures calls on the current device.

    Args:
        seconds: how long the repeats of one function go on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def _repeat(self, run: Callable[[], object], repeats: int) -> list[float]:
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        for start, end in events:
            self._flushed.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def measure(self, run: Callable[[], object]) -> GpuTiming:
        """Times ``run``, after `WARM_UPS` calls in which it may compile."""
        side = torch.cuda.Stream()  # where a call has to have run before it is captured
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak_bytes = torch.cuda.max_memory_allocated() - before

        host = []
        for _ in range(MIN_REPEATS):
            started = time.perf_counter()
            run()
            host.append(time.perf_counter() - started)
            torch.cuda.synchronize()

        replay, expected = None, statistics.median(self._repeat(run, MIN_REPEATS))
        if expected < GRAPH_BELOW:
            replay = _capture(run)
            if replay is not None:
                replay()
        repeats = int(min(MAX_REPEATS, max(MIN_REPEATS, self._seconds / expected)))
        seconds = self._repeat(replay or run, repeats)
        return GpuTiming(tuple(seconds), statistics.median(host), peak_bytes, replay is not None)
