"""What only the CUDA kernels promise, on a GPU or on their emulation."""

import pytest
import torch
from conftest import CUDA_REFUSES, require_backend
from support import LAYOUTS, Backend, evaluate, make_problem

from torus_kernels import TorusLattice
from torus_kernels.backends import Problem, load

pytestmark = [] if Backend("cuda").is_emulated else [pytest.mark.gpu]

CASES = [(TorusLattice(6, 4, winding=2), None), (TorusLattice(3, 5, "causal"), 20)]


@pytest.fixture(scope="module")
def cuda():
    return require_backend("cuda")


def problem_of(cuda, lattice, seq_len, dtype=torch.bfloat16):
    return make_problem(lattice, seq_len, batch=2, heads=4, kv_heads=2, head_dim=24).to(dtype, cuda.device)


def test_what_it_takes(cuda):
    can_run = load("cuda").can_run
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (8, 24, 32, 64, 128):
            assert can_run(Problem(cuda.device, dtype, head_dim)) is None
    for dtype, head_dim in ((torch.float32, 32), (torch.float64, 32), (torch.bfloat16, 136), (torch.bfloat16, 256)):
        assert can_run(Problem(cuda.device, dtype, head_dim)).startswith(CUDA_REFUSES)
    assert can_run(Problem(cuda.device, torch.bfloat16, 32, operator="rope")).startswith(CUDA_REFUSES)
    assert not can_run(Problem("mps", torch.bfloat16, 32)).startswith(CUDA_REFUSES)


@pytest.mark.parametrize("lattice, seq_len", CASES, ids=["periodic", "causal"])
def test_chunks_of_heads_change_nothing(cuda, lattice, seq_len, monkeypatch):
    problem, module = problem_of(cuda, lattice, seq_len), load("cuda")
    found = []
    for cache_bytes in (0, 3 * 24 * problem.q.shape[2] * 4 * 8, 1 << 30):  # one head, some, all
        monkeypatch.setattr(module, "_EMULATED_CACHE", cache_bytes)
        monkeypatch.setattr(module, "_cache_bytes", lambda device, cache_bytes=cache_bytes: cache_bytes)
        found.append(evaluate(cuda.attention, problem))
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_begin_anywhere(cuda, layout):
    problem = problem_of(cuda, *CASES[1], dtype=torch.float16)
    expected = evaluate(cuda.attention, problem)
    moved = {name: LAYOUTS[layout](getattr(problem, name)) for name in ("q", "k", "v", "ema_state", "d_out")}
    for name, value in evaluate(cuda.attention, problem.replace(**moved)).items():
        assert torch.equal(value, expected[name]), name


def test_an_error_of_a_kernel_is_an_exception(cuda):
    if not cuda.is_emulated:
        pytest.skip("a GPU has no such error")
    q = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="take float16 and bfloat16"):
        load("cuda").attention_forward(q, q, q, torch.ones(1, 8), torch.ones(1, 8), None, None, None,
                                       TorusLattice(2, 2), 1.0, q, None, None)
