"""The lattice's symmetries: a group, and one under which the equations of motion do not change."""

import itertools

import pytest
import torch
from support import assert_same_up_to_rounding

from torus_model.field import FieldConfig
from torus_model.field.data import FieldData
from torus_model.field.navier_stokes import NavierStokes2d
from torus_model.field.run import augment
from torus_model.field.symmetries import Symmetry, apply, random_symmetry

FLIPS = tuple(itertools.product((False, True), repeat=2))


def config_of(grid, topology="periodic"):
    return FieldConfig(grid=grid, topology=topology, patch=1, width=8, heads=1)


def all_symmetries(grid, topology):
    rows, columns = grid
    is_torus = topology == "periodic"
    return [
        Symmetry((a, b), flips, transpose)
        for a in range(rows if is_torus else 1) for b in range(columns) for flips in FLIPS
        for transpose in ((False, True) if is_torus and rows == columns else (False,))
    ]


def action(symmetry, field):
    """What a symmetry makes of a pseudo-scalar field, as a value that sets can hold."""
    return tuple(apply(symmetry, field[None], (-1,)).flatten().tolist())


@pytest.mark.parametrize(
    ("grid", "topology", "order"),
    [((3, 3), "periodic", 72), ((4, 4), "periodic", 128), ((3, 4), "periodic", 48), ((3, 4), "cylinder", 16)],
)
def test_symmetries_form_a_group(grid, topology, order):
    field = 1.0 + torch.arange(grid[0] * grid[1]).view(grid)  # no two points alike, and none its own negative
    group = {action(s, field): s for s in all_symmetries(grid, topology)}
    assert len(group) == order
    assert group[tuple(field.flatten().tolist())] == Symmetry()
    composed = {
        s: [action(t, apply(s, field[None], (-1,))[0]) for t in group.values()] for s in group.values()
    }
    for products in composed.values():
        assert set(products) == set(group)  # closed; and some product is the identity, so that s has an inverse


@pytest.mark.parametrize(("grid", "topology"), [((3, 3), "periodic"), ((4, 2), "periodic"), ((3, 3), "cylinder")])
def test_random_symmetries_reach_the_whole_group_and_nothing_else(grid, topology):
    generator = torch.Generator().manual_seed(0)
    drawn = {random_symmetry(config_of(grid, topology), generator) for _ in range(1500)}
    assert drawn == set(all_symmetries(grid, topology))


def test_random_symmetries_follow_the_generator():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return [random_symmetry(config_of((8, 8)), generator) for _ in range(5)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_order_of_the_parts():
    """First the transposition, then the reflections, then the shift."""
    x = torch.arange(9.0).view(1, 3, 3)
    expected = x.transpose(1, 2).flip(1).roll(1, 2)
    assert torch.equal(apply(Symmetry((0, 1), (True, False), True), x, (1,)), expected)


def test_leading_axes_are_transformed_alike_and_channels_by_their_parity():
    x = torch.rand(2, 3, 2, 4, 4)  # [B, frames, C, H, W]
    symmetry = Symmetry((1, 2), (True, False), False)
    y = apply(symmetry, x, (1, -1))
    for b, t in itertools.product(range(2), range(3)):
        assert torch.equal(y[b, t, 0], apply(symmetry, x[b, t, :1], (1,))[0])
        assert torch.equal(y[b, t, 1], -apply(symmetry, x[b, t, 1:], (1,))[0])


def test_augmentation_transforms_a_window_as_a_whole():
    """Frames and static fields that show the same picture still show it, each under a symmetry of its own."""
    picture = torch.rand(6, 1, 8, 8)  # [B, C, H, W]
    data = FieldData(picture[:, None], picture, parity=(-1,), static_parity=(-1,))
    history = torch.stack((picture, 2 * picture), 1)  # [B, history, C, H, W]
    generator = torch.Generator().manual_seed(0)
    frames, static, target = augment(history, picture, 3 * picture[:, None], config_of((8, 8)), data, generator)
    assert torch.equal(frames, torch.stack((static, 2 * static), 1))
    assert torch.equal(target, 3 * static[:, None])
    assert (static != picture).flatten(1).any(1).all()
    for new, old in zip(static, picture, strict=True):
        assert torch.equal(new.abs().flatten().sort().values, old.flatten().sort().values)
    assert {new.flatten()[0].sign().item() for new in static} == {-1.0, 1.0}
    _, shared, _ = augment(history, picture[:1], 3 * picture[:, None], config_of((8, 8)), data, generator)
    assert shared.shape == picture.shape


@pytest.mark.parametrize("parity", [(1,), (1, 0), (1, 1, 1)])
def test_parity_must_fit_the_channels(parity):
    with pytest.raises(ValueError, match="parity"):
        apply(Symmetry(), torch.rand(2, 4, 4), parity)


@pytest.fixture(scope="module")
def flow():
    """A forcing without any symmetry, vorticity, and its solution after it has left where it began: [1, N, N] each."""
    random = torch.Generator().manual_seed(0)
    spectrum = torch.zeros(2, 16, 16, dtype=torch.complex128)
    spectrum[:, :4, :4] = torch.randn(2, 4, 4, generator=random, dtype=torch.complex128)
    spectrum[:, 0, 0] = 0
    forcing, vorticity = torch.fft.ifft2(spectrum, norm="forward").real.split(1)
    return forcing, vorticity, solve(forcing, vorticity)


def solve(forcing, vorticity):
    return NavierStokes2d(16, 1e-3, forcing[0]).solve(vorticity, [0.3], dt=0.01)[:, 0]


def transformed(symmetry, fields, parity=-1):
    return apply(symmetry, fields[:, None], (parity,))[:, 0]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("flips", FLIPS)
@pytest.mark.parametrize("shifts", [(0, 0), (3, 11)])
def test_transformed_solution_is_the_solution_under_the_transformed_forcing(flow, shifts, flips, transpose):
    forcing, start, end = flow
    symmetry = Symmetry(shifts, flips, transpose)
    again = solve(transformed(symmetry, forcing), transformed(symmetry, start))
    assert_same_up_to_rounding(again, transformed(symmetry, end), ulps=2048)


@pytest.mark.parametrize(
    "symmetry", [Symmetry(flips=(True, False)), Symmetry(flips=(False, True)), Symmetry(transpose=True)]
)
def test_reflected_vorticity_without_its_change_of_sign_is_no_solution(flow, symmetry):
    forcing, start, end = flow
    again = solve(transformed(symmetry, forcing, 1), transformed(symmetry, start, 1))
    assert (again - transformed(symmetry, end, 1)).abs().max() > 0.05 * end.abs().max()


@pytest.mark.parametrize("symmetry", [Symmetry((3, 0)), Symmetry(flips=(True, False)), Symmetry(flips=(True, True))])
def test_transformed_vorticity_under_the_old_forcing_is_no_solution(flow, symmetry):
    forcing, start, end = flow
    again = solve(forcing, transformed(symmetry, start))
    assert (again - transformed(symmetry, end)).abs().max() > 0.05 * end.abs().max()
