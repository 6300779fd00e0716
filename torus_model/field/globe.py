"""A tracer in zonal winds around a globe: a flow on a cylinder, closed in longitude, whose solution is known exactly.

A wind along the circles of latitude, u(phi), carries a tracer c at the angular velocity Omega = u / (a cos(phi)),
while it diffuses along the circles::

    dc/dt + Omega(phi) dc/dlambda = K / (a cos(phi))^2 d2c/dlambda2

Every circle of latitude turns by itself, so that the Fourier coefficient k of a row at time t is the one at time 0
times ``exp(-i k Omega t - K k^2 t / (a cos(phi))^2)``: the solution at any time, without time steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .data import FieldData

RADIUS = 6.371e6
"""Mean radius of the Earth, a, in metres."""

_HOUR = 3600.0  # seconds


def latitudes(rows: int) -> Tensor:
    """Latitudes of the rows ``[H]`` in radians, float64, from south to north: the middles of H equal bands."""
    return math.pi * ((torch.arange(rows, dtype=torch.float64) + 0.5) / rows - 0.5)


def longitudes(columns: int) -> Tensor:
    """Longitudes of the columns ``[W]`` in radians, float64, eastwards from the dateline at -pi: the middles of W equal
    sectors."""
    return 2 * math.pi * ((torch.arange(columns, dtype=torch.float64) + 0.5) / columns - 0.5)


def solid_body_wind(latitude: Tensor, speed: Tensor | float) -> Tensor:
    """Wind in m/s of a rotation of the whole atmosphere, ``speed`` at the equator: one angular velocity everywhere.

    Source: test case 1 of Williamson, Drake, Hack, Jakob and Swarztrauber, "A standard test set for numerical
    approximations to the shallow water equations in spherical geometry", J. Comput. Phys. 102 (1992).
    """
    return speed * latitude.cos()


def jet_wind(
    latitude: Tensor, speed: Tensor | float, centre: Tensor | float = math.pi / 4,
    half_width: Tensor | float = math.pi / 4 - math.pi / 7,
) -> Tensor:
    """Wind in m/s of a mid-latitude jet: ``speed`` at its centre, zero from ``half_width`` on, smooth throughout.

    Source, also of the defaults: Galewsky, Scott and Polvani, "An initial-value problem for testing numerical models
    of the global shallow-water equations", Tellus A 56 (2004), equation 2.

    Args:
        latitude: radians. All arguments broadcast.
        speed: m/s.
        centre, half_width: radians.
    """
    x = (latitude - centre) / half_width
    inside = x.abs() < 1
    return torch.where(inside, speed * torch.exp((1 - 1 / (1 - torch.where(inside, x, 0.0) ** 2)) / half_width**2), 0.0)


def tracer_clouds(
    latitude: Tensor, longitude: Tensor, centres: Tensor, amplitudes: Tensor, width: float = 0.25
) -> Tensor:
    """Clouds that are round and smooth on the globe: bumps ``exp((cos(distance) - 1) / width^2)``, summed.

    Args:
        latitude, longitude: ``[H]`` and ``[W]``, radians.
        centres: ``[..., clouds, 2]``, latitude and longitude of each cloud in radians.
        amplitudes: ``[..., clouds]``.
        width: radius of a cloud in radians.

    Returns:
        ``[..., H, W]``.
    """
    phi, lam = centres[..., 0, None, None], centres[..., 1, None, None]  # [..., clouds, 1, 1]
    phi_here = latitude[:, None]
    cosine = phi_here.sin() * phi.sin() + phi_here.cos() * phi.cos() * (longitude - lam).cos()
    return (amplitudes[..., None, None] * torch.exp((cosine - 1) / width**2)).sum(-3)


def advect(initial: Tensor, wind: Tensor, hours: Sequence[float] | Tensor, diffusivity: float = 0.0) -> Tensor:
    """The tracer at the given times, exact for a tracer that the columns resolve.

    With an even number of columns the highest wavenumber is left out: a grid does not tell which way it moves.

    Args:
        initial: the tracer at time 0, ``[..., H, W]``, rows at `latitudes`.
        wind: ``[..., H]`` in m/s, eastwards.
        hours: times ``[F]``.
        diffusivity: K in m^2/s.

    Returns:
        ``[..., F, H, W]``, float64.

    Raises:
        ValueError: ``wind`` does not have the rows of ``initial``, or ``diffusivity`` is negative or not finite.
    """
    rows, columns = initial.shape[-2:]
    if wind.shape[-1] != rows:
        raise ValueError(f"wind must have the {rows} rows of initial, got {list(wind.shape)}")
    if not 0 <= diffusivity < math.inf:
        raise ValueError(f"diffusivity must be at least 0 and finite, got {diffusivity}")
    seconds = _HOUR * torch.as_tensor(hours, dtype=torch.float64)[:, None, None]  # [F, 1, 1]
    circle = RADIUS * latitudes(rows).cos()  # [H], metres per radian of longitude
    wavenumber = torch.arange(columns // 2 + 1, dtype=torch.float64)
    turn = wavenumber * (wind.double() / circle)[..., None, :, None] * seconds  # [..., F, H, W/2 + 1]
    decay = diffusivity * (wavenumber / circle[:, None]) ** 2 * seconds
    spectrum = torch.fft.rfft(initial.double()).unsqueeze(-3) * torch.polar(torch.exp(-decay), -turn)
    if columns % 2 == 0:
        spectrum[..., -1] = 0
    return torch.fft.irfft(spectrum, n=columns)


def random_winds(trajectories: int, rows: int, seed: int = 0) -> Tensor:
    """Random winds ``[N, H]`` in m/s, eastwards, at `latitudes`.

    A solid-body rotation of up to 20 m/s either way, and in each hemisphere a jet of 40 to 80 m/s, whose centre lies
    within 10 degrees of 45, and which is wider than that of `jet_wind`'s source: coarse grids must resolve it.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(trajectories, 1, generator=generator, dtype=torch.float64)

    latitude = latitudes(rows)
    wind = solid_body_wind(latitude, uniform(-20, 20))
    for hemisphere in (1, -1):
        centre = hemisphere * torch.deg2rad(uniform(35, 55))
        wind = wind + jet_wind(latitude, uniform(40, 80), centre, math.radians(30))
    return wind


