"""The networks of fields by name, and their sizes made equal."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from torus_kernels import Stream
from torus_kernels.backends import check_name

from .baselines import DenseField, FourierField, UNetField, WindowField
from .baselines.fourier import most_modes
from .config import FieldConfig
from .model import FieldModel, TorusField

LOOPS = (Stream.major_forward, Stream.major_backward, Stream.minor_forward, Stream.minor_backward)
"""The streams of the network ``loops``."""

FOURIER_CHANNELS = 20
"""Channels of the Fourier neural operator in Li et al. (2021). Where parameters are few, it is better to have about as
many and fewer modes than the other way round."""

PARAMETER_TOLERANCE = 0.04
"""Relative difference up to which numbers of parameters count as equal."""


def loops_field(config: FieldConfig, backend: str | None = None) -> TorusField:
    """A `TorusField` that attends along the four loops alone, whatever ``config.streams`` says.

    This is axial attention (Ho et al. 2019) with the two directions of each loop apart. Rolls by whole patches
    commute with it, as with the torus.
    """
    return TorusField(dataclasses.replace(config, streams=tuple(s.name for s in LOOPS)), backend)


NETWORKS: dict[str, Callable[[FieldConfig, str | None], FieldModel]] = {
    "torus": TorusField,
    "loops": loops_field,
    "windows": lambda config, _: WindowField(config, wrap=False),
    "windows-periodic": lambda config, _: WindowField(config, wrap=True),
    "dense": lambda config, _: DenseField(config),
    "fourier": lambda config, _: FourierField(config),
    "unet": lambda config, _: UNetField(config),
}
"""The networks by their name in `FieldConfig.network`. What commutes with each on a periodic grid:

========================  =====================================================
torus, loops, dense       rolls by whole patches
windows-periodic          rolls by whole windows
windows                   no rolls
fourier                   rolls by any number of points
unet                      rolls by ``2**LEVELS`` points
========================  =====================================================
"""


def build_model(config: FieldConfig, backend: str | None = None) -> FieldModel:
    """The untrained model of a configuration, which predicts that nothing changes.

    Args:
        config: the architecture.
        backend: backend of `torus_attention`; the networks without it do not look at it.

    Raises:
        TypeError, ValueError: there is no such network or backend, or the network refuses a field of ``config``.
    """
    if config.network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {config.network!r}")
    return NETWORKS[config.network](config, None if backend is None else check_name(backend))


def number_of_parameters(model: nn.Module) -> int:
    """Learned numbers of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def equal_parameters(config: FieldConfig, network: str) -> FieldConfig:
    """The configuration of ``network`` whose number of parameters is nearest to that of ``config``'s torus.

    It differs in ``ff_width``: the hidden size of a network of tokens, in steps of 8, while depth, heads and width of
    the tokens are kept; the channels of the U-Net and of the Fourier network. The latter's ``modes`` are chosen too: of
    the sizes within `PARAMETER_TOLERANCE` the one whose channels are nearest to `FOURIER_CHANNELS`, or, where there is
    none, the nearest size. The others have one size to choose, so a small model may stay further away than that.

    Raises:
        TypeError, ValueError: there is no such network, or it refuses a field of ``config``.
    """
    def count(candidate: FieldConfig) -> int:
        with torch.device("meta"):  # shapes alone
            return number_of_parameters(build_model(candidate))

    target = count(dataclasses.replace(config, network="torus"))

    def difference(candidate: FieldConfig) -> int:
        return abs(count(candidate) - target)

    def nearest(start: FieldConfig, step: int) -> FieldConfig:
        def sized(ff_width: int) -> FieldConfig:
            return dataclasses.replace(start, ff_width=ff_width)

        sizes = range(step, 16 * config.width + 1, step)
        above = bisect.bisect_left(sizes, target, key=lambda size: count(sized(size)))
        return min(map(sized, sizes[max(0, above - 1) : above + 1]), key=difference)

    start = dataclasses.replace(config, network=network)
    if network == "torus":
        return start
    if network == "unet":
        return nearest(start, step=1)
    if network != "fourier":
        return nearest(start, step=8)
    found = [nearest(dataclasses.replace(start, modes=modes), step=1) for modes in range(1, most_modes(start) + 1)]
    equal = [candidate for candidate in found if difference(candidate) <= PARAMETER_TOLERANCE * target]
    return min(equal, key=lambda c: abs(c.ff_width - FOURIER_CHANNELS)) if equal else min(found, key=difference)
