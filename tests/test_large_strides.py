"""Offsets beyond 2**31 elements, in views of reserved addresses: memory is taken only where something is written.

A stride that fits 32 bits does not make its product with an index fit; both kinds are here.
"""

import contextlib
import mmap
from collections.abc import Callable

import decoding
import pytest
import torch
from support import Problem, evaluate, label, make_problem
from test_robustness import assert_identical, everything

from torus_kernels import TorusLattice, backends, torus_attention
from torus_kernels.ops.decode import decode_op

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 lacks the name; this is Linux's number
BYTES = 2**38  # of addresses, of which a few hundred pages are ever touched
PLACES = [(TorusLattice(4, 6, winding=3, cross_radius=(1, 2)), 24), (TorusLattice(3, 5, "causal"), 28),
          (TorusLattice(4, 5, "cylinder"), 20)]
# Of [B, H, T, D] = [2, 4, T, 8], in elements; T is at least 20.
STRIDES = {
    "batch": (2**31 + 2**12, 2**10, 8, 1),
    "head": (2**11, 2**30, 8, 1),  # fits 32 bits, three times it does not
    "token": (2**9, 2**10, 2**31 + 2**12, 1),
    "tokens": (2**9, 2**10, 2**27, 1),  # fits, 19 times it does not
}
DTYPES = [torch.float32, torch.bfloat16]


