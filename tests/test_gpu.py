"""What only a GPU can show: large lattices and offsets, repeatability, graphs, streams, devices and peak memory."""

import pytest
import torch
from conftest import require_backend
from support import (
    PARAMETERS,
    Problem,
    assert_same_up_to_rounding,
    check_precision,
    error,
    evaluate,
    label,
    make_problem,
)

from torus_kernels import Stream, TorusLattice, ema_compound, lattice_rope

pytestmark = pytest.mark.gpu

GIB = 2**30
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=label)


@pytest.fixture(scope="module", params=["triton", "cuda"])
def backend(request):
    """Every backend that runs on a GPU."""
    found = require_backend(request.param)
    if found.device != "cuda":
        pytest.skip(f"backend {found.name} is interpreted on the CPU")
    return found


def need_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of device memory, {free:.0f} GiB are free")


def random_problem(
    lattice: TorusLattice, seq_len: int | None, dtype: torch.dtype, *, batch: int = 1, heads: int = 8,
    kv_heads: int | None = None, head_dim: int = 64, device: str = "cuda", seed: int = 0,
) -> Problem:
    """`make_problem` for sizes at which float64 on the host takes too long."""
    generator = torch.Generator(device).manual_seed(seed)
    seq_len = lattice.num_sites if seq_len is None else seq_len

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    kv_heads = heads if kv_heads is None else kv_heads
    shape = (batch, heads, seq_len, head_dim)
    k, v = (normal(batch, kv_heads, seq_len, head_dim) for _ in range(2))
    return Problem(
        lattice, normal(*shape), k, v, normal(heads, 8, dtype=torch.float32),
        normal(heads, 8, dtype=torch.float32), normal(*shape),
        torch.rand(heads, generator=generator, device=device), d_out=normal(*shape),
    )


SMALL = [(TorusLattice(48, 40, winding=5), None), (TorusLattice(33, 55, winding=5, cross_radius=(7, 2)), None),
         (TorusLattice(40, 32, "causal"), 1500), (TorusLattice(17, 90, "causal", winding=2), 2000),
         (TorusLattice(24, 50, "cylinder", winding=3), None)]


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128, 200])
@pytest.mark.parametrize("lattice, seq_len", SMALL, ids=label)
def test_error_budget(backend, lattice, seq_len, head_dim, dtype):
    backend.require(lattice)
    check_precision(backend, make_problem(lattice, seq_len, batch=2, heads=4, kv_heads=2, head_dim=head_dim), dtype)


def rows_by_definition(problem: Problem, rows: list[int]) -> torch.Tensor:
    """Rows of the operator's output in float64, ``[B, H, rows, D]``, from the geometry of those rows alone."""
    lattice, device = problem.lattice, problem.q.device
    wide = problem.to(torch.float64, device)
    heads, seq_len = problem.q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (wide.k, wide.v))
    tokens, query = torch.arange(seq_len, device=device), torch.tensor(rows, device=device)[:, None]
    scores = wide.q[:, :, rows] @ k.mT * problem.q.shape[-1] ** -0.5
    y = 0
    for stream in Stream:
        if lattice.is_causal:
            visible, rho_squared = lattice.lag_geometry(stream, query - tokens)
        else:
            a = query // lattice.n_minor - tokens // lattice.n_minor
            b = query % lattice.n_minor - tokens % lattice.n_minor
            visible, rho_squared = lattice.displacement_geometry(stream, a, b)
        bias = -0.5 * wide.decay[:, stream, None, None] * rho_squared
        probs = (scores + bias).masked_fill(~visible, -torch.inf).softmax(dim=-1)
        y = y + wide.stream_weights[:, stream, None, None] * (probs @ v)
    return torch.lerp(wide.ema_state[:, :, rows], y, wide.ema_alpha[:, None, None])


@DTYPES
@pytest.mark.parametrize("lattice, head_dim", [
    (TorusLattice(128, 128), 64), (TorusLattice(256, 256), 64), (TorusLattice(128, 256, "causal"), 128),
    (TorusLattice(90, 180, winding=2), 64), (TorusLattice(300, 200, "causal", winding=3), 96),
    (TorusLattice(512, 64, winding=1), 64)], ids=label)
