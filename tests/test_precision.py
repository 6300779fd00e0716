"""The error budget, over shapes chosen to cross whatever tiles, vectors and blocks a backend works in."""

import pytest
import torch
from support import DIFFERENTIABLE, LAYOUTS, check_precision, label, make_problem

from torus_kernels import Stream, TorusLattice

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

WIDE = [
    (TorusLattice(40, 24, winding=3), None),
    (TorusLattice(33, 9, winding=3), None),
    (TorusLattice(2, 128, winding=64), None),
    (TorusLattice(128, 2), None),
    (TorusLattice(68, 17, winding=16, cross_radius=(7, 3)), None),
    (TorusLattice(12, 18, winding=15, cross_radius=(0, 30)), None),
    (TorusLattice(32, 20, "causal"), 700),
    (TorusLattice(19, 33, "causal", winding=32, cross_radius=(5, 2)), 530),
    (TorusLattice(3, 70, "causal", winding=2), 450),
    (TorusLattice(70, 3, "causal"), 450),
    (TorusLattice(16, 16, "causal", cross_radius=(0, 0)), 255),
    (TorusLattice(64, 64, "causal", winding=1), 300),
    (TorusLattice(24, 17, "cylinder", winding=5), None),
    (TorusLattice(2, 65, "cylinder", winding=64, cross_radius=(40, 1)), None),
]


