"""Gaussian random fields on the periodic unit square: the initial vorticity of the classical Navier-Stokes task."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

TAU = 7.0
ALPHA = 2.5

AMPLITUDES = {"paper": TAU**1.5, "generator": TAU**3}
"""The factor ``A`` of the covariance operator ``A (-Laplacian + 49 I)^{-2.5}``, by where it is stated.

``paper``: ``7^{3/2}``, the formula of Li et al., "Fourier Neural Operator for Parametric Partial Differential
Equations" (ICLR 2021), appendix A.3.3. ``generator``: ``7^3``, what the code published with that paper draws: there
``7^{3/2}`` multiplies the field, so that the covariance has its square. (With the normal numbers of its first revision,
whose real and imaginary parts had unit variance each, it was twice that.) Vorticity is 4.3 times as large, and turns
over as much faster.
"""


def eigenvalues(kx: np.ndarray, ky: np.ndarray, amplitude: float) -> np.ndarray:
    """Eigenvalues ``A (4 pi^2 |k|^2 + 49)^{-2.5}`` of the covariance operator, and 0 for the mean (``k = 0``).

    The eigenfunctions, orthonormal on the unit square, are ``sqrt(2) cos(2 pi k.x)`` and ``sqrt(2) sin(2 pi k.x)``, so
    that the field's variance is the sum over all integer wavevectors.
    """
    square = kx.astype(np.float64) ** 2 + ky**2
    return np.where(square > 0, amplitude * (4 * math.pi**2 * square + TAU**2) ** -ALPHA, 0.0)


def sample_vorticity(resolution: int, rng: np.random.Generator, amplitude: float = AMPLITUDES["paper"]) -> Tensor:
    """Draws one field of ``N(0, A (-Laplacian + 49 I)^{-2.5})``, of zero mean.

    By the Karhunen-Loeve expansion it is the sum of the eigenfunctions times the root of their eigenvalues times
    independent unit normal numbers. These are drawn from the longest waves to the shortest, so that a finer grid
    with the same ``rng`` shows the same field and adds shorter waves to it.

    Args:
        resolution: points along each side (n); wavenumbers are below n / 2.
        rng: source of the normal numbers.
        amplitude: ``A``, see `AMPLITUDES`.

    Returns:
        ``[n, n]`` float64.
    """
    kx, ky = _wavevectors(resolution)
    cosine, sine = rng.standard_normal((len(kx), 2)).T
    # sqrt(2 L) (a cos + b sin) = c e^{2 pi i k.x} + its conjugate, with c = sqrt(L / 2) (a - i b)
    coefficients = np.sqrt(eigenvalues(kx, ky, amplitude) / 2) * (cosine - 1j * sine)
    spectrum = np.zeros((resolution, resolution // 2 + 1), dtype=np.complex128)
    spectrum[kx, ky] = coefficients
    on_axis = ky == 0  # where rfft2 also stores -k
    spectrum[-kx[on_axis], 0] = coefficients[on_axis].conj()
    return torch.fft.irfft2(torch.from_numpy(spectrum), s=(resolution, resolution), norm="forward")


@functools.cache
def _wavevectors(resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """One of ``k`` and ``-k`` for each pair with ``0 < max(|kx|, |ky|) < n / 2``, by rising maximum."""
    largest = (resolution - 1) // 2
    kx, ky = (k.ravel() for k in np.mgrid[-largest:largest + 1, 0:largest + 1])
    is_first = (ky > 0) | (kx > 0)
    kx, ky = kx[is_first], ky[is_first]
    order = np.lexsort((ky, kx, np.maximum(abs(kx), ky)))
    return kx[order], ky[order]
