"""A quick check that the backends which run here are right: every result against ``reference`` in float64.

It finds a broken build, driver or installation in a second or two. The precision of the kernels is the test suite's
business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .api import torus_attention
from .backends import Problem, can_run
from .checks import parameter_dtype
from .lattice import DEFAULT_DECAY, NUM_STREAMS, TorusLattice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LATTICES = (TorusLattice(4, 6, winding=3), TorusLattice(3, 5, "causal"))
_SEQ_LEN = 24  # longer than the causal lattice's window of 15
_BATCH, _HEADS, _KV_HEADS, _HEAD_DIM = 2, 4, 2, 16
_GIVEN_DTYPE = ("q", "k", "v", "ema_state")  # the others are parameters

# In roundings relative to the largest of all results: sums in float32 or better, then what a 16-bit dtype keeps.
_ACCUMULATED, _STORED = 32, 2


class Check(NamedTuple):
    """One case on one backend."""

    backend: str
    device: str
    dtype: str
    topology: str
    error: float | None
    """Largest error of the output and all gradients, relative to the largest of them; None where the case raised."""
    allowed: float
    worst: str | None
    """The result with that error."""
    failure: str | None
    """What went wrong; None where the case passed."""


def check_backend(name: str, device: str) -> Iterator[Check]:
    """Runs every case that the backend accepts on this kind of device, forward and backward; nothing is raised."""
    for dtype in DTYPES:
        if can_run(name, Problem(device, dtype, _HEAD_DIM)) is None:
            for lattice in _LATTICES:
                yield _check(name, device, dtype, lattice)


def _check(name: str, device: str, dtype: torch.dtype, lattice: TorusLattice) -> Check:
    allowed = _ACCUMULATED * torch.finfo(torch.float32).eps
    if dtype != torch.float32:
        allowed += _STORED * torch.finfo(dtype).eps
    error, worst, failure = None, None, None
    try:
        inputs = {
            key: x.to(device, dtype if key in _GIVEN_DTYPE else parameter_dtype(dtype))
            for key, x in _inputs().items()
        }
        actual = _evaluate(inputs, lattice, name)
        expected = _evaluate({key: x.double().cpu() for key, x in inputs.items()}, lattice, "reference")
        largest = max(x.abs().max().item() for x in expected.values())
        errors = {key: (x.double().cpu() - expected[key]).abs().max().item() / largest for key, x in actual.items()}
        # NaN counts as the largest error: max() would let it pass.
        worst = max(errors, key=lambda key: float("inf") if errors[key] != errors[key] else errors[key])
        error = errors[worst]
        if not error <= allowed:
            failure = f"{worst} is wrong: relative error {error:.1e}, {allowed:.1e} allowed"
    except Exception as problem:  # whatever a broken installation raises is what is to be shown
        failure = f"{type(problem).__name__}: {problem}"
    return Check(name, device, str(dtype).removeprefix("torch."), lattice.topology, error, allowed, worst, failure)


def _inputs() -> dict[str, Tensor]:
    """Random arguments of `torus_attention` in float64, every one of them given, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (_BATCH, _HEADS, _SEQ_LEN, _HEAD_DIM)
    cached = (_BATCH, _KV_HEADS, _SEQ_LEN, _HEAD_DIM)
    return {
        "q": normal(*tokens), "k": normal(*cached), "v": normal(*cached),
        "stream_weights": normal(_BATCH, _HEADS, _SEQ_LEN, NUM_STREAMS),
        "decay": torch.tensor(DEFAULT_DECAY) + 0.5 * normal(_HEADS, NUM_STREAMS),
        "ema_state": normal(*tokens), "ema_alpha": normal(_HEADS).sigmoid(), "d_out": normal(*tokens),
    }


def _evaluate(inputs: dict[str, Tensor], lattice: TorusLattice, backend: str) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if name != "d_out"}
    q, k, v, *_ = leaves.values()
    first_key = None
    if lattice.is_causal:  # two documents, the second of which begins at token 7
        place = torch.arange(_SEQ_LEN, device=q.device)
        first_key = torch.where(place < 7, 0, 7).expand(_BATCH, _SEQ_LEN)
    out = torus_attention(
        q, k, v, lattice, stream_weights=leaves["stream_weights"], decay=leaves["decay"],
        ema_state=leaves["ema_state"], ema_alpha=leaves["ema_alpha"], first_key=first_key, backend=backend,
    )
    grads = torch.autograd.grad(out, tuple(leaves.values()), inputs["d_out"].to(out.dtype))
    return {"out": out.detach(), **{f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}
