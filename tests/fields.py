"""What the tests of models of fields share: exact data that needs no solver, and models that predict something."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torus_model.field import FieldConfig, FieldModel
from torus_model.field.data import FieldData
from torus_model.field.networks import build_model


def travelling_waves(
    trajectories: int, frames: int, grid: tuple[int, int] = (8, 8), seed: int = 0, static: bool = False
) -> FieldData:
    """Sums of plane waves, each of which runs half a point of the second axis a frame; exact, and quickly learnt."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = grid
    x = torch.arange(rows)[:, None] / rows
    y = torch.arange(columns) / columns
    waves = torch.zeros(trajectories, frames, *grid)
    time = torch.arange(frames)[:, None, None] / (2 * columns)
    for kx, ky in ((0, 1), (1, 1), (1, -1)):
        amplitude, phase = torch.rand(2, trajectories, 1, 1, 1, generator=random)
        waves += amplitude * torch.cos(2 * math.pi * (kx * x + ky * (y - time) + phase))
    given = torch.rand(1, 1, *grid, generator=random) if static else None
    return FieldData(waves[:, :, None], given, parity=(-1,), static_parity=(-1,) if static else None)


@torch.no_grad()
def disturbed_model(config: FieldConfig, backend: str = "reference", dtype: torch.dtype = torch.float64) -> FieldModel:
    """The same model every time, with noise on every parameter: none is left at a value, such as zero, that hides
    its effect. In evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(config, backend)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


class Rule(nn.Module):
    """A network without anything learned: the next frame minus the last is ``change(last)``."""

    def __init__(self, config: FieldConfig, change) -> None:
        super().__init__()
        self.newest = slice((config.history - 1) * config.channels, config.history * config.channels)
        self.change = change
        self.unused = nn.Parameter(torch.zeros(1))  # a model has a device

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x[:, self.newest])


def rule_model(config: FieldConfig, change) -> FieldModel:
    """A model that follows a `Rule`, in evaluation mode."""
    return FieldModel(config, Rule(config, change)).eval()
