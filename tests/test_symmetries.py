"""Invariances of the grid topologies, which hold for the output and for every gradient."""

import pytest
import torch
from support import PARAMETERS, Problem, assert_same_up_to_rounding, evaluate, label, make_problem

from torus_kernels import TorusLattice

PERIODIC = [TorusLattice(8, 4, winding=3), TorusLattice(6, 4, winding=2), TorusLattice(5, 5, winding=2),
            TorusLattice(9, 6, winding=4, cross_radius=(5, 2)), TorusLattice(2, 2), TorusLattice(7, 14, winding=6)]
CYLINDERS = [TorusLattice(5, 6, "cylinder", winding=2), TorusLattice(4, 3, "cylinder", cross_radius=(4, 1))]

U_REFLECTED = [1, 0, 2, 3, 5, 4, 6, 7]
V_REFLECTED = [0, 1, 3, 2, 5, 4, 6, 7]
TRANSPOSED = [2, 3, 0, 1, 4, 5, 7, 6]
UNCHANGED = list(range(8))


def on_grid(x: torch.Tensor, lattice: TorusLattice, move) -> torch.Tensor:
    """Moves the tokens of ``[B, H, T, ...]`` as a picture ``[B, H, M, m, ...]``."""
    return move(x.unflatten(2, (lattice.n_major, lattice.n_minor))).flatten(2, 3)


def transform(tensors: dict[str, torch.Tensor], lattice: TorusLattice, move, streams: list[int]):
    """Tokens moved over the grid, and the streams of weights and decay renamed."""
    moved = {}
    for name, x in tensors.items():
        argument = name.removeprefix("d_")
        if argument in ("stream_weights", "decay"):
            x = x[..., streams]
        if x.dim() > 2:
            x = on_grid(x, lattice, move)
        moved[name] = x
    return moved


def check_commutes(backend, lattice, move, streams=UNCHANGED) -> None:
    backend.require(lattice)
    batch, gates = (1, (True,)) if backend.is_slow else (2, (False, True))
    for token_gates in gates:
        problem = make_problem(lattice, batch=batch, heads=2, kv_heads=1, token_weights=token_gates,
                               token_alpha=token_gates).to(backend.exact_dtype, backend.device)
        tensors = {**problem.tensors(), "d_out": problem.d_out}
        moved = problem.replace(**transform(tensors, lattice, move, streams))
        expected = transform(evaluate(backend.attention, problem), lattice, move, streams)
        actual = evaluate(backend.attention, moved)
        for name in expected:
            assert_same_up_to_rounding(actual[name], expected[name], name)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (3, 2)], ids=label)
@pytest.mark.parametrize("lattice", PERIODIC, ids=label)
def test_shift(backend, lattice, shift):
    check_commutes(backend, lattice, lambda x: x.roll(shift, dims=(2, 3)))


@pytest.mark.parametrize("lattice", PERIODIC + CYLINDERS, ids=label)
def test_reflection_of_u(backend, lattice):
    check_commutes(backend, lattice, lambda x: x.flip(2), U_REFLECTED)


@pytest.mark.parametrize("lattice", PERIODIC + CYLINDERS, ids=label)
def test_reflection_of_v(backend, lattice):
    check_commutes(backend, lattice, lambda x: x.flip(3), V_REFLECTED)


@pytest.mark.parametrize("lattice", [TorusLattice(5, 5), TorusLattice(8, 8, cross_radius=(1, 3))], ids=label)
def test_transposition_of_a_square(backend, lattice):
    check_commutes(backend, lattice, lambda x: x.transpose(2, 3), TRANSPOSED)


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("lattice", CYLINDERS, ids=label)
def test_shift_along_the_closed_loop_of_a_cylinder(backend, lattice, shift):
    check_commutes(backend, lattice, lambda x: x.roll(shift, dims=3))


def test_a_cylinder_is_not_closed_along_the_major_axis(backend):
    lattice = CYLINDERS[0]
    backend.require(lattice)
    problem = make_problem(lattice).to(backend.exact_dtype, backend.device)
    with pytest.raises(AssertionError):
        check_commutes(backend, problem.lattice, lambda x: x.roll(1, dims=2))


@pytest.mark.parametrize("lattice, seq_len", [(PERIODIC[0], None), (TorusLattice(4, 5, "causal"), 33),
                                              (CYLINDERS[0], None)], ids=label)
def test_batches_and_heads_are_independent(backend, lattice, seq_len):
    backend.require(lattice)
    problem = make_problem(lattice, seq_len, batch=3, heads=4, kv_heads=2).to(backend.exact_dtype, backend.device)
    together = backend.attention(**problem.arguments())
    for b in range(3):
        for group in range(2):
            heads = slice(2 * group, 2 * group + 2)
            alone = Problem(
                lattice, problem.q[b : b + 1, heads], problem.k[b : b + 1, group : group + 1],
                problem.v[b : b + 1, group : group + 1], ema_state=problem.ema_state[b : b + 1, heads],
                **{name: getattr(problem, name)[heads] for name in PARAMETERS},
            )
            assert torch.equal(backend.attention(**alone.arguments()), together[b : b + 1, heads])


def test_heads_of_a_group_share_their_keys(backend):
    problem = make_problem(TorusLattice(4, 5, "causal"), 33, heads=6, kv_heads=2).to(
        backend.exact_dtype, backend.device)
    repeated = problem.replace(k=problem.k.repeat_interleave(3, dim=1), v=problem.v.repeat_interleave(3, dim=1))
    grouped, separate = evaluate(backend.attention, problem), evaluate(backend.attention, repeated)
    for name in grouped:
        expected = separate[name].unflatten(1, (2, 3)).sum(dim=2) if name in ("d_k", "d_v") else separate[name]
        assert_same_up_to_rounding(grouped[name], expected, name)
