"""Gradients against finite differences, and which derivatives there are."""

import pytest
import torch
from support import DIFFERENTIABLE, make_problem

from torus_kernels import TorusLattice

CASES = {
    "periodic": (TorusLattice(3, 3, winding=2, cross_radius=(1, 0)), None),
    "periodic-2x2": (TorusLattice(2, 2), None),
    "causal-within-window": (TorusLattice(4, 3, "causal", winding=2, cross_radius=(2, 1)), 7),
    "causal-beyond-window": (TorusLattice(2, 3, "causal"), 10),
    "cylinder": (TorusLattice(3, 2, "cylinder", cross_radius=(1, 1)), None),
    "some-streams": (TorusLattice(2, 4, winding=2, streams=[1, 2, 5, 6]), None),
}


def gradcheck(backend, problem, **options) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip("finite differences need float64, which a GPU leaves to reference")
    backend.require(problem.lattice)
    leaves = {name: x.requires_grad_() for name, x in problem.tensors().items()}

    def out(*tensors):
        return backend.attention(**problem.replace(**dict(zip(leaves, tensors, strict=True))).arguments())

    assert torch.autograd.gradcheck(out, tuple(leaves.values()), **options)


@pytest.mark.parametrize("case", CASES)
def test_all_seven(backend, case):
    lattice, seq_len = CASES[case]
    problem = make_problem(lattice, seq_len, heads=2, kv_heads=1)
    assert problem.tensors().keys() == set(DIFFERENTIABLE)
    gradcheck(backend, problem)


@pytest.mark.parametrize("token_weights, token_alpha", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("case", CASES)
def test_gated_by_token(backend, case, token_weights, token_alpha):
    problem = make_problem(*CASES[case], heads=2, batch=2, token_weights=token_weights, token_alpha=token_alpha)
    gradcheck(backend, problem, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_without_state_and_with_a_negative_scale(backend, case):
    problem = make_problem(*CASES[case], heads=4, kv_heads=2, head_dim=16, state=False)
    gradcheck(backend, problem.replace(scale=-0.3), fast_mode=True)


def test_packed_documents(backend):
    first_key = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 9]])  # the last one lies beyond its token
    problem = make_problem(TorusLattice(2, 3, "causal"), 9, heads=2, kv_heads=1)
    gradcheck(backend, problem.replace(first_key=first_key))


def test_double_backward_raises(backend):
    problem = make_problem(TorusLattice(2, 2)).to(backend.exact_dtype, backend.device)
    q = problem.q.requires_grad_()
    out = backend.attention(**problem.arguments())
    grad, = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"torus_attention.*double backward"):
        grad.sum().backward()


def test_nothing_is_tracked_without_a_leaf(backend):
    problem = make_problem(TorusLattice(2, 2)).to(backend.exact_dtype, backend.device)
    assert not backend.attention(**problem.arguments()).requires_grad
    with torch.no_grad():
        assert not backend.attention(**problem.replace(q=problem.q.requires_grad_()).arguments()).requires_grad


def test_inference_mode(backend):
    problem = make_problem(TorusLattice(2, 3, "causal"), 8).to(backend.exact_dtype, backend.device)
    expected = backend.attention(**problem.arguments())
    with torch.inference_mode():
        assert torch.equal(backend.attention(**problem.arguments()), expected)


def test_parameters_accumulate_over_calls(backend):
    problem = make_problem(TorusLattice(2, 3, "causal"), 8).to(backend.exact_dtype, backend.device)
    decay = problem.decay.requires_grad_()
    for _ in range(2):
        backend.attention(**problem.arguments()).backward(problem.d_out)
    twice = decay.grad.clone()
    decay.grad = None
    backend.attention(**problem.arguments()).backward(problem.d_out)
    assert torch.equal(twice, 2 * decay.grad)


@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("lattice", [TorusLattice(2, 3, winding=1, topology="causal"), TorusLattice(3, 3),
                                     TorusLattice(3, 2, "cylinder")], ids=lambda x: x.topology)
def test_empty_batch(backend, lattice, token_weights):
    backend.require(lattice)
    problem = make_problem(lattice, batch=0, heads=4, kv_heads=2, token_weights=token_weights)
    problem = problem.to(backend.exact_dtype, backend.device)
    leaves = {name: x.requires_grad_() for name, x in problem.tensors().items()}
    out, stats = backend.attention_with_stats(**problem.replace(**leaves).arguments())
    assert out.shape == problem.q.shape
    assert stats.lse.shape == stats.entropy.shape == (*problem.q.shape[:3], 8)
    out.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.shape == leaf.shape, name
        assert (leaf.grad == 0).all(), name
