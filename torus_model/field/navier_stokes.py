"""Incompressible Navier-Stokes in two dimensions, in vorticity form on the periodic unit square, pseudo-spectrally.

    d omega / dt + u . grad omega = nu Laplacian omega + f
    u = (d psi / dy, -d psi / dx) + U,  Laplacian psi = -omega

with x along the first axis of the grid (H) and y along the second (W), as in the public datasets, and U uniform.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SolverError(RuntimeError):
    """The solution has blown up; the message names the time step."""


def classical_forcing(resolution: int) -> Tensor:
    """``0.1 (sin 2 pi (x + y) + cos 2 pi (x + y))``, ``[n, n]`` float64: the forcing of Li et al., "Fourier Neural
    Operator for Parametric Partial Differential Equations" (ICLR 2021)."""
    x = torch.arange(resolution, dtype=torch.float64) / resolution
    phase = 2 * math.pi * (x[:, None] + x)
    return 0.1 * (phase.sin() + phase.cos())


class _LinearFlow(NamedTuple):
    """The exact solution of ``d w / dt = -nu |2 pi k|^2 w + f`` over half a step and a step: ``decay * w + gain``."""

    dt: float
    half_decay: Tensor
    half_gain: Tensor
    decay: Tensor
    gain: Tensor


class NavierStokes2d:
    """A solver for batches of trajectories on one grid.

    Products are formed on the grid and cut off to wavenumbers below a third of its points, where they are free of
    aliasing (Orszag's 2/3 rule), so that without viscosity and forcing the equations in space conserve energy and
    enstrophy exactly. The divergence of the momentum flux needs four real transforms for each evaluation:
    ``-u . grad omega = (d_yy - d_xx) u v - d_xy (v^2 - u^2)`` (Basdevant, J. Comput. Phys. 50, 1983). Time stepping is
    the classical fourth-order Runge-Kutta method on the advection, with viscosity and forcing integrated exactly.

    Args:
        resolution: points along each side (N).
        viscosity: nu >= 0, in units of side^2 / time.
        forcing: ``[N, N]``, of zero mean, constant in time; None for none. It is cut off as products are.
        mean_velocity: U, the components along the first and the second axis. It does not change with time.
        dtype: float32 or float64, of the computation and of the results.
        device: where to compute.

    Raises:
        TypeError, ValueError: an argument has the wrong type, value or shape; the message names it.
    """

    def __init__(
        self,
        resolution: int,
        viscosity: float,
        forcing: Tensor | None = None,
        mean_velocity: tuple[float, float] = (0.0, 0.0),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(resolution, bool) or not isinstance(resolution, int):
            raise TypeError(f"resolution must be an integer, got {resolution!r}")
        if resolution < 4:
            raise ValueError(f"resolution must be at least 4, got {resolution}")
        if not 0 <= viscosity < math.inf:
            raise ValueError(f"viscosity must be finite and not negative, got {viscosity}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.resolution = resolution
        self.viscosity = float(viscosity)
        self.dtype = dtype
        self.device = torch.device(device)
        self.largest_wavenumber = (resolution - 1) // 3  # K: 3 K < N
        # Spectra are held as pairs of real numbers, [B, N, K + 1, 2]: real factors then multiply them at half the cost.
        kx = 2 * math.pi * torch.fft.fftfreq(resolution, 1 / resolution, dtype=torch.float64)[:, None]
        ky = 2 * math.pi * torch.arange(self.largest_wavenumber + 1, dtype=torch.float64)
        square = kx**2 + ky**2  # [N, K + 1]
        kept = (kx.abs() < 2 * math.pi * (self.largest_wavenumber + 0.5)) & (square > 0)
        inverse = torch.where(square > 0, 1 / square, 0.0)

        def for_pairs(factor: Tensor) -> Tensor:
            return factor[..., None].expand(-1, -1, 2).contiguous().to(self.device)  # [N, K + 1, 2]

        self._kept = for_pairs(kept)
        self._damping = for_pairs(self.viscosity * square)
        self._of_uv = for_pairs(torch.where(kept, kx**2 - ky**2, 0.0)).to(dtype)
        self._of_squares = for_pairs(torch.where(kept, kx * ky, 0.0)).to(dtype)
        complex_dtype = torch.complex64 if dtype == torch.float32 else torch.complex128
        self._to_velocity = torch.stack((1j * ky * inverse, -1j * kx * inverse)).to(self.device, complex_dtype)
        self._mean_velocity = torch.tensor(mean_velocity, dtype=dtype, device=self.device)
        if tuple(self._mean_velocity.shape) != (2,):
            raise ValueError(f"mean_velocity must be two numbers, got {mean_velocity}")
        forcing = torch.zeros(resolution, resolution) if forcing is None else forcing
        if forcing.ndim != 2:
            raise ValueError(f"forcing must be [{resolution}, {resolution}], got {list(forcing.shape)}")
        self._forcing = self._checked_spectrum("forcing", forcing)  # float64
        acceleration = self._velocity(self._forcing.to(dtype)[None]) - self._mean_velocity[:, None, None]
        self._acceleration = _largest_speed(acceleration).item()
        self._forcing_norm = _norm(self._to_grid(self._forcing[None])).item()
        self._flow: _LinearFlow | None = None  # of the last step

    def solve(
        self,
        vorticity: Tensor,
        times: Sequence[float],
        *,
        dt: float | None = None,
        cfl: float | None = None,
    ) -> Tensor:
        """The vorticity at ``times``, from that at time 0.

        Args:
            vorticity: ``[B, N, N]``, of zero mean. Its wavenumbers from ``N / 3`` on are cut off.
            times: rising, not negative. Steps end on each of them.
            dt: largest step; each interval between times takes equal steps, as long as this allows.
            cfl: instead of ``dt``: about the largest ``step * (|u| + |v|) * N`` on the grid. Each trajectory cuts each
                interval between times by its own speed at the beginning and what the forcing may add to it, whatever
                else is in the batch. The scheme is stable up to about 1.3 (``2 sqrt(2) / (2 pi / 3)``).

        Returns:
            ``[B, len(times), N, N]`` in the solver's dtype.

        Raises:
            ValueError: an argument has the wrong value or shape; the message names it.
            SolverError: the solution has blown up, because the step was too long. The norm of the exact one grows by
                no more than that of the forcing times time; this is what is checked at each of ``times``.
        """
        if (dt is None) == (cfl is None):
            raise ValueError(f"one of dt and cfl must be given, got dt={dt} and cfl={cfl}")
        for name, value in (("dt", dt), ("cfl", cfl)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not len(times) or times[0] < 0 or any(b <= a for a, b in itertools.pairwise(times)):
            raise ValueError(f"times must rise and not be negative, got {list(times)}")
        if vorticity.ndim != 3:
            raise ValueError(f"vorticity must be [B, {self.resolution}, {self.resolution}], "
                             f"got {list(vorticity.shape)}")
        spectrum = self._checked_spectrum("vorticity", vorticity).to(self.dtype)
        frames = torch.empty(
            len(vorticity), len(times), self.resolution, self.resolution, dtype=self.dtype, device=self.device
        )
        start, now = _norm(self._to_grid(spectrum)), 0.0
        for frame, time in enumerate(times):
            spectrum, step = self._advance(spectrum, time - now, dt, cfl)
            now = time
            frames[:, frame] = self._to_grid(spectrum)
            bound = 1.01 * (start + time * self._forcing_norm)
            if not (_norm(frames[:, frame]) <= bound).all():  # so that NaN is caught
                raise SolverError(f"the vorticity has blown up by t = {time:g}: the time step dt = {step:.3g} is too "
                                  f"long at resolution {self.resolution}; take a smaller one")
        return frames

    def velocity(self, vorticity: Tensor) -> Tensor:
        """The velocity ``[B, 2, N, N]`` of a vorticity ``[B, N, N]``; the mean velocity is part of it."""
        return self._velocity(self._checked_spectrum("vorticity", vorticity).to(self.dtype))

    def _advance(self, spectrum: Tensor, interval: float, dt: float | None, cfl: float | None) -> tuple[Tensor, float]:
        """The spectrum after ``interval``, and the shortest step taken."""
        if interval == 0:
            return spectrum, 0.0
        if dt is not None:
            # The slack keeps an interval of n steps from being cut into n + 1 by its rounding.
            count = max(1, math.ceil(interval / dt * (1 - 1e-9)))
            return self._take_steps(spectrum, count, interval / count), interval / count
        speeds = _largest_speed(self._velocity(spectrum)) + interval * self._acceleration  # [B]
        needed = (interval * self.resolution / cfl * speeds).tolist()
        counts = torch.tensor([_few_values(x) for x in needed], device=self.device)
        advanced = torch.empty_like(spectrum)
        for count in counts.unique().tolist():
            advanced[counts == count] = self._take_steps(spectrum[counts == count], count, interval / count)
        return advanced, interval / counts.max().item()

    def _take_steps(self, spectrum: Tensor, count: int, dt: float) -> Tensor:
        for _ in range(count):
            spectrum = self._step(spectrum, dt)
        return spectrum

    def _step(self, spectrum: Tensor, dt: float) -> Tensor:
        """One step of the integrating-factor Runge-Kutta method.

        With ``E`` the linear flow over half a step: ``E w + dt/2 E k1``, ``E w + dt/2 k2`` and ``E E w + dt E k3`` are
        where the later stages are taken, and the step ends at ``E E w + dt/6 (E E k1 + 2 E (k2 + k3) + k4)``.
        """
        flow = self._linear_flow(dt)
        first = self._advection(self._velocity(spectrum))
        half = torch.addcmul(flow.half_gain, flow.half_decay, spectrum)
        whole = torch.addcmul(flow.gain, flow.decay, spectrum)
        second = self._advection(self._velocity(torch.addcmul(half, flow.half_decay, first, value=dt / 2)))
        third = self._advection(self._velocity(half.add_(second, alpha=dt / 2)))
        fourth = self._advection(self._velocity(torch.addcmul(whole, flow.half_decay, third, value=dt)))
        whole.addcmul_(flow.decay, first, value=dt / 6)
        whole.addcmul_(flow.half_decay, second.add_(third), value=dt / 3)
        return whole.add_(fourth, alpha=dt / 6)

    def _linear_flow(self, dt: float) -> _LinearFlow:
        if self._flow is None or self._flow.dt != dt:
            parts = []
            for time in (dt / 2, dt):
                exponent = self._damping * time
                # integral of exp(-damping s) for s from 0 to time
                growth = torch.where(exponent > 0, -torch.expm1(-exponent) / self._damping, time)
                parts += [torch.exp(-exponent).to(self.dtype), (self._forcing * growth).to(self.dtype)]
            self._flow = _LinearFlow(dt, *parts)
        return self._flow

    def _velocity(self, spectrum: Tensor) -> Tensor:
        """``[B, N, K + 1, 2] -> [B, 2, N, N]``."""
        size = self.resolution
        spectra = self._to_velocity.new_zeros(len(spectrum), 2, size, size // 2 + 1)
        kept = spectra[..., : self.largest_wavenumber + 1]
        torch.mul(torch.view_as_complex(spectrum)[:, None], self._to_velocity, out=kept)
        kept[..., 0, 0] = self._mean_velocity.to(kept.dtype)
        return torch.fft.irfft2(spectra, s=(size, size), norm="forward")

    def _advection(self, velocity: Tensor) -> Tensor:
        """The spectrum of ``-u . grad omega``: ``[B, 2, N, N] -> [B, N, K + 1, 2]``."""
        u, v = velocity.unbind(1)
        products = torch.empty_like(velocity)
        torch.mul(u, v, out=products[:, 0])
        torch.mul(v, v, out=products[:, 1]).addcmul_(u, u, value=-1)
        uv, squares = self._to_spectrum(products).unbind(1)
        return torch.mul(uv, self._of_uv).addcmul_(squares, self._of_squares)

    def _to_spectrum(self, values: Tensor) -> Tensor:
        """``[..., N, N] -> [..., N, K + 1, 2]``: Fourier coefficients in columns up to the largest wavenumber."""
        spectrum = torch.fft.rfft2(values, norm="forward")
        return torch.view_as_real(spectrum)[..., : self.largest_wavenumber + 1, :]

    def _to_grid(self, spectrum: Tensor) -> Tensor:
        """``[B, N, K + 1, 2] -> [B, N, N]``."""
        padding = (0, self.resolution // 2 - self.largest_wavenumber)
        padded = torch.nn.functional.pad(torch.view_as_complex(spectrum), padding)
        return torch.fft.irfft2(padded, s=(self.resolution, self.resolution), norm="forward")

    def _checked_spectrum(self, name: str, values: Tensor) -> Tensor:
        if values.ndim not in (2, 3) or values.shape[-2:] != (self.resolution, self.resolution):
            raise ValueError(f"{name} must be [{self.resolution}, {self.resolution}], possibly of a batch, "
                             f"got {list(values.shape)}")
        values = values.to(self.device, torch.float64)
        if not values.isfinite().all():
            raise ValueError(f"{name} must be finite")
        scale = values.square().mean((-2, -1)).sqrt()
        # The curl of a periodic field has no mean.
        if (values.mean((-2, -1)).abs() > 1e-5 * scale).any():
            raise ValueError(f"{name} must have zero mean, got {values.mean((-2, -1)).abs().max().item():.3g}")
        return torch.where(self._kept, self._to_spectrum(values), 0.0)  # float64 [..., N, K + 1, 2]


def _largest_speed(velocity: Tensor) -> Tensor:
    """The maximum of ``|u| + |v|``: ``[B, 2, N, N] -> [B]``."""
    return velocity.abs().sum(1).amax((-2, -1))


def _norm(values: Tensor) -> Tensor:
    """Root mean square over the grid, the norm of the unit square: ``[..., N, N] -> [...]``, float64."""
    return values.double().square().mean((-2, -1)).sqrt()


def _few_values(needed: float) -> int:
    """The least integer of the form ``{4, 5, 6, 7} * 2^k`` that is not below, or 1 to 3: at most a quarter too many.

    Trajectories that need about as many steps then take as many, and are advanced together.
    """
    count = max(1, math.ceil(needed))
    unit = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // unit) * unit