def test_rows_of_large_lattices(backend, lattice, head_dim, dtype):
    problem = random_problem(lattice, None, dtype, heads=2, head_dim=head_dim)
    n = lattice.num_sites
    rows = sorted({0, 1, lattice.n_minor - 1, lattice.n_minor, n // 3, n // 2, n - lattice.n_minor, n - 2, n - 1})
    expected = rows_by_definition(problem, rows)
    actual = backend.attention(**problem.arguments())[:, :, rows]
    # Rounded products of probabilities and values dominate, and then the result itself.
    allowed = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    assert error(actual, expected) <= allowed


class TestLargeOffsets:
    """Tensors of more than 2**31 elements: their far end is what a small problem gives."""

    LATTICE = TorusLattice(8, 8, "causal")

    def test_long_sequence(self, backend):
        need_memory(100)
        head_dim, tail = 64, 500
        seq_len = 2**31 // head_dim + 1000
        problem = random_problem(self.LATTICE, seq_len, torch.bfloat16, heads=1, head_dim=head_dim)
        problem.d_out[:, :, :-tail] = 0
        reach = tail + self.LATTICE.num_sites  # rows of the tail see no further

        def last(x: torch.Tensor) -> torch.Tensor:
            return x[:, :, -reach:].clone()

        tokens = {name: last(getattr(problem, name)) for name in ("q", "k", "v", "ema_state", "d_out")}
        expected = evaluate(backend.attention, problem.replace(**tokens))
        actual = evaluate(backend.attention, problem)
        assert_same_up_to_rounding(actual["out"][:, :, -tail:], expected["out"][:, :, -tail:], "out")
        for name in ("d_q", "d_k", "d_v", "d_ema_state"):
            assert_same_up_to_rounding(last(actual[name]), expected[name], name)
            assert not actual[name][:, :, :-reach].any(), name

    def test_many_heads(self, backend):
        need_memory(100)
        lattice, batch, heads = TorusLattice(16, 16), 2050, 64
        problem = random_problem(lattice, None, torch.bfloat16, batch=batch, heads=heads, head_dim=64)
        assert problem.q.numel() > 2**31
        last = {name: getattr(problem, name)[-1:].clone() for name in ("q", "k", "v", "ema_state", "d_out")}
        expected = evaluate(backend.attention, problem.replace(**last))
        actual = evaluate(backend.attention, problem)
        for name in ("out", "d_q", "d_k", "d_v", "d_ema_state"):
            assert_same_up_to_rounding(actual[name][-1:], expected[name], name)

    def test_companions(self, backend):
        need_memory(40)
        x = torch.randn(1, 1, 2**31 // 64 + 1000, 64, device="cuda", dtype=torch.bfloat16)
        alpha, tail = torch.full((1,), 0.3, device="cuda"), 100
        with backend.chosen():
            turned = lattice_rope(x, self.LATTICE)[:, :, -tail:].clone()
            offset = x.shape[2] - tail
            assert torch.equal(turned, lattice_rope(x[:, :, -tail:].clone(), self.LATTICE, offset=offset))
            mixed = ema_compound(x, x.flip(-1), alpha)[:, :, -tail:].clone()
            assert torch.equal(mixed, ema_compound(x[:, :, -tail:].clone(), x[:, :, -tail:].flip(-1), alpha))


REPEATED = pytest.mark.parametrize("lattice, heads, head_dim", [
    (TorusLattice(64, 64), 8, 64), (TorusLattice(64, 64, "causal"), 12, 64), (TorusLattice(128, 128), 4, 64),
    (TorusLattice(32, 16), 8, 32)], ids=label)


@DTYPES
@REPEATED
def test_runs_repeat_bit_for_bit(backend, lattice, heads, head_dim, dtype):
    problem = random_problem(lattice, None, dtype, batch=2, heads=heads, kv_heads=heads // 2, head_dim=head_dim)
    first = evaluate(backend.attention, problem)
    for repeat in range(4):
        room = torch.full((2**20 * (repeat + 1),), torch.nan, device="cuda")  # other memory, full of NaN
        del room
        for name, value in evaluate(backend.attention, problem).items():
            assert torch.equal(value, first[name]), name


@DTYPES
@REPEATED
def test_graph_replays_with_new_inputs(backend, lattice, heads, head_dim, dtype):
    problem = random_problem(lattice, None, dtype, heads=heads, head_dim=head_dim)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        evaluate(backend.attention, problem)  # kernels are compiled before capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(backend.attention, problem)
    other = random_problem(lattice, None, dtype, heads=heads, head_dim=head_dim, seed=1)
    for name in (*problem.tensors(), "d_out"):
        getattr(problem, name).copy_(getattr(other, name))
    graph.replay()
    for name, expected in evaluate(backend.attention, other).items():
        assert torch.equal(captured[name], expected), name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("lattice", [TorusLattice(64, 64), TorusLattice(64, 64, "causal")], ids=label)
def test_compiled_whole(backend, lattice, mode):
    torch._dynamo.reset()
    problem = random_problem(lattice, None, torch.bfloat16)

    def step(**arguments):
        out = backend.attention(**arguments | {"q": arguments["q"] * 2})
        return out * 3

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for _ in range(3):  # recorded, then replayed
        actual = {name: x.clone() for name, x in evaluate(compiled, problem).items()}
    for name, expected in evaluate(step, problem).items():
        assert_same_up_to_rounding(actual[name], expected, name, ulps=16)
    torch._dynamo.reset()


def test_a_call_does_not_wait_for_the_device(backend):
    problem = random_problem(TorusLattice(64, 64), None, torch.bfloat16)
    causal = random_problem(TorusLattice(64, 64, "causal"), None, torch.bfloat16, seed=1)
    causal = causal.replace(first_key=torch.zeros(1, 4096, dtype=torch.int32, device="cuda"))
    for each in (problem, causal):
        evaluate(backend.attention, each)
        torch.cuda.set_sync_debug_mode("error")
        try:
            evaluate(backend.attention, each)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_stream_of_the_caller(backend):
    problem = random_problem(TorusLattice(64, 64), None, torch.bfloat16, batch=2)
    expected = evaluate(backend.attention, problem)
    late = problem.replace(q=torch.zeros_like(problem.q))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # kernels on another stream would not wait for what follows
        late.q.copy_(problem.q)
        actual = evaluate(backend.attention, late)
    stream.synchronize()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_device_of_the_tensors(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    problem = random_problem(TorusLattice(32, 32), None, torch.bfloat16)
    expected = evaluate(backend.attention, problem)
    with torch.cuda.device(0):
        actual = evaluate(backend.attention, problem.to(torch.bfloat16, "cuda:1"))
    for name, value in actual.items():
        assert value.device == torch.device("cuda:1"), name
        assert torch.equal(value.cpu(), expected[name].cpu()), name


@pytest.mark.parametrize("lattice, batch, heads, head_dim, dtype", [
    (TorusLattice(128, 128), 2, 8, 64, torch.bfloat16), (TorusLattice(256, 256), 1, 8, 64, torch.bfloat16),
    (TorusLattice(128, 256, "causal"), 1, 16, 128, torch.bfloat16), (TorusLattice(64, 64), 4, 8, 64, torch.float32),
], ids=label)
def test_peak_memory(backend, lattice, batch, heads, head_dim, dtype):
    problem = random_problem(lattice, None, dtype, batch=batch, heads=heads, head_dim=head_dim)
    evaluate(backend.attention, problem)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = evaluate(backend.attention, problem)
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before

    def size(*tensors: torch.Tensor) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    inputs = size(*problem.tensors().values(), problem.d_out)
    lse = 8 * 4 * problem.q[..., 0].numel()
    allowed = 1.25 * (inputs + size(*results.values()) + lse)
    assert inputs + grown <= allowed, f"{(inputs + grown) / allowed * 1.25:.2f} times inputs, outputs and LSE"


def test_parameters_are_reduced_the_same_way_whatever_else_is_wanted(backend):
    problem = random_problem(TorusLattice(64, 64), None, torch.bfloat16, batch=4)
    every = evaluate(backend.attention, problem)
    for name in PARAMETERS:
        leaf = getattr(problem, name).detach().requires_grad_()
        out = backend.attention(**problem.replace(**{name: leaf}).arguments())
        grad, = torch.autograd.grad(out, leaf, problem.d_out)
        assert torch.equal(grad, every[f"d_{name}"]), name