def random_tracers(trajectories: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Random smooth tracers ``[N, H, W]``: 24 `tracer_clouds` each, spread evenly over the sphere."""
    generator = torch.Generator().manual_seed(seed)
    longitude, sine = (2 * torch.rand(2, trajectories, 24, generator=generator, dtype=torch.float64) - 1).unbind()
    centres = torch.stack((sine.asin(), math.pi * longitude), -1)  # [N, clouds, 2]
    amplitudes = torch.randn(trajectories, 24, generator=generator, dtype=torch.float64)
    return tracer_clouds(latitudes(grid[0]), longitudes(grid[1]), centres, amplitudes)


def generate_globe(
    trajectories: int,
    frames: int,
    grid: tuple[int, int] = (32, 64),
    *,
    hours: float = 6.0,
    diffusivity: float = 0.0,
    seed: int = 0,
) -> FieldData:
    """Trajectories of random tracers in random winds, for a field model of topology ``"cylinder"``.

    The winds differ from trajectory to trajectory and are not among the fields: a model that is to predict the tracer
    has to tell them from two frames or more.

    The tracer is a scalar: its parity is +1. Mirrored at the equator, or from east to west, every trajectory is again
    a solution, in the mirrored wind. East to west, that wind is not one that `random_winds` draws: its jets blow
    westwards.

    Args:
        trajectories, frames: N and F.
        grid: rows, from the south pole to the north pole, and columns, eastwards from the dateline.
        hours: from frame to frame.
        diffusivity: K in m^2/s, as in `advect`.
        seed: of the winds, as in `random_winds`, and of the tracers, ``seed + 1`` in `random_tracers`.

    Raises:
        ValueError: a number is out of range.
    """
    for name, value in (("trajectories", trajectories), ("frames", frames)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if len(grid) != 2 or min(grid) < 2:
        raise ValueError(f"grid must be two numbers of at least 2, got {grid}")
    if not 0 < hours < math.inf:
        raise ValueError(f"hours must be positive and finite, got {hours}")
    tracers = advect(
        random_tracers(trajectories, grid, seed + 1),
        random_winds(trajectories, grid[0], seed),
        hours * torch.arange(frames, dtype=torch.float64),
        diffusivity,
    )
    parameters = {"flow": "globe", "topology": "cylinder", "hours": hours, "diffusivity": diffusivity, "seed": seed}
    return FieldData(tracers[:, :, None].float(), parity=(1,), parameters=parameters)
