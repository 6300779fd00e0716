"""`torch.compile(fullgraph=True)` of every public operator, forward and backward."""

import shutil
import sys

import pytest
import torch
from recompiling import compiled_at_most, compiled_once, mark_dynamic
from support import assert_same_up_to_rounding, make_problem
from torch._dynamo.testing import CompileCounterWithBackend

from torus_kernels import TorusLattice, ema_compound, ema_compound_multiscale, lattice_rope

LATTICE = TorusLattice(3, 4, "causal", winding=2)
_COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(backend, lattice):
    """A function that uses every public operator, with what a model does between them."""

    def forward(q, k, v, weights, decay, state, alpha, beta, velocity, states, alphas, scale_weights):
        q, k = lattice_rope(q, lattice), lattice_rope(k * 1.5, lattice)
        out = backend.attention(q, k, v, lattice, stream_weights=weights.softmax(dim=-1), decay=decay.exp(),
                                ema_state=state, ema_alpha=alpha.sigmoid())
        again, stats = backend.attention_with_stats(q, k, v, lattice)
        compounded = ema_compound(out, again, alpha)
        pushed, velocity = ema_compound(compounded, state, alpha, beta=beta, velocity=velocity)
        mixed, states = ema_compound_multiscale(pushed, states, alphas, scale_weights)
        return mixed + states.sum(dim=0), velocity, stats.lse, stats.entropy

    return forward


def arguments(backend, lattice, seq_len: int, dtype: torch.dtype) -> list[torch.Tensor]:
    problem = make_problem(lattice, seq_len, batch=2, heads=4, kv_heads=2).to(dtype, backend.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(backend.device, dtype)

    tensors = [
        problem.q, problem.k, problem.v, problem.stream_weights, problem.decay, problem.ema_state, problem.ema_alpha,
        normal(4), normal(*problem.q.shape), normal(3, *problem.q.shape, dtype=dtype), normal(3, 4), normal(3),
    ]
    return [x.detach().requires_grad_() for x in tensors]


def run(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs = function(*tensors)
    grads = torch.autograd.grad(sum(x.float().square().sum() for x in outputs[:2]), tensors)
    return [x.detach() for x in (*outputs, *grads)]


def check(backend, lattice, seq_len, dtype, compiler) -> None:
    function, tensors = layer(backend, lattice), arguments(backend, lattice, seq_len, dtype)
    with backend.chosen():
        eager = run(function, tensors)
        compiled = run(torch.compile(function, fullgraph=True, backend=compiler), tensors)
    for i, (actual, expected) in enumerate(zip(compiled, eager, strict=True)):
        assert_same_up_to_rounding(actual, expected, f"result {i}", ulps=16 if dtype == torch.bfloat16 else 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lattice, seq_len", [(LATTICE, 17), (TorusLattice(4, 4), 16)], ids=["causal", "periodic"])
def test_traces_whole_and_matches_eager(backend, lattice, seq_len, dtype):
    check(backend, lattice, seq_len, dtype, "aot_eager")


@pytest.mark.skipif(_COMPILER is None, reason="no C++ compiler for torch.compile's default backend")
@pytest.mark.skipif(sys.platform == "win32", reason="needs a Unix toolchain")
def test_default_compiler(backend):
    check(backend, LATTICE, 17, torch.float32, "inductor")


def test_growing_rope_offset_does_not_recompile(backend):
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda x, offset: lattice_rope(x, LATTICE, offset=offset), fullgraph=True,
                             backend=counter)
    x = torch.randn(2, 3, 5, 8, device=backend.device)
    with backend.chosen():
        for offset in range(20):
            assert torch.equal(function(x, offset), lattice_rope(x, LATTICE, offset=offset)), offset
    assert counter.frame_count <= 4  # 0 and 1 are compiled as constants


def test_optional_first_key(backend):
    problem = make_problem(LATTICE, 17, batch=2).to(torch.float32, backend.device)
    first_key = torch.arange(17, device=backend.device).expand(2, 17) // 5 * 5
    function = torch.compile(lambda q, first_key: backend.attention(q, problem.k, problem.v, LATTICE,
                                                                    first_key=first_key),
                             fullgraph=True, backend="aot_eager")
    for key in (None, first_key, first_key.int()):
        expected = backend.attention(problem.q, problem.k, problem.v, LATTICE, first_key=key)
        assert torch.equal(function(problem.q, key), expected)


def test_autocast_is_traced(backend):
    problem = make_problem(LATTICE, 17).to(torch.float32, backend.device)

    def function(q):
        with torch.autocast(backend.device, dtype=backend.low_dtype):
            return backend.attention(**problem.replace(q=q).arguments())

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(problem.q)
    assert compiled.dtype == backend.low_dtype
    assert torch.equal(compiled, function(problem.q))


def test_user_errors_come_through(backend):
    q = torch.zeros(1, 1, 5, 8, device=backend.device)
    function = torch.compile(lambda q: backend.attention(q, q, q, TorusLattice(3, 3)), backend="aot_eager")
    with pytest.raises(Exception, match="q has sequence length 5"):
        function(q)


def gradients_of(function, problem) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v, problem.ema_state)]
    for leaf in leaves:  # detached tensors are marked anew
        for dim in getattr(problem.q, "_dynamo_dynamic_indices", ()):
            mark_dynamic(leaf, dim)
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def attention_with_rope(backend, lattice, parameters):
    """All differentiable operators on tokens of any batch size."""

    def function(q, k, v, state):
        q, k = lattice_rope(q, lattice), lattice_rope(k, lattice)
        out = backend.attention(q, k, v, lattice, stream_weights=parameters.stream_weights, decay=parameters.decay,
                                ema_state=state, ema_alpha=parameters.ema_alpha)
        return ema_compound(out, state, parameters.ema_alpha)

    return function


