"""What the tests share: backends under test, attention problems, and the error budget."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import dense
import pytest
import torch
from torch import Tensor

import torus_kernels
from torus_kernels import Stream, TorusLattice

DIFFERENTIABLE = ("q", "k", "v", "stream_weights", "decay", "ema_state", "ema_alpha")
PARAMETERS = ("stream_weights", "decay", "ema_alpha")
NUM_STREAMS = len(Stream)


@dataclass(frozen=True)
class Backend:
    """A backend under test and the device that its tensors live on."""

    name: str

    @property
    def is_interpreted(self) -> bool:
        """Triton's interpreter runs the kernels, on the CPU and slowly; the variable counts when triton is imported."""
        return self.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def is_emulated(self) -> bool:
        """The CUDA kernels are compiled for the CPU, where they run slowly."""
        return self.name == "cuda" and os.environ.get("TORUS_CUDA_EMULATE", "0") not in ("", "0")

    @property
    def is_slow(self) -> bool:
        return self.is_interpreted or self.is_emulated

    @property
    def device(self) -> str:
        return "cuda" if self.name in ("triton", "cuda") and not self.is_slow else "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes the operator's definition asks of the backend; float64 on a GPU belongs to ``reference``."""
        if self.name == "cuda":
            return (torch.float16, torch.bfloat16)
        low = (torch.float32, torch.float16, torch.bfloat16)
        return low if self.name == "triton" else (torch.float64, *low)

    @property
    def exact_dtype(self) -> torch.dtype:
        return self.dtypes[0]

    @property
    def common_dtype(self) -> torch.dtype:
        """float32 wherever the backend takes it."""
        return torch.float32 if torch.float32 in self.dtypes else self.low_dtype

    @property
    def low_dtype(self) -> torch.dtype:
        """A 16-bit dtype: bfloat16 wherever the backend takes it."""
        return self.dtypes[-1]

    def attention(self, *args, **kwargs) -> Tensor:
        return torus_kernels.torus_attention(*args, backend=self.name, **kwargs)

    def attention_with_stats(self, *args, **kwargs):
        return torus_kernels.torus_attention_with_stats(*args, backend=self.name, **kwargs)

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Runs the functions that take no ``backend`` argument on this backend."""
        with mock.patch.dict(os.environ, TORUS_BACKEND=self.name):
            yield

    def has_cylinder(self) -> bool:
        return _refuses_cylinder(self) is None

    def require(self, lattice: TorusLattice) -> None:
        """Skips where the backend does not have the cylinder yet; it must have the other two topologies."""
        if lattice.topology == "cylinder" and not self.has_cylinder():
            pytest.skip(_refuses_cylinder(self))


@functools.cache
def _refuses_cylinder(backend: Backend) -> str | None:
    q = torch.zeros(1, 1, 4, 8, device=backend.device, dtype=backend.common_dtype)
    try:
        backend.attention(q, q, q, TorusLattice(2, 2, "cylinder"))
    except torus_kernels.BackendError as error:
        return str(error)
    return None


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Problem:
    """Arguments of one call of `torus_attention`, and the gradient that flows into its output."""

    lattice: TorusLattice
    q: Tensor
    k: Tensor
    v: Tensor
    stream_weights: Tensor | None = None
    decay: Tensor | None = None
    ema_state: Tensor | None = None
    ema_alpha: Tensor | None = None
    first_key: Tensor | None = None
    scale: float | None = None
    d_out: Tensor | None = None

    def replace(self, **changes) -> Problem:
        return dataclasses.replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable arguments that are given."""
        return {name: x for name in DIFFERENTIABLE if (x := getattr(self, name)) is not None}

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        """Tokens in ``dtype``, parameters in the dtype that goes with it."""
        wide = parameter_dtype(dtype)
        cast = {name: x.to(device, wide if name in PARAMETERS else dtype) for name, x in self.tensors().items()}
        cast["d_out"] = None if self.d_out is None else self.d_out.to(device, dtype)
        cast["first_key"] = None if self.first_key is None else self.first_key.to(device)
        return self.replace(**cast)

    def arguments(self) -> dict:
        return {
            "q": self.q, "k": self.k, "v": self.v, "lattice": self.lattice, "stream_weights": self.stream_weights,
            "decay": self.decay, "scale": self.scale, "ema_state": self.ema_state, "ema_alpha": self.ema_alpha,
            "first_key": self.first_key,
        }

    def statistics_arguments(self) -> dict:
        return {name: x for name, x in self.arguments().items()
                if name in ("q", "k", "lattice", "decay", "scale", "first_key")}


def make_problem(
    lattice: TorusLattice,
    seq_len: int | None = None,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    head_dim: int = 8,
    token_weights: bool = False,
    state: bool = True,
    token_alpha: bool = False,
    seed: int = 0,
) -> Problem:
    """A random problem in float64: unit normal tokens and weights of either sign."""
    seq_len = lattice.num_sites if seq_len is None else seq_len
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kv_heads = heads if kv_heads is None else kv_heads
    q, k, v = normal(batch, heads, seq_len, head_dim), *normal(2, batch, kv_heads, seq_len, head_dim)
    weights = normal(*((batch, heads, seq_len) if token_weights else (heads,)), NUM_STREAMS)
    decay = torch.tensor(torus_kernels.DEFAULT_DECAY) + 0.5 * normal(heads, NUM_STREAMS)
    alpha = torch.rand((batch, heads, seq_len) if token_alpha else (heads,), generator=generator, dtype=torch.float64)
    return Problem(
        lattice, q, k, v, weights, decay,
        ema_state=normal(*q.shape) if state else None, ema_alpha=alpha if state else None, d_out=normal(*q.shape),
    )


