"""Decoding on a GPU: one token of one layer against a full ring, beside a dense cache of as many tokens."""

from __future__ import annotations

import torch

from torus_kernels import TorusKVCache, torus_attention_decode
from torus_kernels.lattice import Stream

from .accuracy import WrongResult
from .candidates import OPERATOR
from .gpu_report import DENSE_CACHE, GpuReport, Measured, Work
from .gpu_timing import Stopwatch
from .peers.decode import DenseCache, GatheredCache
from .report import Case
from .workloads import Workload, make_inputs

GATHERED = "gathered"
LABELS = {DENSE_CACHE: "SDPA over a dense cache", GATHERED: "gathered slots"}
BATCHES = (1, 8)

_TOLERANCE = 4
"""Roundings of the tokens' dtype, of the largest result, by which a step may be off."""


def _work(workload: Workload, batch: int, itemsize: int) -> Work:
    """Every visible key and value is read once, by whichever streams see it."""
    lag = torch.arange(workload.lattice.num_sites)
    seen = torch.stack([workload.lattice.lag_geometry(stream, lag)[0] for stream in Stream]).any(dim=0)
    pairs = batch * workload.heads * int(seen.sum())
    return Work(2 * pairs * workload.head_dim * itemsize, 4 * pairs * workload.head_dim, pairs, 10)


def measure(
    report: GpuReport, stopwatch: Stopwatch, workload: Workload, dtype: torch.dtype, batch: int, backend: str,
    device: str = "cuda",
) -> None:
    """Appends one token to a full cache and decodes it; checks the result and times it beside its peers.

    Raises:
        WrongResult: the operator is not what float64 gives.
    """
    lattice, heads, head_dim = workload.lattice, workload.heads, workload.head_dim
    case = Case(workload.name, str(dtype).removeprefix("torch."), f"decode, B={batch}")
    one = make_inputs(lattice, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, seq_len=1)
    q, k, v, weights, decay, state, alpha = (x.to(device) for x in
                                             (one.q, one.k, one.v, one.weights, one.decay, one.state, one.alpha))
    length = lattice.num_sites
    with torch.device(device), torch.no_grad():
        cache = TorusKVCache(lattice, batch, heads, head_dim, dtype, device)
        cache.append(*(torch.randn(batch, heads, length, head_dim, dtype=dtype) for _ in range(2)))

        def gathered(dtype: torch.dtype) -> GatheredCache:
            rings = (x.to(dtype, copy=True).contiguous() for x in (cache.keys, cache.values))
            return GatheredCache(lattice, *rings, length, decay.to(torch.float64 if dtype == torch.float64 else
                                                                   torch.float32))

        def step() -> torch.Tensor:
            cache.append(k, v)
            return torus_attention_decode(q, cache, stream_weights=weights, decay=decay, ema_state=state,
                                          ema_alpha=alpha, backend=backend)

        truth = gathered(torch.float64).step(*(x.double() for x in (q, k, v, weights, state, alpha)))
        peer, dense = gathered(dtype), DenseCache(cache.keys.contiguous(), cache.values.contiguous())
        error = (step().double() - truth).abs().max().item()
        if not error <= _TOLERANCE * torch.finfo(dtype).eps * truth.abs().max().item():
            raise WrongResult(f"decoding on {backend} is off by {error:.2e} and is not timed")
        runs = {OPERATOR: step, DENSE_CACHE: lambda: dense.step(q, k, v),
                GATHERED: lambda: peer.step(q, k, v, weights, state, alpha)}
        timings = {name: stopwatch.measure(run) for name, run in runs.items()}
    report.labels |= LABELS
    report.work.append((case, _work(workload, batch, dtype.itemsize)))
    report.measured += [Measured(case, name, timing) for name, timing in timings.items()]