def problem_for(backend, lattice, batch: int, seq_len: int):
    return make_problem(lattice, seq_len, batch=batch, heads=4, kv_heads=2).to(torch.float32, backend.device)


@pytest.mark.parametrize("lattice, seq_len", [(LATTICE, 17), (TorusLattice(4, 4), 16)], ids=["causal", "periodic"])
def test_every_batch_size_shares_one_graph(backend, lattice, seq_len):
    function = attention_with_rope(backend, lattice, problem_for(backend, lattice, 1, seq_len))
    with backend.chosen(), compiled_once(function) as compiled:
        for batch in (2, 3, 4, 8, 17):  # as many examples as heads, as the stream weights' last dimension, as tokens
            problem = problem_for(backend, lattice, batch, seq_len)
            expected = gradients_of(function, problem)
            mark_dynamic(problem.q, 0)
            for actual, wanted in zip(gradients_of(compiled, problem), expected, strict=True):
                assert_same_up_to_rounding(actual, wanted, f"batch {batch}", ulps=1024)


def test_every_length_shares_one_graph(backend):
    function = attention_with_rope(backend, LATTICE, problem_for(backend, LATTICE, 1, 17))
    with backend.chosen(), compiled_once(function) as compiled:
        for seq_len in (3, 2, 4, 8, 12, 13, 40):
            problem = problem_for(backend, LATTICE, 2, seq_len)
            expected = gradients_of(function, problem)
            mark_dynamic(problem.q, 2)
            for actual, wanted in zip(gradients_of(compiled, problem), expected, strict=True):
                assert_same_up_to_rounding(actual, wanted, f"length {seq_len}", ulps=1024)


def test_sizes_that_change_unannounced_take_two_graphs(backend):
    """The first graph is for the first size, the second for all others, as PyTorch does by default."""
    function = attention_with_rope(backend, LATTICE, problem_for(backend, LATTICE, 1, 17))
    with backend.chosen(), compiled_at_most(2, function) as compiled:
        for batch, seq_len in ((2, 17), (3, 18), (4, 4), (5, 8), (8, 40), (12, 12)):
            gradients_of(compiled, problem_for(backend, LATTICE, batch, seq_len))
