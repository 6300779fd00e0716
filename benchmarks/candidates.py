"""What is timed: the operator on its backends, and its peers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from torus_kernels import available_backends
from torus_kernels.backends import check_name

from . import peers
from .workloads import Attention, Workload, operator_on

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        name: under which results are kept.
        label: what tables and plots call it.
        attention: the function.
        computes_operator: its result is held against the operator; else it is a unit of cost.
        directions: what it can do.
        memory: bytes it needs for a workload, dtype and direction where that may be too much; 0 where it never is.
        compiles: the first call on a workload goes through ``torch.compile``, for a minute or so.
    """

    name: str
    label: str
    attention: Attention
    computes_operator: bool = True
    directions: tuple[str, ...] = DIRECTIONS
    memory: Callable[[Workload, torch.dtype, str], int] = lambda workload, dtype, direction: 0
    compiles: bool = False


def _pair_tables(workload: Workload, dtype: torch.dtype, direction: str) -> int:
    """Two tables of all pairs for each stream in up to float32, and those in 64 bits that they are made from."""
    return (8 * 2 * 4 + 6 * 8) * workload.seq_len**2


def _dense_memory(workload: Workload, dtype: torch.dtype, direction: str) -> int:
    """Besides the tables, scores of every head: those of all streams, several times over, where a gradient is wanted.
    """
    scores = workload.cpu_batch * workload.heads * workload.seq_len**2 * 4
    return _pair_tables(workload, dtype, direction) + (2 * scores if direction == FORWARD else 8 * 3 * scores)


PEERS = {
    candidate.name: candidate
    for candidate in (
        Candidate("compose", "compose", peers.compose),
        Candidate("compose_matmul", "compose, shared scores", peers.compose_matmul),
        Candidate("compose_compiled", "compose, compiled", peers.compose_compiled, compiles=True),
        Candidate("flash", "one dense SDPA", peers.flash, computes_operator=False),
        Candidate("dense", "8 dense SDPA", peers.dense, memory=_dense_memory),
        Candidate("flex", "8 flex_attention", peers.flex, directions=(FORWARD,), memory=_pair_tables,
                  compiles=True),
    )
}

OPERATOR = "torus_attention"


def operator(backend: str) -> Candidate:
    """The operator on a backend. Its name is `OPERATOR` whatever the backend."""
    return Candidate(OPERATOR, f"{OPERATOR} ({backend})", operator_on(check_name(backend)))


def other_operator(backend: str) -> Candidate:
    """The operator on a further backend, beside `operator`."""
    return Candidate(f"{OPERATOR}_{backend}", f"{OPERATOR} ({backend})", operator_on(check_name(backend)))


def best_cpu_backend() -> str:
    """``cpu`` where it can run, else ``reference``."""
    return "cpu" if "cpu" in available_backends() else "reference"


def free_memory() -> int:
    """Bytes of memory that the machine has to spare."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
