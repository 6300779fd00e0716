"""NaN and infinity, poisoned memory, repeatability, and independence of the number of threads."""

import contextlib

import dense
import pytest
import torch
from support import PARAMETERS, Problem, evaluate, label, make_problem

from torus_kernels import TorusLattice, ema_compound, ema_compound_multiscale, lattice_rope

PLACES = [(TorusLattice(6, 8, winding=4, cross_radius=(1, 3)), 48),
          (TorusLattice(5, 6, "causal", winding=2, cross_radius=(1, 3)), 75),
          (TorusLattice(5, 6, "cylinder", winding=2, cross_radius=(1, 3)), 30)]
LARGER = [(TorusLattice(24, 16, winding=2), 384), (TorusLattice(20, 12, "causal"), 400),
          (TorusLattice(17, 16, "cylinder", winding=3), 272)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def problem_on(backend, lattice, seq_len, dtype=None, **options) -> Problem:
    backend.require(lattice)
    dtype = backend.exact_dtype if dtype is None else dtype
    if dtype not in backend.dtypes:
        pytest.skip(f"{dtype} is not for {backend.name}")
    return make_problem(lattice, seq_len, **options).to(dtype, backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize(
    "lattice, seq_len",
    [*PLACES, (TorusLattice(8, 16, "cylinder"), 128),
     (TorusLattice(9, 12, "cylinder", winding=4, cross_radius=(2, 5)), 108),
     (TorusLattice(9, 12, "causal", winding=4, cross_radius=(3, 5)), 108),
     (TorusLattice(128, 2, "causal", streams=("spiral_cw", "spiral_ccw")), 384)],
    ids=label,
)
def test_poison_never_reaches_another_head(backend, lattice, seq_len, dtype):
    """Whatever lies in memory before and behind a head's own keys."""
    problem = problem_on(backend, lattice, seq_len, dtype, batch=1, heads=3, kv_heads=3)
    poisoned = problem.replace(k=problem.k.clone(), v=problem.v.clone())
    for tokens in (poisoned.k, poisoned.v):
        tokens[:, [0, 2]] = float("nan")
    found, expected = evaluate(backend.attention, poisoned), evaluate(backend.attention, problem)
    for name in ("out", "d_q", "d_k", "d_v"):
        assert torch.equal(found[name][:, 1], expected[name][:, 1]), name


def rows_that_see(lattice, seq_len: int, key: int) -> torch.Tensor:
    return torch.stack([dense.geometry(lattice, s, seq_len)[0][:, key] for s in range(8)]).any(dim=0)


def keys_seen_by(lattice, seq_len: int, query: int) -> torch.Tensor:
    return torch.stack([dense.geometry(lattice, s, seq_len)[0][query] for s in range(8)]).any(dim=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("lattice, seq_len", PLACES, ids=label)
def test_poison_in_a_key_shows_in_every_row_that_sees_it(backend, lattice, seq_len, name, poison, dtype):
    problem = problem_on(backend, lattice, seq_len, dtype, batch=2, heads=4, kv_heads=2, state=False)
    # With queries and poison of one sign an infinite key scores +inf, which no softmax can hide.
    sign = -1.0 if poison < 0 else 1.0
    problem = problem.replace(q=sign * problem.q.abs())
    clean, clean_stats = backend.attention_with_stats(**problem.arguments())
    key = seq_len // 2
    poisoned = getattr(problem, name).clone()
    poisoned[1, 0, key, 3] = poison
    out, stats = backend.attention_with_stats(**problem.replace(**{name: poisoned}).arguments())
    seen = rows_that_see(lattice, seq_len, key).to(out.device)
    lost = out[1, :2, seen].isfinite()
    if name == "v":
        lost = lost[..., 3]
    assert not lost.any()
    if name == "k":
        assert not stats.lse[1, :2, seen].isfinite().all(dim=-1).any()
    for b, heads in ((0, slice(None)), (1, slice(2, 4))):
        assert torch.equal(out[b, heads], clean[b, heads])
        assert torch.equal(stats.lse[b, heads], clean_stats.lse[b, heads])
        assert torch.equal(stats.entropy[b, heads], clean_stats.entropy[b, heads])


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("name", ["q", "ema_state", "stream_weights", "ema_alpha"])
@pytest.mark.parametrize("lattice, seq_len", PLACES, ids=label)
def test_poison_in_a_row_shows_there(backend, lattice, seq_len, name, dtype):
    problem = problem_on(backend, lattice, seq_len, dtype, batch=2, heads=4, kv_heads=2, token_weights=True,
                         token_alpha=True)
    clean = backend.attention(**problem.arguments())
    poisoned = getattr(problem, name).clone()
    poisoned[1, 0, 11] = torch.nan
    out = backend.attention(**problem.replace(**{name: poisoned}).arguments())
    assert out[1, 0, 11].isnan().all()
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, 2:], clean[1, 2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "d_out"])
@pytest.mark.parametrize("lattice, seq_len", PLACES, ids=label)
def test_poison_in_backward_shows_and_stays_in_its_group(backend, lattice, seq_len, poisoned, dtype):
    problem = problem_on(backend, lattice, seq_len, dtype, batch=2, heads=4, kv_heads=2, token_weights=True,
                         token_alpha=True)
    clean = evaluate(backend.attention, problem)
    token = seq_len // 2
    x = getattr(problem, poisoned).clone()
    x[1, 0, token, 5] = torch.nan
    grads = evaluate(backend.attention, problem.replace(**{poisoned: x}))
    seen = rows_that_see(lattice, seq_len, token).to(x.device)
    if poisoned in ("k", "v"):
        assert not grads["d_q"][1, :2, seen].isfinite().all(dim=-1).any()
    else:
        assert not grads["d_q"][1, 0, token].isfinite().all()
        keys = keys_seen_by(lattice, seq_len, token).to(x.device)
        assert not grads["d_k"][1, 0, keys].isfinite().all(dim=-1).any()
    for name, value in grads.items():
        if value.dim() < 3:  # decay, shared by the whole batch
            assert value[:2].isnan().any()
            assert torch.equal(value[2:], clean[name][2:])
            continue
        group = 1 if name in ("d_k", "d_v") else 2
        assert torch.equal(value[0], clean[name][0]), name
        assert torch.equal(value[1, group:], clean[name][1, group:]), name


@contextlib.contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def poisoned_memory():
    """`torch.empty` filled with NaN, or the largest integer."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(5).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic)


def everything(backend, problem: Problem) -> dict[str, torch.Tensor]:
    """Results of every operator, gradients included, on one problem."""
    results = evaluate(backend.attention, problem)
    _, stats = backend.attention_with_stats(**problem.arguments())
    results |= {"lse": stats.lse, "entropy": stats.entropy}
    q = problem.q.detach().requires_grad_()
    gate = torch.linspace(0.1, 0.9, q.shape[1], device=q.device, dtype=problem.decay.dtype).requires_grad_()
    with backend.chosen():
        turned = lattice_rope(q, problem.lattice)
        pushed, velocity = ema_compound(q, turned, gate, beta=gate, velocity=q.to(gate.dtype))
        mixed, states = ema_compound_multiscale(q, torch.stack([turned, q]), gate.expand(2, -1), gate[:1].expand(2))
        total = sum(x.double().square().sum() for x in (pushed, velocity, mixed, states))
        grads = torch.autograd.grad(total, (q, gate))
    outputs = {"turned": turned, "pushed": pushed, "velocity": velocity, "mixed": mixed, "states": states}
    return results | {name: x.detach() for name, x in outputs.items()} | {"d_q_rest": grads[0], "d_gate": grads[1]}


def assert_identical(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("token_gates", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("lattice, seq_len", [*PLACES, (TorusLattice(20, 12, "causal"), 270)], ids=label)
def test_uninitialised_memory_does_not_matter(backend, lattice, seq_len, dtype, token_gates):
    problem = problem_on(backend, lattice, seq_len, dtype, batch=2, heads=4, kv_heads=2, head_dim=24,
                         token_weights=token_gates, token_alpha=token_gates)
    expected = everything(backend, problem)
    with poisoned_memory():
        assert_identical(everything(backend, problem), expected)
    partial = TorusLattice(lattice.n_major, lattice.n_minor, lattice.topology, lattice.winding, lattice.cross_radius,
                           streams=[1, 4, 7])
    problem = problem.replace(lattice=partial)
    expected = everything(backend, problem)
    with poisoned_memory():
        assert_identical(everything(backend, problem), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("lattice, seq_len", LARGER, ids=label)
def test_runs_repeat_bit_for_bit(backend, lattice, seq_len, dtype):
    problem = problem_on(backend, lattice, seq_len, dtype, batch=2, heads=4, kv_heads=2, head_dim=32)
    with threads(2):
        first = everything(backend, problem)
        for _ in range(1 if backend.name == "reference" else 4):
            assert_identical(everything(backend, problem), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("batch, heads, kv_heads", [(1, 1, 1), (2, 3, 1), (3, 4, 2)])
@pytest.mark.parametrize("lattice, seq_len", LARGER, ids=label)
def test_number_of_threads_does_not_matter(kernel_backend, lattice, seq_len, batch, heads, kv_heads, dtype):
    problem = problem_on(kernel_backend, lattice, seq_len, dtype, batch=batch, heads=heads, kv_heads=kv_heads,
                         head_dim=16)
    with threads(1):
        expected = everything(kernel_backend, problem)
    for number in (2, 3, 7):
        with threads(number):
            assert_identical(everything(kernel_backend, problem), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("lattice, seq_len", [(TorusLattice(16, 16), None), (TorusLattice(12, 40, "causal"), 500),
                                              (TorusLattice(9, 20, "cylinder"), None)], ids=label)
def test_threads_keep_to_their_own_scratch(kernel_backend, lattice, seq_len, dtype):
    """Every head dimension has another size of scratch: room that is short shows where a neighbour's begins."""
    for head_dim in range(8, 136, 8):
        problem = problem_on(kernel_backend, lattice, seq_len, dtype, heads=8, head_dim=head_dim)
        with threads(1):
            expected = evaluate(kernel_backend.attention, problem)
        with threads(2):
            for _ in range(2):
                assert_identical(evaluate(kernel_backend.attention, problem), expected)


def test_inputs_are_left_alone(backend):
    problem = problem_on(backend, *PLACES[1], batch=2, token_weights=True, token_alpha=True)
    problem = problem.replace(first_key=torch.zeros(2, 75, dtype=torch.int32, device=backend.device))
    before = {name: x.clone() for name, x in problem.arguments().items() if isinstance(x, torch.Tensor)}
    d_out = problem.d_out.clone()
    everything(backend, problem)
    assert_identical({name: getattr(problem, name) for name in before}, before)
    assert torch.equal(problem.d_out, d_out)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_extreme_but_finite_values(backend, size):
    """Values near the ends of float32 in v, state and gradient pass through without overflow in between."""
    problem = problem_on(backend, *PLACES[1], torch.float32)
    scaled = {name: size * getattr(problem, name) for name in ("v", "ema_state")}
    out = backend.attention(**problem.replace(**scaled).arguments())
    expected = backend.attention(**problem.arguments())
    assert (out / size - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_parameters_of_one_head_do_not_reach_another(backend):
    problem = problem_on(backend, *PLACES[1], heads=4, kv_heads=2)
    clean = backend.attention(**problem.arguments())
    for name in PARAMETERS:
        x = getattr(problem, name).clone()
        x[2] = torch.nan
        out = backend.attention(**problem.replace(**{name: x}).arguments())
        assert out[:, 2].isnan().all(), name
        assert torch.equal(out[:, [0, 1, 3]], clean[:, [0, 1, 3]]), name
