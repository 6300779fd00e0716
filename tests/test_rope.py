"""Rotary positions: the formula, and that scores depend on displacement alone."""

import math

import pytest
import torch
from support import LAYOUTS, assert_same_up_to_rounding, label

from torus_kernels import TorusLattice, lattice_rope

LATTICES = [TorusLattice(6, 10, winding=5), TorusLattice(5, 5), TorusLattice(2, 2), TorusLattice(3, 6, winding=2)]


def formula(x: torch.Tensor, lattice: TorusLattice, offset: int = 0) -> torch.Tensor:
    """The definition, with Python's integers for ``h * t`` and one complex number per pair."""
    quarter = x.shape[-1] // 4
    major, minor = lattice.n_major, lattice.n_minor
    out = torch.empty_like(x, dtype=torch.float64)
    for token in range(x.shape[2]):
        for half, length in ((0, major), (1, minor)):
            for i in range(quarter):
                harmonic = 1 + i % max(1, length // 2)
                if lattice.topology == "causal":
                    period = (major * minor, minor)[half]
                    turn = harmonic * (token + offset) % period / period
                else:
                    position = (token // minor, token % minor)[half]
                    turn = harmonic * position / (2 * major if lattice.topology == "cylinder" and not half else length)
                cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
                first = 2 * half * quarter + i
                x1, x2 = x[:, :, token, first].double(), x[:, :, token, first + quarter].double()
                out[:, :, token, first] = x1 * cos - x2 * sin
                out[:, :, token, first + quarter] = x1 * sin + x2 * cos
    return out


def tokens(backend, seq_len: int, head_dim: int = 16, dtype=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seq_len)
    x = torch.randn(2, 3, seq_len, head_dim, generator=generator, dtype=torch.float64)
    return x.to(backend.device, backend.exact_dtype if dtype is None else dtype)


def rope(backend, *args, **kwargs) -> torch.Tensor:
    with backend.chosen():
        return lattice_rope(*args, **kwargs)


@pytest.mark.parametrize("head_dim", [4, 8, 12, 20, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize("lattice, seq_len, offset", [
    (TorusLattice(6, 10, winding=5), 60, 0), (TorusLattice(3, 6, winding=2), 18, 0),
    (TorusLattice(5, 4, "causal"), 43, 0), (TorusLattice(5, 4, "causal"), 7, 19), (TorusLattice(2, 2, "causal"), 9, 3),
    (TorusLattice(64, 48, "causal"), 5, 10**18 + 7), (TorusLattice(2**24 - 3, 2**23 + 1, "causal"), 4, 2**62 + 12345),
    (TorusLattice(7, 8, "cylinder"), 56, 0),
], ids=label)
def test_formula(backend, lattice, seq_len, offset, head_dim, dtype):
    x = tokens(backend, seq_len, head_dim, dtype)
    out = rope(backend, x, lattice, offset=offset)
    assert out.dtype == dtype
    expected = formula(x, lattice, offset)
    # cos and sin in the precision of accumulation, and one rounding of the result.
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # In float64 itself, finding one harmonic from another may cost a rounding each.
    roundings = 4 + (head_dim // 4 if dtype == torch.float64 else 0)
    allowed = (torch.finfo(dtype).eps / 2 + roundings * accumulation) * 2**0.5 * x.abs().max().item()
    assert (out.double() - expected).abs().max().item() <= allowed


def scores(backend, lattice, q, k, **options) -> torch.Tensor:
    return rope(backend, q, lattice, **options) @ rope(backend, k, lattice, **options).mT


@pytest.mark.parametrize("lattice", LATTICES, ids=label)
def test_scores_depend_on_displacement_alone_and_have_no_seam(backend, lattice):
    n = lattice.num_sites
    q, k = (tokens(backend, 1).expand(-1, -1, n, -1) for _ in range(2))
    grid = scores(backend, lattice, q, k).unflatten(3, (lattice.n_major, lattice.n_minor))
    grid = grid.unflatten(2, (lattice.n_major, lattice.n_minor))  # [B, H, u, v, u', v']
    for shift in ((1, 0), (0, 1)):
        assert_same_up_to_rounding(grid.roll(shift, (2, 3)).roll(shift, (4, 5)), grid)
    if n > 4:
        assert not torch.allclose(grid[:, :, 0, 0, 0, 0], grid[:, :, 0, 0, 1, 1])


def test_scores_on_a_cylinder_wrap_along_the_minor_loop_only(backend):
    lattice = TorusLattice(4, 6, "cylinder")
    x = tokens(backend, 1).expand(-1, -1, 24, -1)
    grid = scores(backend, lattice, x, x).unflatten(3, (4, 6)).unflatten(2, (4, 6))
    assert_same_up_to_rounding(grid.roll(1, 3).roll(1, 5), grid)
    assert_same_up_to_rounding(grid[:, :, 1:, :, 1:], grid[:, :, :-1, :, :-1])
    assert not torch.allclose(grid[:, :, 0, :, 0], grid[:, :, 0, :, 3])


@pytest.mark.parametrize("lattice", [TorusLattice(5, 4, "causal"), TorusLattice(3, 7, "causal")], ids=label)
def test_causal_scores_depend_on_the_lag_and_repeat_after_one_torus(backend, lattice):
    n = lattice.num_sites
    x = tokens(backend, 1).expand(-1, -1, 2 * n, -1)
    table = scores(backend, lattice, x, x)
    assert_same_up_to_rounding(table[:, :, 1:, 1:], table[:, :, :-1, :-1])
    assert_same_up_to_rounding(table[:, :, n:, :n], table[:, :, :n, :n])
    for offset in (1, 12345678901234567):
        assert_same_up_to_rounding(scores(backend, lattice, x, x, offset=offset), table)


def test_offset_continues_a_sequence(backend):
    lattice = TorusLattice(5, 4, "causal")
    x = tokens(backend, 47)
    whole = rope(backend, x, lattice)
    parts = torch.cat([rope(backend, x[:, :, :13], lattice), rope(backend, x[:, :, 13:], lattice, offset=13)], dim=2)
    assert torch.equal(parts, whole)


def test_lengths_of_pairs_are_kept(backend):
    x = tokens(backend, 60)
    out = rope(backend, x, TorusLattice(6, 10, winding=5))
    quarters, turned = x.unflatten(-1, (2, 2, 4)), out.unflatten(-1, (2, 2, 4))
    assert_same_up_to_rounding(turned.norm(dim=-2), quarters.norm(dim=-2))
    assert torch.equal(out[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(backend, layout):
    lattice = TorusLattice(5, 4, "causal")
    for dtype in (torch.float32, backend.low_dtype):
        x = tokens(backend, 43, dtype=dtype)
        strided = LAYOUTS[layout](x).detach().requires_grad_()
        out = rope(backend, strided, lattice, offset=3)
        assert torch.equal(out, rope(backend, x, lattice, offset=3))
        out.backward(LAYOUTS[layout](x))
        plain = x.clone().requires_grad_()
        rope(backend, plain, lattice, offset=3).backward(x)
        assert torch.equal(strided.grad, plain.grad)


def test_gradient_turns_back(backend):
    lattice = TorusLattice(5, 4, "causal")
    x = tokens(backend, 43).requires_grad_()
    out = rope(backend, x, lattice, offset=6)
    out.backward(out.detach())
    assert_same_up_to_rounding(x.grad, x.detach())


@pytest.mark.parametrize("lattice", [TorusLattice(3, 3), TorusLattice(3, 2, "causal"), TorusLattice(3, 2, "cylinder")],
                         ids=label)
def test_gradcheck(backend, lattice):
    if torch.float64 not in backend.dtypes:
        pytest.skip("finite differences need float64, which a GPU leaves to reference")
    x = tokens(backend, lattice.num_sites, head_dim=8).requires_grad_()
    with backend.chosen():
        assert torch.autograd.gradcheck(lambda x: lattice_rope(x, lattice), (x,))
        assert torch.autograd.gradgradcheck(lambda x: lattice_rope(x, lattice), (x,))


def test_empty_batch(backend):
    x = tokens(backend, 9)[:0].requires_grad_()
    out = rope(backend, x, TorusLattice(3, 3))
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


class TestErrors:
    CAUSAL, PERIODIC = TorusLattice(3, 4, "causal"), TorusLattice(4, 4)

    @pytest.mark.parametrize("change, error, message", [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
        ({"x": torch.zeros(3, 16, 8)}, ValueError, r"x must have shape \[B, H, T, D\]"),
        ({"x": torch.zeros(1, 1, 16, 8, dtype=torch.int32)}, TypeError, "x must have dtype"),
        ({"x": torch.zeros(1, 1, 16, 6)}, ValueError, "x must have a head dimension that is a multiple of 4, got 6"),
        ({"x": torch.zeros(1, 1, 16, 0)}, ValueError, "x must have a head dimension"),
        ({"x": torch.zeros(1, 1, 15, 8)}, ValueError, "x has sequence length 15.*16"),
        ({"lattice": (4, 4)}, TypeError, "lattice must be a TorusLattice"),
        ({"offset": 1}, ValueError, "offset belongs to the causal topology, got 1"),
        ({"offset": 16}, ValueError, "offset belongs to the causal topology, got 16"),
        ({"offset": 1.0}, TypeError, "offset must be an integer"),
        ({"offset": True}, TypeError, "offset must be an integer"),
        ({"offset": None}, TypeError, "offset must be an integer"),
        ({"offset": -1, "lattice": CAUSAL}, ValueError, "offset must not be negative"),
        ({"offset": "3", "lattice": CAUSAL}, TypeError, "offset must be an integer"),
    ])
    def test_arguments(self, change, error, message):
        arguments = {"x": torch.zeros(1, 1, 16, 8), "lattice": self.PERIODIC, "offset": 0}
        lattice_rope(**arguments)
        with pytest.raises(error, match=message):
            lattice_rope(**arguments | change)