def evaluate(attention: Callable[..., Tensor], problem: Problem) -> dict[str, Tensor]:
    """``out`` and the gradient of every differentiable argument, as ``d_<argument>``."""
    leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors().items()}
    out = attention(**problem.replace(**leaves).arguments())
    grads = torch.autograd.grad(out, tuple(leaves.values()), problem.d_out)
    return {"out": out.detach(), **{f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def truth(problem: Problem) -> dict[str, Tensor]:
    """The dense operator in float64 on exactly the numbers that the problem holds."""
    return evaluate(dense.attention, problem.to(torch.float64, problem.q.device.type))


def error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0


_ROUNDINGS = 8


def assert_within_budget(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    plain: dict[str, Tensor],
    roundings: float = _ROUNDINGS,
    gain: dict[str, float] | None = None,
) -> None:
    """``err <= 2 * (error of plain PyTorch in the same dtype) + eps``, by the largest error of each tensor.

    ``eps`` is the final rounding to the tensor's dtype, and ``roundings`` at the precision of accumulation, those
    relative to the largest result of all times ``gain``. It is there because plain PyTorch may be right by luck in
    a small tensor, or exact where a gradient is zero.
    """
    assert actual.keys() == expected.keys()
    largest = max((x.abs().max().item() for x in expected.values() if x.numel()), default=0.0)
    accumulation = roundings * torch.finfo(parameter_dtype(actual["out"].dtype)).eps * largest
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        assert value.dtype == plain[name].dtype, name
        assert not value.isnan().any(), f"{name} has NaN"
        if value.numel():
            rounding = torch.finfo(value.dtype).eps * expected[name].abs().max().item()
            budget = 2 * error(plain[name], expected[name]) + rounding + accumulation * (gain or {}).get(name, 1.0)
            assert error(value, expected[name]) <= budget, (
                f"{name}: error {error(value, expected[name]):.3e} exceeds its budget {budget:.3e}"
            )


def score_roundings(problem: Problem) -> float:
    """``roundings`` of a problem: a score rounded in its last place changes the softmax weight by as much as the score
    is large."""
    q, k = problem.q.detach().double(), problem.k.detach().double()
    scale = q.shape[-1] ** -0.5 if problem.scale is None else abs(problem.scale)
    return _ROUNDINGS + scale * (q.unflatten(1, (k.shape[1], -1)) @ k.mT[:, :, None]).abs().max().item()


def _gain_of_sums(problem: Problem, expected: dict[str, Tensor], roundings: float) -> dict[str, float]:
    """For problems so small that plain PyTorch is often right by luck: gradients that are sums of terms larger than
    themselves. d_decay sums rho^2 / 2 dS; every product in d_alpha is rounded once more when it is added."""
    gain = {"d_decay": math.pi**2 / 2}
    largest = max((x.abs().max().item() for x in expected.values() if x.numel()), default=0.0)
    if problem.ema_state is not None and largest > 0:
        products = (problem.d_out * problem.ema_state).detach().abs().sum((2, 3)).max().item()
        gain["d_ema_alpha"] = max(1.0, products / (roundings * largest))
    return gain


def check_precision(
    backend: Backend,
    problem: Problem,
    dtype: torch.dtype,
    expected: dict[str, Tensor] | None = None,
    *,
    sums_cancel: bool = False,
) -> None:
    """The output and all gradients of a problem, cast to ``dtype``, keep to the error budget.

    They are held against ``expected`` or, without it, the dense operator in float64.
    """
    problem = problem.to(dtype, backend.device)
    expected = truth(problem) if expected is None else expected
    scale = problem.q.shape[-1] ** -0.5 if problem.scale is None else abs(problem.scale)
    # dq = scale dS k, and dS = P (dP - delta) is a difference of numbers as large as the other results.
    gain = {f"d_{name}": max(1.0, scale * x.detach().abs().max().item())
            for name, x in (("q", problem.k), ("k", problem.q))}
    roundings = score_roundings(problem)
    if sums_cancel:
        gain |= _gain_of_sums(problem, expected, roundings)
    plain = evaluate(dense.attention, problem)
    assert_within_budget(evaluate(backend.attention, problem), expected, plain, roundings, gain)


def assert_same_up_to_rounding(actual: Tensor, expected: Tensor, what: str = "result", ulps: int = 256) -> None:
    """Two evaluations of the same numbers in a different order."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    allowed = ulps * torch.finfo(actual.dtype).eps * expected.abs().max().item()
    assert error(actual, expected) <= allowed, f"{what}: differs by {error(actual, expected):.3e} > {allowed:.3e}"


def transposed(x: Tensor) -> Tensor:
    """The same values with the second and third dimension swapped in memory, as projections leave them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(x: Tensor) -> Tensor:
    """The same values as a window of a larger tensor full of NaN, so that a read past the window shows."""
    room = torch.full([n + 3 for n in x.shape], torch.nan, dtype=x.dtype, device=x.device)
    window = room[tuple(slice(1, 1 + n) for n in x.shape)]
    return window.copy_(x)


def gapped(x: Tensor) -> Tensor:
    """The same values with a last dimension that is not contiguous."""
    room = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype, device=x.device)
    return room[..., 0].copy_(x)


def unaligned(x: Tensor) -> Tensor:
    """The same values, contiguous, one element off the allocator's alignment."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(), "transposed": transposed, "sliced": sliced, "gapped": gapped,
    "unaligned": unaligned,
}


def label(value: object) -> str | None:
    """Names of lattices, dtypes and streams in the names of tests."""
    if isinstance(value, TorusLattice):
        return f"{value.topology}-{value.n_major}x{value.n_minor}-w{value.winding}"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Stream):
        return value.name
    if isinstance(value, (range, list, tuple)):
        return "-".join(str(int(x)) if isinstance(x, Stream) else str(x) for x in value)
    return None
