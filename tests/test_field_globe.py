"""The tracer in zonal winds around a globe: an exact solution, and the example that trains on it."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torus_model.field.globe import (
    RADIUS,
    advect,
    generate_globe,
    jet_wind,
    latitudes,
    longitudes,
    random_tracers,
    random_winds,
    solid_body_wind,
    tracer_clouds,
)
from torus_model.field.symmetries import Symmetry, apply

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "globe.py"
HOUR = 3600.0
EPS = torch.finfo(torch.float64).eps


def assert_close(actual: torch.Tensor, expected: torch.Tensor, roundings: float = 64) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= roundings * EPS * expected.abs().max()


def clouds(latitude, longitude):
    """Two clouds, at -20 and 40 degrees of latitude."""
    centres = torch.tensor([[-0.35, 2.9], [0.7, -1.0]], dtype=torch.float64)
    return tracer_clouds(latitude, longitude, centres, torch.tensor([1.0, -0.7], dtype=torch.float64), width=0.5)


def jet(rows: int) -> torch.Tensor:
    latitude = latitudes(rows)
    return solid_body_wind(latitude, 15.0) + jet_wind(latitude, 60.0)


def test_the_grid():
    torch.testing.assert_close(latitudes(4).rad2deg().tolist(), [-67.5, -22.5, 22.5, 67.5])
    torch.testing.assert_close(longitudes(4).rad2deg().tolist(), [-135.0, -45.0, 45.0, 135.0])


def test_winds():
    first, last = math.pi / 7, math.pi / 2 - math.pi / 7
    for phi in (-0.8, 0.0, first, 0.5, math.pi / 4, 0.9, last, 1.5):
        expected = 0.0
        if first < phi < last:  # equation 2 of Galewsky et al.
            expected = 80 / math.exp(-4 / (last - first) ** 2) * math.exp(1 / ((phi - first) * (phi - last)))
        wind = jet_wind(torch.tensor(phi, dtype=torch.float64), 80.0).item()
        assert wind == pytest.approx(expected, rel=1e-12)
    assert solid_body_wind(torch.tensor([0.0, math.pi / 3]), 20.0).tolist() == pytest.approx([20.0, 10.0])


def test_clouds_depend_on_the_distance_on_the_sphere():
    latitude, longitude = latitudes(8), longitudes(12)
    points = torch.stack((
        latitude.cos()[:, None] * longitude.cos(), latitude.cos()[:, None] * longitude.sin(),
        latitude.sin()[:, None].expand(8, 12),
    ), -1)  # [H, W, 3]
    at = torch.tensor([math.cos(0.4) * math.cos(2.0), math.cos(0.4) * math.sin(2.0), math.sin(0.4)],
                      dtype=torch.float64)
    centre = torch.tensor([[0.4, 2.0]], dtype=torch.float64)
    actual = tracer_clouds(latitude, longitude, centre, torch.tensor([3.0], dtype=torch.float64), width=0.5)
    assert_close(actual, 3 * torch.exp(-(points - at).square().sum(-1) / (2 * 0.5**2)))


def residual(columns: int, diffusivity: float) -> float:
    """Largest residual of the equation by central differences in time and longitude, relative to the change in time."""
    rows, hour = 8, 3.0
    step = 0.5 * 64 / columns  # hours
    spacing = 2 * math.pi / columns
    tracer = advect(clouds(latitudes(rows), longitudes(columns)), jet(rows), [hour - step, hour, hour + step],
                    diffusivity)
    circle = RADIUS * latitudes(rows).cos()[:, None]  # [H, 1]
    west, here, east = (tracer[1].roll(s, -1) for s in (1, 0, -1))
    change = (tracer[2] - tracer[0]) / (2 * HOUR * step)
    advection = jet(rows)[:, None] / circle * (east - west) / (2 * spacing)
    diffusion = diffusivity / circle**2 * (east - 2 * here + west) / spacing**2
    return ((change + advection - diffusion).abs().max() / change.abs().max()).item()


@pytest.mark.parametrize("diffusivity", [0.0, 1e6])
def test_the_solution_satisfies_the_equation(diffusivity):
    """What finite differences leave falls by four when time step and spacing are halved, also across the dateline."""
    residuals = [residual(columns, diffusivity) for columns in (64, 128, 256)]
    assert residuals[2] < 2e-3
    for coarse, fine in itertools.pairwise(residuals):
        assert 3.8 < coarse / fine < 4.2


def test_without_diffusion_the_clouds_move_with_the_wind():
    rows, columns, hours = 12, 96, [0.0, 5.0, 77.0, 1000.0]
    latitude, longitude = latitudes(rows), longitudes(columns)
    tracer = advect(clouds(latitude, longitude), jet(rows), hours)
    assert tracer.shape == (4, rows, columns)
    for t, hour in enumerate(hours):
        for row in range(rows):
            turned = longitude - jet(rows)[row] / (RADIUS * latitude[row].cos()) * HOUR * hour
            assert_close(tracer[t, row], clouds(latitude[row : row + 1], turned)[0], roundings=4096)


def test_diffusion_keeps_the_mean_of_every_circle_and_calms_the_rest():
    initial = clouds(latitudes(6), longitudes(32))
    calm, moving = advect(initial, jet(6), [0.0, 48.0], diffusivity=1e6)
    assert_close(moving.mean(-1), calm.mean(-1))
    # Wavenumber k of a circle decays at the rate K (k / circumference)^2.
    one = math.pi * torch.arange(-16, 16, dtype=torch.float64) / 16
    wave = advect(torch.cos(3 * one).expand(6, -1), torch.zeros(6), [48.0], diffusivity=1e6)[0]
    rate = 1e6 * (3 / (RADIUS * latitudes(6).cos())) ** 2
    assert_close(wave, torch.exp(-rate * 48 * HOUR)[:, None] * torch.cos(3 * one))


def test_the_highest_wavenumber_is_left_out():
    initial = clouds(latitudes(5), longitudes(16))
    start, later = advect(initial + torch.tensor([1.0, -1.0]).repeat(8), jet(5), [0.0, 6.0])
    smooth_start, smooth_later = advect(initial, jet(5), [0.0, 6.0])
    assert_close(start, smooth_start)
    assert_close(later, smooth_later)
    assert_close(advect(clouds(latitudes(5), longitudes(15)), jet(5), [0.0])[0], clouds(latitudes(5), longitudes(15)))


@given(st.integers(-100, 100), st.sampled_from([15, 16]), st.integers(0, 99))
def test_rolling_the_tracer_rolls_the_solution(shift, columns, seed):
    initial = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wind = random_winds(2, 5, seed)
    solution = advect(initial, wind, [0.0, 6.0, 50.0], 1e5)
    assert_close(advect(initial.roll(shift, -1), wind, [0.0, 6.0, 50.0], 1e5), solution.roll(shift, -1), 256)


@pytest.mark.parametrize("columns", [15, 16])
def test_there_is_no_seam_at_the_dateline(columns):
    """A rotation by one column is a roll, and a whole turn brings everything back to where it was."""
    speed = 2 * math.pi * RADIUS / (24 * HOUR)  # once around the equator in a day
    initial = random_tracers(1, (4, columns))[0]
    start, one_column, day = advect(initial, solid_body_wind(latitudes(4), speed), [0.0, 24 / columns, 24.0])
    assert_close(one_column, start.roll(1, -1), 512)
    assert_close(day, start, 1024)


def test_mirrored_trajectories_are_solutions_in_the_mirrored_wind():
    wind, initial = random_winds(1, 6), advect(random_tracers(1, (6, 15)), torch.zeros(6), [0.0])[:, 0]
    solution = advect(initial, wind, [0.0, 30.0])
    for flips, mirrored_wind in (((True, False), wind.flip(-1)), ((False, True), -wind)):
        mirror = Symmetry(flips=flips)
        mirrored = advect(apply(mirror, initial, (1,)), mirrored_wind, [0.0, 30.0])
        assert_close(mirrored[0], apply(mirror, solution[0], (1, 1)), 256)


class TestGeneration:
    def test_frames_are_the_solution(self):
        data = generate_globe(3, 4, (6, 16), hours=5.0, diffusivity=1e5, seed=7)
        assert data.frames.shape == (3, 4, 1, 6, 16)
        assert data.static is None
        assert data.parity == (1,)
        expected = advect(random_tracers(3, (6, 16), 8), random_winds(3, 6, 7), [0.0, 5.0, 10.0, 15.0], 1e5)
        assert torch.equal(data.frames[:, :, 0], expected.float())
        assert json.loads(json.dumps(data.parameters)) == {
            "flow": "globe", "topology": "cylinder", "hours": 5.0, "diffusivity": 1e5, "seed": 7,
        }

    def test_seeds(self):
        first, again, other = (generate_globe(2, 2, (4, 8), seed=seed).frames for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first[0], first[1])

    def test_the_columns_resolve_the_tracer(self):
        tracer = random_tracers(50, (32, 64))
        assert_close(advect(tracer, torch.zeros(32), [0.0])[:, 0], tracer, roundings=1e-7 / EPS)

    def test_tracers_are_spread_evenly_over_the_sphere(self):
        size = random_tracers(1000, (6, 12)).square().mean((0, 2)).sqrt()  # of each latitude
        assert size.max() < 1.15 * size.min()

    def test_jets_are_where_they_should_be(self):
        speed = random_winds(200, 36)
        assert speed.abs().max() <= 100
        assert speed[:, [0, -1]].abs().max() < 5
        for half, side in ((speed[:, :18], -1), (speed[:, 18:], 1)):
            latitude = latitudes(36)[:18] if side < 0 else latitudes(36)[18:]
            jets = latitude[half.argmax(1)].rad2deg() * side
            assert 30 <= jets.min() < 40 < 50 < jets.max() <= 60

    @pytest.mark.parametrize("change, message", [
        ({"trajectories": 0}, "trajectories must be at least 1, got 0"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"grid": (1, 8)}, r"grid must be two numbers of at least 2, got \(1, 8\)"),
        ({"grid": (4, 8, 8)}, "grid must be two numbers"),
        ({"hours": 0.0}, "hours must be positive and finite, got 0.0"),
        ({"hours": math.inf}, "hours must be positive"),
        ({"diffusivity": -1.0}, "diffusivity must be at least 0 and finite, got -1.0"),
        ({"diffusivity": math.nan}, "diffusivity must be"),
    ], ids=str)
    def test_errors(self, change, message):
        with pytest.raises(ValueError, match=message):
            generate_globe(**{"trajectories": 1, "frames": 2, "grid": (4, 8), **change})

    def test_wind_of_other_rows(self):
        with pytest.raises(ValueError, match=r"wind must have the 4 rows of initial, got \[5\]"):
            advect(torch.zeros(4, 8), torch.zeros(5), [0.0])


@pytest.fixture
def example(monkeypatch):
    """The example as a function of its arguments, with few and short trajectories to test on."""
    spec = importlib.util.spec_from_file_location("globe_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TEST_TRAJECTORIES", 2)
    monkeypatch.setattr(module, "FRAMES", 5)

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
        module.main()

    return run


class TestExample:
    def test_trains_and_draws(self, example, tmp_path, capsys):
        example("--grid", 16, 32, "--trajectories", 2, "--epochs", 1, "--networks", "torus", "windows",
                "--output", tmp_path / "new")
        assert (tmp_path / "new" / "globe.png").read_bytes().startswith(b"\x89PNG")
        rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
        parameters, errors, dateline, rolled = zip(rows["torus"], rows["windows"], strict=True)
        ours, theirs = (int(number.replace(",", "")) for number in parameters)
        assert abs(ours - theirs) <= 0.03 * ours
        assert all(0 < float(error) < 1 for error in errors)
        assert all(0 < float(ratio.removesuffix("x")) < 10 for ratio in dateline)
        assert float(rolled[0]) < 1e-4 < 1e-3 < float(rolled[1])

    def test_help(self):
        command = [sys.executable, str(EXAMPLE), "--help"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert "dateline" in result.stdout and "--output" in result.stdout

    @pytest.mark.parametrize("arguments, message", [
        (["--grid", 24, 64], "window must divide the lattice"),
        (["--epochs", 0], "epochs must be at least 1, got 0"),
        (["--epochs", 1, "--seconds", 1], "not allowed with"),
        (["--networks", "nothing"], "invalid choice: 'nothing'"),
        (["--trajectories", 0], "train and test must be at least 1"),
    ], ids=str)
    def test_errors_of_the_user_are_one_line(self, example, arguments, message, tmp_path, capsys):
        with pytest.raises(SystemExit) as stopped:
            example(*arguments, "--output", tmp_path / "new")
        assert stopped.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("globe.py: error: ") and message in last
        assert not (tmp_path / "new").exists()