def far(x: torch.Tensor, strides: str) -> torch.Tensor:
    """The values of a tensor in a view of these strides."""
    try:
        room = mmap.mmap(-1, BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        pytest.skip(f"no addresses without memory here: {error}")
    with contextlib.suppress(OSError):  # kernels without huge pages do not know the advice
        room.madvise(mmap.MADV_NOHUGEPAGE)
    view = torch.frombuffer(room, dtype=x.dtype).as_strided(x.shape, STRIDES[strides]).copy_(x)
    assert sum((n - 1) * step for n, step in zip(x.shape, view.stride(), strict=True)) > 2**31
    return view


def problem_on(backend, lattice: TorusLattice, seq_len: int, dtype: torch.dtype) -> Problem:
    if dtype not in backend.dtypes or backend.device != "cpu":
        pytest.skip(f"{dtype} at the host's addresses is not for {backend.name}")
    backend.require(lattice)
    return make_problem(lattice, seq_len, batch=2, heads=4, token_weights=True, token_alpha=True).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("lattice, seq_len", PLACES, ids=label)
def test_inputs(kernel_backend, lattice, seq_len, strides, dtype):
    problem = problem_on(kernel_backend, lattice, seq_len, dtype)
    spread = {name: far(getattr(problem, name), strides) for name in ("q", "k", "v", "ema_state", "d_out")}
    assert_identical(everything(kernel_backend, problem.replace(**spread)), everything(kernel_backend, problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("lattice, seq_len", PLACES, ids=label)
def test_outputs(kernel_backend, lattice, seq_len, strides, dtype):
    """Outputs are the library's own and packed; the kernels write them by their strides all the same."""
    p, kernels = problem_on(kernel_backend, lattice, seq_len, dtype), backends.load(kernel_backend.name)
    operands = (p.stream_weights, p.decay, p.ema_state, p.ema_alpha, None, lattice, 0.3)
    rows = p.q.new_empty(*p.q.shape[:3], 8, dtype=p.decay.dtype)

    def run(new: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        out, lse, entropy = new(p.q), rows.clone(), rows.clone()
        kernels.attention_forward(p.q, p.k, p.v, *operands, out, lse, entropy)
        grads = [new(x) if x.dim() == 4 and x.shape[-1] == p.q.shape[-1] and name in tokens else torch.empty_like(x)
                 for name, x in p.tensors().items()]
        kernels.attention_backward(p.d_out, p.q, p.k, p.v, lse, *operands, *grads)
        return {"out": out, "lse": lse, "entropy": entropy, **dict(zip(p.tensors(), grads, strict=True))}

    tokens = ("q", "k", "v", "ema_state")
    assert_identical(run(lambda x: far(torch.zeros_like(x), strides)), run(torch.empty_like))


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("strides", STRIDES)
def test_cache(kernel_backend, strides, dtype):
    """Rings of 30 slots beyond 2**31 elements, at lengths beyond 2**31 positions."""
    lattice = TorusLattice(5, 6, "causal", winding=2)
    problem = problem_on(kernel_backend, lattice, 30, dtype)
    q = problem.q[:, :, -1:].contiguous()
    options = decoding.options(problem, 29) | {"first_key": None}

    def decode(keys: torch.Tensor, values: torch.Tensor, length: int, first_key: int) -> torch.Tensor:
        first = torch.full((2, 1), first_key)
        return decode_op(q, keys, values, options["stream_weights"], options["decay"], options["ema_state"],
                         options["ema_alpha"], first, lattice.spec, 0.3, length, kernel_backend.name)

    expected = decode(problem.k, problem.v, 60 + 11, 60)
    for turns in (2**31, 2**40, 2**56):
        actual = decode(far(problem.k, strides), far(problem.v, strides), turns * 30 + 11, turns * 30)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(2**20, 2**6, 24, 64), (3, 1, 2**40, 256), (1, 2**33, 24, 8)])
def test_shapes_without_memory(shape):
    batch, heads, seq_len, head_dim = shape
    lattice = TorusLattice(4, 6, "causal")
    q = torch.empty(batch, seq_len, heads, head_dim, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    k = torch.empty(batch, heads, seq_len, head_dim, device="meta", dtype=torch.bfloat16)
    assert torus_attention(q, k, k, lattice).shape == shape
    leaves = [x.requires_grad_() for x in (q, k)]
    d_q, d_k = torch.autograd.grad(torus_attention(q, k, k, lattice).sum(), leaves)
    assert (d_q.shape, d_k.shape) == (shape, shape)
    with pytest.raises(ValueError, match="v must have shape"):
        torus_attention(q, k, k[:, :, 1:], lattice)


@pytest.mark.parametrize("size", [2**31, 2**31 + 1, 2**32, 2**40])
def test_expanded_tensors_of_a_wrong_size_are_refused(backend, size):
    """One number of memory, as many as one likes of tokens: refused by its shape, before anything is allocated."""
    one = torch.zeros((), device=backend.device)
    lattice = TorusLattice(4, 6, winding=3)
    right = one.expand(1, 1, 24, 8)
    for shape in ((size, 1, 24, 8), (1, size, 24, 8), (1, 1, size, 8), (1, 1, 24, size)):
        wrong = one.expand(shape)
        with pytest.raises(ValueError, match=r"^v must have shape"):
            backend.attention(right, right, wrong, lattice)
    with pytest.raises(ValueError, match=r"^q has sequence length"):
        backend.attention(*[one.expand(1, 1, size, 8)] * 3, lattice)
    with pytest.raises(ValueError, match=r"^q must have a head dimension"):
        backend.attention(*[one.expand(1, 1, 24, size)] * 3, lattice)


def test_expanded_batch(kernel_backend):
    """Strides of zero: one problem, repeated, is one problem in every batch element and head."""
    problem = make_problem(*PLACES[1], heads=1).to(kernel_backend.exact_dtype, kernel_backend.device)
    expected = evaluate(kernel_backend.attention, problem)
    repeated = {name: x.expand(3, 5, -1, -1) for name, x in problem.tensors().items() if x.dim() == 4}
    shared = {name: x.expand(5, *x.shape[1:]) for name, x in problem.tensors().items() if x.dim() < 3}
    problem = problem.replace(**repeated, **shared, d_out=problem.d_out.expand(3, 5, -1, -1))
    actual = evaluate(kernel_backend.attention, problem)
    for name in ("out", "d_q", "d_k", "d_v", "d_ema_state"):
        assert torch.equal(actual[name], expected[name].expand(3, 5, -1, -1)), name
