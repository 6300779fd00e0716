"""How much of the machine the operator uses: its useful work, and what a matrix product and a copy reach here."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from torus_kernels import Stream, TorusLattice

from .candidates import BOTH
from .workloads import Workload

SHARING = ((Stream.major_forward, Stream.major_backward), (Stream.minor_forward, Stream.minor_backward),
           (Stream.spiral_cw,), (Stream.spiral_ccw,), (Stream.cross_u_to_v, Stream.cross_v_to_u))
"""Streams that can share a score and a product with the values: a pair that several of a group see is counted once."""

GEMM_SIZES = (512, 1024, 2048)
COPY_BYTES = 256 * 2**20

_FORWARD_PRODUCTS = 2  # S = q k^T and O = P v
_BACKWARD_PRODUCTS = 5  # S again, dP = dy v^T, dv = P^T dy, dq = dS k, dk = dS^T q
_FORWARD_TENSORS = 5  # q, k, v and the state in, out
_BACKWARD_TENSORS = 9  # q, k, v, the state and d_out in, the gradients of q, k, v and the state out


@functools.lru_cache(maxsize=64)
def visible_pairs(lattice: TorusLattice, seq_len: int) -> int:
    """Pairs of a query and a key that it sees, summed over the groups of `SHARING`, in one head."""
    if lattice.is_causal:
        lag = torch.arange(min(seq_len, lattice.num_sites))
        pairs_at = seq_len - lag
        geometry = functools.partial(lattice.lag_geometry, lag=lag)
    else:
        # On the cylinder a runs over both signs, and fewer rows have a neighbour that far away.
        is_open = lattice.topology == "cylinder"
        a = torch.arange(1 - lattice.n_major if is_open else 0, lattice.n_major)[:, None]
        b = torch.arange(lattice.n_minor)
        rows = lattice.n_major - a.abs() if is_open else torch.full_like(a, lattice.n_major)
        pairs_at = (rows * lattice.n_minor).expand(-1, lattice.n_minor)
        geometry = functools.partial(lattice.displacement_geometry, a=a, b=b)
    total = 0
    for group in SHARING:
        visible = torch.zeros((), dtype=torch.bool)
        for stream in lattice.streams.intersection(group):
            visible = visible | geometry(stream)[0]
        total += int((pairs_at * visible).sum())
    return total


def useful_flops(workload: Workload, direction: str) -> int:
    """Floating-point operations of the matrix products of one call at the CPU batch, ``2 * D`` a pair and product."""
    products = _FORWARD_PRODUCTS + (_BACKWARD_PRODUCTS if direction == BOTH else 0)
    pairs = workload.cpu_batch * workload.heads * visible_pairs(workload.lattice, workload.seq_len)
    return products * 2 * workload.head_dim * pairs


def useful_bytes(workload: Workload, dtype: torch.dtype, direction: str) -> int:
    """Bytes of the tokens ``[B, H, T, D]`` that one call at the CPU batch has to read and write."""
    tensors = _FORWARD_TENSORS + (_BACKWARD_TENSORS if direction == BOTH else 0)
    return tensors * workload.cpu_batch * workload.heads * workload.seq_len * workload.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Peaks:
    """What the machine reaches: FLOP/s of a matrix product, bytes/s read and written by a copy."""

    gemm: float
    copy: float


def _median_seconds(run: Callable[[], object], seconds: float) -> float:
    run()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        before = time.perf_counter()
        run()
        taken.append(time.perf_counter() - before)
    return statistics.median(taken)


def measure_peaks(dtype: torch.dtype, seconds: float = 0.3) -> Peaks:
    """The best of ``torch.mm`` over `GEMM_SIZES`, and a copy of `COPY_BYTES`, with the threads that are set.

    Where a CPU has no arithmetic in a 16-bit dtype, a product in it takes a hundred times as long as one in float32: no
    bound for kernels that convert. The best is therefore that of the dtype or of float32.

    Args:
        dtype: of the matrices.
        seconds: how long each size is repeated.
    """
    rates = []
    for candidate in dict.fromkeys((dtype, torch.float32)) if dtype.itemsize < 4 else (dtype,):
        for size in GEMM_SIZES:
            a, b = torch.randn(2, size, size).to(candidate)
            product = torch.empty(size, size, dtype=candidate)
            taken = _median_seconds(lambda a=a, b=b, c=product: torch.mm(a, b, out=c), seconds)
            rates.append(2 * size**3 / taken)
            if taken > seconds:
                break  # a larger one would take minutes
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Peaks(max(rates), 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source), seconds))