def require(backend, lattice, dtype) -> None:
    backend.require(lattice)
    if dtype not in backend.dtypes:
        pytest.skip(f"{dtype} is not for {backend.name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("lattice, seq_len", WIDE, ids=label)
def test_lattices_beyond_one_tile(backend, lattice, seq_len, dtype):
    require(backend, lattice, dtype)
    check_precision(backend, make_problem(lattice, seq_len, heads=2, kv_heads=1, head_dim=32), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize(
    "lattice, seq_len",
    [(TorusLattice(128, 2), None), (TorusLattice(2, 66, winding=33), None), (TorusLattice(68, 2, "cylinder"), None),
     (TorusLattice(256, 2), None), (TorusLattice(66, 2, "causal"), 140), (TorusLattice(16, 2, "causal"), 32),
     (TorusLattice(128, 2, "causal", streams=("major_forward", "major_backward")), 256),
     (TorusLattice(128, 2, "causal", streams=("spiral_cw", "spiral_ccw")), 384)],
    ids=label,
)
def test_lines_of_several_blocks(backend, lattice, seq_len, dtype):
    """Heads with keys of their own, along lines that fill their blocks and lines that do not."""
    require(backend, lattice, dtype)
    check_precision(backend, make_problem(lattice, seq_len, batch=1, heads=1, head_dim=16), dtype)


@pytest.mark.parametrize("head_dim", [64, 72, 136])
@pytest.mark.parametrize(
    "lattice, seq_len",
    [(TorusLattice(66, 2), None), (TorusLattice(128, 2), None), (TorusLattice(2, 130, winding=65), None),
     (TorusLattice(65, 2, "causal"), 136), (TorusLattice(66, 2, "cylinder"), None)],
    ids=label,
)
def test_long_lines_of_many_channels(backend, lattice, seq_len, head_dim):
    require(backend, lattice, torch.bfloat16)
    check_precision(backend, make_problem(lattice, seq_len, batch=1, heads=1, head_dim=head_dim), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 72, 104, 128, 168, 248, 256])
@pytest.mark.parametrize(
    "lattice, seq_len", [(TorusLattice(6, 4, winding=2), None), (TorusLattice(5, 4, "causal"), 27)], ids=label
)
def test_head_dimensions(backend, lattice, seq_len, head_dim, dtype):
    require(backend, lattice, dtype)
    check_precision(backend, make_problem(lattice, seq_len, head_dim=head_dim), dtype)


@pytest.mark.parametrize("token_alpha", [False, True])
@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("batch, heads, kv_heads", [(1, 1, 1), (3, 6, 2), (2, 3, 1), (2, 5, 5)])
@pytest.mark.parametrize(
    "lattice, seq_len",
    [(TorusLattice(5, 10, winding=4), None), (TorusLattice(4, 5, "causal", winding=2), 33),
     (TorusLattice(5, 4, "cylinder"), None)],
    ids=label,
)
def test_heads_groups_and_gates(backend, lattice, seq_len, batch, heads, kv_heads, token_weights, token_alpha):
    dtype = torch.float32
    require(backend, lattice, dtype)
    problem = make_problem(lattice, seq_len, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=16,
                           token_weights=token_weights, token_alpha=token_alpha)
    check_precision(backend, problem, dtype)
    stateless = problem.replace(ema_state=None, ema_alpha=None)
    check_precision(backend, stateless, dtype)


@pytest.mark.parametrize("missing", DIFFERENTIABLE)
def test_gradients_do_not_depend_on_which_are_wanted(backend, missing):
    problem = make_problem(TorusLattice(4, 3, "causal"), 20).to(backend.exact_dtype, backend.device)
    every = {name: x.clone().requires_grad_() for name, x in problem.tensors().items()}
    backend.attention(**problem.replace(**every).arguments()).backward(problem.d_out)
    some = {name: x.clone().requires_grad_(name != missing) for name, x in problem.tensors().items()}
    backend.attention(**problem.replace(**some).arguments()).backward(problem.d_out)
    for name in DIFFERENTIABLE:
        if name == missing:
            assert some[name].grad is None
        else:
            assert torch.equal(some[name].grad, every[name].grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "lattice, seq_len", [(TorusLattice(6, 4, winding=2), None), (TorusLattice(5, 4, "causal"), 27)], ids=label
)
def test_memory_layouts(backend, lattice, seq_len, layout, dtype):
    problem = make_problem(lattice, seq_len, batch=2, heads=4, kv_heads=2, token_weights=True, token_alpha=True)
    problem = problem.to(dtype, backend.device)
    strided = {name: LAYOUTS[layout](x) for name, x in problem.tensors().items() if x.dim() > 2}
    strided["d_out"] = LAYOUTS[layout](problem.d_out)
    check_precision(backend, problem.replace(**strided), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
def test_expanded_inputs_and_gradient(backend, dtype):
    lattice = TorusLattice(4, 6, "causal")
    problem = make_problem(lattice, 31, batch=1, heads=2, token_weights=True, token_alpha=True)
    problem = problem.replace(first_key=torch.arange(31)[None] // 10 * 10).to(dtype, backend.device)
    batched = {name: x.expand(3, *x.shape[1:]) for name, x in problem.tensors().items() if x.dim() > 2}
    ones = problem.d_out.new_ones(()).expand(3, 2, 31, 8)
    check_precision(backend, problem.replace(**batched, d_out=ones, first_key=problem.first_key.expand(3, 31)), dtype)


@pytest.mark.parametrize("streams", [[s] for s in Stream] + [[0, 3, 5], [1, 2, 7], [4, 6], range(1, 8)], ids=label)
@pytest.mark.parametrize(
    "lattice, seq_len", [(TorusLattice(6, 9, winding=3), None), (TorusLattice(5, 6, "causal", winding=2), 64),
                         (TorusLattice(5, 6, "cylinder", winding=2), None)], ids=label
)
def test_subsets_of_streams(backend, lattice, seq_len, streams):
    lattice = TorusLattice(lattice.n_major, lattice.n_minor, lattice.topology, lattice.winding, streams=streams)
    require(backend, lattice, torch.float32)
    check_precision(backend, make_problem(lattice, seq_len, token_weights=True), torch.float32)


@pytest.mark.parametrize("change", [
    {"scale": 0.0}, {"scale": -0.7}, {"scale": 3}, {"ema_alpha": 0.0}, {"ema_alpha": 1.0}, {"ema_alpha": -2.5},
    {"ema_alpha": 40.0}, {"decay": -3.0}, {"decay": 0.0}, {"decay": 50.0}, {"stream_weights": 0.0},
    {"stream_weights": -1.5},
], ids=str)
@pytest.mark.parametrize(
    "lattice, seq_len", [(TorusLattice(6, 4, winding=2), None), (TorusLattice(3, 8, "causal"), 40)], ids=label
)
def test_any_finite_parameter(backend, lattice, seq_len, change):
    problem = make_problem(lattice, seq_len)
    (name, value), = change.items()
    if name != "scale":
        value = torch.full_like(getattr(problem, name), value)
    check_precision(backend, problem.replace(**{name: value}), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("largest", [100.0, 1e4])
@pytest.mark.parametrize(
    "lattice, seq_len", [(TorusLattice(8, 8), None), (TorusLattice(5, 8, "causal"), 100)], ids=label
)
def test_large_scores(backend, lattice, seq_len, largest, dtype):
    require(backend, lattice, dtype)
    problem = make_problem(lattice, seq_len)
    scores = problem.q @ problem.k.mT
    check_precision(backend, problem.replace(scale=largest / scores.abs().max().item()), dtype)
