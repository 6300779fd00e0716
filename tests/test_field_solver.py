"""The Navier-Stokes solver against exact solutions, its own convergence and its symmetries; the initial fields."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from support import assert_same_up_to_rounding

from torus_model.field.navier_stokes import NavierStokes2d, SolverError, classical_forcing
from torus_model.field.random_field import AMPLITUDES, eigenvalues, sample_vorticity
from torus_model.field.verify_solver import main, orders, relative_errors, taylor_green

DTYPES = (torch.float32, torch.float64)


def random_fields(resolution: int, count: int = 1, waves: int | None = None, rms: float = 1.0, seed: int = 0):
    """Smooth fields ``[count, n, n]`` that hold the wavenumbers below ``waves / 2``, so that every grid sees them."""
    waves = resolution if waves is None else waves
    coarse = torch.stack([sample_vorticity(waves, np.random.default_rng((seed, i))) for i in range(count)])
    coarse *= rms / coarse.square().mean().sqrt()
    spectrum = torch.fft.fftshift(torch.fft.fft2(coarse, norm="forward"), dim=(-2, -1))
    before = resolution // 2 - waves // 2
    padded = torch.nn.functional.pad(spectrum, (before, resolution - waves - before) * 2)
    return torch.fft.ifft2(torch.fft.ifftshift(padded, dim=(-2, -1)), norm="forward").real


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dt", [1.0, 0.1])
def test_taylor_green_at_rest_is_exact_whatever_the_step(dtype, dt):
    solver = NavierStokes2d(24, 3e-3, dtype=dtype)
    times = [0.0, 1.0, 3.0]
    solution = solver.solve(taylor_green(24, 0.0, 3e-3, 2)[None], times, dt=dt)[0]
    exact = torch.stack([taylor_green(24, t, 3e-3, 2) for t in times])
    assert_same_up_to_rounding(solution, exact.to(dtype), ulps=32)


@pytest.mark.parametrize("mean_velocity", [(0.7, -0.3), (0.0, 1.0)])
def test_carried_along_taylor_green_converges_with_the_fourth_order(mean_velocity):
    steps = (16, 32, 64, 128)
    errors = relative_errors(steps, mean_velocity=mean_velocity)
    assert errors[-1] < 2e-4
    assert all(abs(order - 4) < 0.1 for order in orders(steps, errors)[1:])


@pytest.mark.parametrize("viscosity", [0.0, 1e-5, 1e-2])
def test_forced_laminar_flow_is_exact_whatever_the_step(viscosity):
    forcing = classical_forcing(24)
    solution = NavierStokes2d(24, viscosity, forcing).solve(torch.zeros(1, 24, 24), [0.5, 4.0], dt=0.5)[0]
    damping = viscosity * 8 * math.pi**2
    for frame, time in zip(solution, [0.5, 4.0], strict=True):
        growth = -math.expm1(-damping * time) / damping if damping else time
        assert_same_up_to_rounding(frame, growth * forcing, ulps=32)


def test_classical_forcing_runs_along_both_axes():
    forcing = classical_forcing(8)
    assert forcing[0, 0] == pytest.approx(0.1)
    assert forcing[1, 2] == pytest.approx(0.1 * (math.sin(0.75 * math.pi) + math.cos(0.75 * math.pi)))


def test_two_crossing_waves_begin_to_interact_as_they_should():
    # omega = a cos X + b cos 2Y has u = -b sin 2Y / 4 pi, v = a sin X / 2 pi and d omega / dt = 3/2 a b sin X sin 2Y.
    angle = 2 * math.pi * torch.arange(12, dtype=torch.float64) / 12
    a, b, x, y = 0.7, -1.3, angle[:, None], angle
    solver = NavierStokes2d(12, 0.0)
    start = (a * x.cos() + b * (2 * y).cos())[None]
    velocity = solver.velocity(start)[0]
    assert_same_up_to_rounding(velocity[0], (-b / (4 * math.pi) * (2 * y).sin()).expand(12, 12))
    assert_same_up_to_rounding(velocity[1], (a / (2 * math.pi) * x.sin()).expand(12, 12))
    change = (solver.solve(start, [1e-6], dt=1e-6)[0, 0] - start[0]) / 1e-6
    assert rms(change - 1.5 * a * b * x.sin() * (2 * y).sin()) < 1e-5


def test_advection_is_the_convolution_of_the_kept_waves():
    solver, start = NavierStokes2d(10, 0.0, mean_velocity=(0.2, -0.5)), random_fields(10)
    spectrum = torch.fft.fft2(start[0], norm="forward")
    kept = list(itertools.product(range(-3, 4), repeat=2))  # 3 * 3 < 10
    expected = torch.zeros_like(spectrum)
    for p, q in itertools.product(kept, repeat=2):
        k = (p[0] + q[0], p[1] + q[1])
        if k in kept:
            square = 2 * math.pi * (p[0] ** 2 + p[1] ** 2)
            u, v = (1j * p[1] / square * spectrum[p], -1j * p[0] / square * spectrum[p]) if square else (0.2, -0.5)
            expected[k] -= 2j * math.pi * (u * q[0] + v * q[1]) * spectrum[q]
    begin, end = solver.solve(start, [0.0, 1e-6], dt=1e-6)[0]
    expected = torch.fft.ifft2(expected, norm="forward").real
    assert rms((end - begin) / 1e-6 - expected) < 1e-5 * rms(expected)


def test_energy_and_enstrophy_are_conserved_without_viscosity():
    solver, start = NavierStokes2d(24, 0.0), random_fields(24, rms=3.0)

    def drifts(dt):
        first, last = solver.solve(start, [0.0, 1.0], dt=dt)[0]
        energies = [solver.velocity(x[None]).square().mean().item() for x in (first, last)]
        return abs(energies[1] / energies[0] - 1), abs((rms(last) / rms(first)) ** 2 - 1)

    for coarse, fine in zip(drifts(1 / 32), drifts(1 / 64), strict=True):
        assert fine < 1e-5
        assert math.log2(coarse / fine) > 4.5  # what Runge-Kutta damps is of the fifth order


def test_turbulence_converges_with_the_fourth_order_in_time():
    solver = NavierStokes2d(32, 1e-4, classical_forcing(32))
    start = random_fields(32, rms=3.0)
    steps = (64, 128)
    truth = solver.solve(start, [1.0], dt=1 / 512)
    errors = [rms(solver.solve(start, [1.0], dt=1 / count) - truth) for count in steps]
    assert errors[-1] < 1e-4
    assert all(abs(order - 4) < 0.1 for order in orders(steps, errors))


def test_turbulence_converges_spectrally_in_space():
    def solve(resolution):
        solver = NavierStokes2d(resolution, 2e-3, classical_forcing(resolution))
        stride = resolution // 16
        return solver.solve(random_fields(resolution, waves=8, rms=3.0), [1.0], dt=1 / 64)[..., ::stride, ::stride]

    truth = solve(80)
    errors = [rms(solve(resolution) - truth) for resolution in (16, 32, 48)]
    assert errors[-1] < 2e-4
    assert all(fine < coarse / 20 for coarse, fine in itertools.pairwise(errors))


SYMMETRIES = {
    "shift": lambda x: x.roll((3, -5), (-2, -1)),
    "rotation by 180 degrees": lambda x: x.flip(-2, -1),
    "reflection of the first axis": lambda x: -x.flip(-2),
    "reflection of the second axis": lambda x: -x.flip(-1),
    "exchange of the axes": lambda x: -x.mT,
    "rotation by 90 degrees": lambda x: x.mT.flip(-1),
}


@pytest.mark.parametrize("name", SYMMETRIES)
def test_symmetries_act_on_vorticity_and_forcing_together(name):
    act, start, forcing = SYMMETRIES[name], random_fields(32, count=2, rms=3.0), random_fields(32, seed=1)[0]
    solution = NavierStokes2d(32, 1e-4, forcing).solve(start, [0.5], dt=0.02)
    transformed = NavierStokes2d(32, 1e-4, act(forcing)).solve(act(start), [0.5], dt=0.02)
    assert_same_up_to_rounding(transformed, act(solution), name)
    assert rms(act(solution) - solution) > 0.1


def test_float32_differs_from_float64_by_rounding():
    start = random_fields(32, count=2, rms=3.0)
    single, double = (
        NavierStokes2d(32, 1e-4, classical_forcing(32), dtype=dtype).solve(start, [0.5], dt=0.02) for dtype in DTYPES
    )
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert rms(single - double) < 64 * torch.finfo(torch.float32).eps * rms(double)


@pytest.mark.parametrize("steps", [{"dt": 0.03}, {"cfl": 0.7}])
def test_a_trajectory_does_not_depend_on_its_batch(steps):
    start = random_fields(24, count=5) * torch.tensor([0.1, 1.0, 5.0, 1.0, 2.0])[:, None, None]
    solver = NavierStokes2d(24, 1e-4, classical_forcing(24))
    together = solver.solve(start, [0.5, 1.0], **steps)
    alone = torch.cat([solver.solve(x[None], [0.5, 1.0], **steps) for x in start])
    assert_same_up_to_rounding(together, alone, ulps=64)


def test_cfl_chooses_steps_that_are_accurate_and_scale_with_speed():
    start = random_fields(32, rms=3.0)
    solver = NavierStokes2d(32, 1e-4, classical_forcing(32))
    times = [0.25, 0.5, 0.75, 1.0]
    truth = solver.solve(start, times, dt=1 / 256)
    errors = [rms(solver.solve(start, times, cfl=cfl) - truth) for cfl in (1.0, 0.5, 0.25)]
    assert errors[0] < 1e-2
    assert errors[0] / errors[2] > 4**4 / 4  # numbers of steps are rounded up
    assert errors[1] / errors[2] > 2**4 / 4


def test_cfl_foresees_what_the_forcing_sets_in_motion():
    start, forcing = 1e-3 * random_fields(32), random_fields(32, rms=4.0, seed=1)[0]
    solver = NavierStokes2d(32, 1e-3, forcing)
    truth = solver.solve(start, [1.0], dt=1 / 256)
    assert rms(solver.solve(start, [1.0], cfl=1.0) - truth) < 1e-3 * rms(truth)


def test_frames_do_not_depend_on_those_between():
    start = random_fields(24)
    solver = NavierStokes2d(24, 1e-4)
    every = solver.solve(start, [0.1 * i for i in range(1, 11)], dt=0.1)
    last = solver.solve(start, [1.0], dt=0.1)
    assert_same_up_to_rounding(every[:, -1], last[:, 0])


def test_a_step_that_is_too_long_is_named():
    solver = NavierStokes2d(32, 0.0)
    with pytest.raises(SolverError, match=r"blown up by t = 1.*dt = 0\.1 is too long at resolution 32"):
        solver.solve(random_fields(32, rms=60.0), [1.0, 2.0], dt=0.1)
    with pytest.raises(SolverError, match="blown up"):  # while all numbers are finite
        solver.solve(random_fields(32, rms=60.0), [0.1], dt=0.1)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"resolution": 24.0}, TypeError, "resolution"), ({"resolution": 3}, ValueError, "resolution"),
    ({"viscosity": -1e-3}, ValueError, "viscosity"), ({"viscosity": math.nan}, ValueError, "viscosity"),
    ({"dtype": torch.float16}, ValueError, "dtype"), ({"mean_velocity": (1.0,)}, ValueError, "mean_velocity"),
    ({"forcing": torch.zeros(1, 24, 24)}, ValueError, "forcing"),
    ({"forcing": torch.ones(24, 24)}, ValueError, "forcing must have zero mean"),
])
def test_wrong_equations_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        NavierStokes2d(**{"resolution": 24, "viscosity": 1e-3} | arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "one of dt and cfl"), ({"dt": 0.1, "cfl": 1.0}, "one of dt and cfl"), ({"dt": 0.0}, "dt must be positive"),
    ({"cfl": math.inf}, "cfl must be positive"), ({"dt": 0.1, "times": []}, "times must rise"),
    ({"dt": 0.1, "times": [1.0, 1.0]}, "times must rise"), ({"dt": 0.1, "times": [-1.0]}, "times must rise"),
    ({"dt": 0.1, "vorticity": torch.zeros(24, 24)}, "vorticity must be"),
    ({"dt": 0.1, "vorticity": torch.zeros(1, 16, 24)}, "vorticity must be"),
    ({"dt": 0.1, "vorticity": torch.full((1, 24, 24), math.nan)}, "vorticity must be finite"),
    ({"dt": 0.1, "vorticity": torch.ones(1, 24, 24)}, "vorticity must have zero mean"),
])
def test_wrong_calls_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        NavierStokes2d(24, 1e-3).solve(**{"vorticity": torch.zeros(1, 24, 24), "times": [1.0]} | arguments)


def test_eigenvalues_are_those_of_the_formula():
    values = eigenvalues(np.array([0, 1, -2]), np.array([0, 0, 3]), AMPLITUDES["paper"])
    expected = [0.0, *(7**1.5 * (4 * math.pi**2 * square + 49) ** -2.5 for square in (1, 13))]
    assert values == pytest.approx(expected, rel=1e-12)
    assert AMPLITUDES["generator"] == pytest.approx(7**3)


@pytest.mark.parametrize("initial", AMPLITUDES)
def test_initial_fields_have_the_spectrum_of_their_covariance(initial):
    count, resolution = 2000, 12
    rng = np.random.default_rng(0)
    fields = torch.stack([sample_vorticity(resolution, rng, AMPLITUDES[initial]) for _ in range(count)])
    assert fields.dtype == torch.float64
    assert fields.mean((-2, -1)).abs().max() < 1e-12 * fields.abs().max()
    coefficients = torch.fft.fft2(fields, norm="forward")
    kx, ky = np.meshgrid(*[np.fft.fftfreq(resolution, 1 / resolution)] * 2, indexing="ij")
    is_drawn = np.maximum(abs(kx), abs(ky)) < resolution / 2
    expected = torch.from_numpy(np.where(is_drawn, eigenvalues(kx, ky, AMPLITUDES[initial]), 0.0))
    for part in (coefficients.real, coefficients.imag):
        power = 2 * part.square().mean(0)  # the mean of count squares of normal numbers: relative deviation sqrt(2/n)
        assert ((power - expected).abs() <= 5 * math.sqrt(2 / count) * expected + 1e-20).all()
    # pairs of waves are uncorrelated
    first, second = coefficients[:, 1, 2], coefficients[:, 2, 1]
    assert (first * second.conj()).mean().abs() < 5 / math.sqrt(count) * (expected[1, 2] * expected[2, 1]).sqrt()


def test_a_finer_grid_shows_the_same_initial_field():
    coarse, fine = (
        torch.fft.fft2(sample_vorticity(n, np.random.default_rng(5)), norm="forward") for n in (16, 64)
    )
    kept = torch.arange(-7, 8)
    assert_same_up_to_rounding(fine[kept[:, None], kept].abs(), coarse[kept[:, None], kept].abs())
    assert_same_up_to_rounding(fine[kept[:, None], kept].real, coarse[kept[:, None], kept].real)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_solves_the_same():
    start = random_fields(32, count=2, rms=3.0)
    solvers = [NavierStokes2d(32, 1e-4, classical_forcing(32), device=device) for device in ("cpu", "cuda")]
    expected, actual = (solver.solve(start, [0.25, 0.5], cfl=0.7) for solver in solvers)
    assert actual.is_cuda
    assert_same_up_to_rounding(actual.cpu(), expected, ulps=4096)


def test_verification_writes_its_plot_and_numbers(tmp_path, capsys):
    main(["--output", str(tmp_path / "new" / "solver.png")])
    assert "observed orders" in capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "solver.json").read_text())
    assert len(report["dt"]) == len(report["relative_l2_moving"]) == len(report["observed_order"]) + 1
    assert (tmp_path / "new" / "solver.png").stat().st_size > 10_000
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["solver.json", "solver.png"]
