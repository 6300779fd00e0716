"""What the operators do not do is refused by name: `torch.func`, forward mode and second derivatives."""

import pytest
import torch
from support import assert_same_up_to_rounding, make_problem
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from torus_kernels import (
    TorusKVCache,
    TorusLattice,
    ema_compound,
    ema_compound_multiscale,
    lattice_rope,
    torus_attention_decode,
)

LATTICE = TorusLattice(3, 4, "causal", winding=2)
PROBLEM = make_problem(LATTICE, 14, batch=1, heads=2, kv_heads=1)


@pytest.fixture(autouse=True)
def _on_the_backend(backend):
    with backend.chosen():
        yield


def filled_cache(x):
    """One of constants like x: tokens under a transform could not be written into it."""
    cache = TorusKVCache(LATTICE, 1, 1, x.shape[-1], x.dtype, x.device)
    tokens = torch.linspace(-1, 1, 14 * x.shape[-1], dtype=x.dtype, device=x.device).view(1, 1, 14, -1)
    cache.append(tokens, tokens.flip(2))
    return cache


OPERATORS = {
    "torus_attention": lambda backend, x, state, alpha: backend.attention(x, x[:, :1], x[:, :1], LATTICE),
    "ema_compound": lambda backend, x, state, alpha: ema_compound(x, state, alpha),
    "ema_compound_multiscale": lambda backend, x, state, alpha: ema_compound_multiscale(
        x, torch.stack((state, 2 * state)), torch.stack((alpha, 1 - alpha)), alpha)[0],
    "torus_attention_decode": lambda backend, x, state, alpha: torus_attention_decode(x[:, :, -1:], filled_cache(x)),
    "lattice_rope": lambda backend, x, state, alpha: lattice_rope(x, LATTICE),
}


def operator(backend, name):
    """One operator as a function of its tokens ``[1, 2, T, D]``, and the tokens."""
    problem = PROBLEM.to(backend.exact_dtype, backend.device)
    return lambda x: OPERATORS[name](backend, x, problem.ema_state, problem.ema_alpha), problem.q


def attempts(function, x):
    ones = torch.ones_like(x)
    scalar = lambda x: function(x).square().sum()  # noqa: E731
    return {
        "vmap": lambda: vmap(function)(x[None]),
        "grad": lambda: grad(scalar)(x),
        "vjp": lambda: vjp(function, x),
        "jacrev": lambda: jacrev(function)(x),
        "jvp": lambda: jvp(function, (x,), (ones,)),
        "jacfwd": lambda: jacfwd(function)(x),
        "hessian": lambda: hessian(scalar)(x),
        "vmap of grad": lambda: vmap(grad(scalar))(x[None]),
        "jvp of a constant": lambda: jvp(lambda factor: factor * function(x), (ones,), (ones,)),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_transforms_are_refused_by_name(backend, name):
    function, x = operator(backend, name)
    expected = function(x)
    for attempt in attempts(function, x).values():
        with pytest.raises(NotImplementedError, match=rf"^{name} cannot be transformed by torch\.func.*its batch"):
            attempt()
    assert torch.equal(function(x), expected), "a refusal must leave nothing behind"


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_forward_mode_is_refused_by_name(backend, name, needs_grad):
    """Without the refusal the tangent would silently be lost where no input needs a gradient."""
    function, x = operator(backend, name)
    leaf = x.clone().requires_grad_(needs_grad)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=rf"^{name} cannot .* in forward mode"):
        function(forward_ad.make_dual(leaf, torch.ones_like(leaf)))
    assert torch.equal(function(leaf), function(x))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ("lattice_rope", "torus_attention_decode")])
def test_second_derivatives_are_refused_by_name(backend, name):
    function, x = operator(backend, name)
    with pytest.raises(NotImplementedError, match=f"^{name} .*double backward is not implemented"):
        torch.autograd.functional.hvp(lambda x: function(x).square().sum(), x, torch.ones_like(x))


def test_rope_is_linear_and_has_second_derivatives(backend):
    function, x = operator(backend, "lattice_rope")
    leaf = x.clone().requires_grad_()
    first, = torch.autograd.grad(function(leaf).pow(3).sum(), leaf, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), leaf)
    # The rotation is orthogonal: R^T (3 (R x)^2) has as long a vector as 3 (R x)^2, whose square has this gradient.
    assert_same_up_to_rounding(function(second), 36 * function(x).pow(3))


def test_compiled_code_refuses_transforms_too(backend):
    torch._dynamo.reset()
    function, x = operator(backend, "torus_attention")
    with pytest.raises(NotImplementedError, match="cannot be transformed"):
        torch.compile(vmap(function), backend="aot_eager")(x[None])
    torch._dynamo.reset()
