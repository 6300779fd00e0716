"""Models of fields on a lattice: from a history of frames to the next one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torus_kernels.lattice import NUM_STREAMS

from ..block import TorusBlock
from .config import FieldConfig


class FieldModel(nn.Module):
    """A network that maps ``[B, input_channels, H, W]`` to ``[B, channels, H, W]``, used as a time step.

    The network sees every frame and every static field divided by its scale, and what it returns, times the scale,
    is added to the last frame: a network that returns zero predicts that nothing changes.

    Args:
        config: sizes.
        network: the network; its input has the frames first, oldest to newest, then the static fields.
    """

    def __init__(self, config: FieldConfig, network: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.register_buffer("frame_scale", torch.ones(config.channels))
        self.register_buffer("static_scale", torch.ones(config.static_channels))

    @torch.no_grad()
    def set_scales(self, frames: Tensor, static: Tensor | None = None) -> None:
        """Takes the scale of each channel, its root mean square, from data.

        A scale and no offset: the sign of a vorticity changes under reflection, and zero must stay zero.

        Args:
            frames: ``[..., C, H, W]``.
            static: ``[..., S, H, W]``; where the model has static channels.
        """
        for scale, data in ((self.frame_scale, frames), (self.static_scale, static)):
            if data is not None and scale.numel():
                channels_first = data.movedim(-3, 0).flatten(1)  # [C, points]
                root_mean_square = channels_first.double().square().mean(1).sqrt()
                scale.copy_(torch.where(root_mean_square > 0, root_mean_square, 1.0))

    def forward(self, frames: Tensor, static: Tensor | None = None) -> Tensor:
        """The next frame.

        Args:
            frames: ``[B, history, C, H, W]``, oldest first.
            static: ``[B, S, H, W]``, or a batch of 1; where the model has static channels.

        Returns:
            ``[B, C, H, W]``.

        Raises:
            ValueError: a shape does not fit the configuration.
        """
        config = self.config
        wanted: tuple[int, ...] = (config.history, config.channels, *config.grid)
        if frames.ndim != 5 or tuple(frames.shape[1:]) != wanted:
            raise ValueError(f"frames must be [B, {', '.join(map(str, wanted))}], got {list(frames.shape)}")
        parts = [(frames / self.frame_scale[:, None, None]).flatten(1, 2)]  # [B, history * C, H, W]
        if config.static_channels:
            wanted = (config.static_channels, *config.grid)
            if static is None or static.ndim != 4 or tuple(static.shape[1:]) != wanted:
                got = "none" if static is None else list(static.shape)
                raise ValueError(f"static must be [B, {', '.join(map(str, wanted))}], got {got}")
            parts.append((static / self.static_scale[:, None, None]).expand(frames.shape[0], -1, -1, -1))
        elif static is not None:
            raise ValueError(f"the model has no static channels, but got static {list(static.shape)}")
        change = self.network(torch.cat(parts, 1))  # [B, C, H, W]
        return frames[:, -1] + self.frame_scale[:, None, None] * change

    def rollout(self, frames: Tensor, steps: int, static: Tensor | None = None) -> Tensor:
        """The next ``steps`` frames ``[B, steps, C, H, W]``, each predicted from those before it."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        predicted = []
        for _ in range(steps):
            predicted.append(self(frames, static))
            frames = torch.cat((frames[:, 1:], predicted[-1][:, None]), 1)
        return torch.stack(predicted, 1)


class LatticeTransformer(nn.Module):
    """Square patches become tokens of the lattice, pass the blocks, and become patches again.

    Args:
        config: sizes.
        blocks: each takes tokens ``[B, T, width]`` and the state of the block before, and returns both.
    """

    def __init__(self, config: FieldConfig, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.patch = config.patch
        self.rows = config.lattice.n_major
        points = config.patch**2
        self.embed = nn.Linear(config.input_channels * points, config.width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.channels * points)
        nn.init.zeros_(self.head.weight)  # the untrained model predicts that nothing changes
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, input_channels, H, W] -> [B, channels, H, W]``."""
        patches = F.pixel_unshuffle(x, self.patch)  # [B, channels * patch^2, rows, columns]
        x = self.embed(patches.flatten(2).transpose(1, 2))  # [B, T, width], row-major
        state = None
        for block in self.blocks:
            x, state = block(x, state)
        patches = self.head(self.norm(x)).transpose(1, 2).unflatten(2, (self.rows, -1))
        return F.pixel_shuffle(patches, self.patch)


class TorusField(FieldModel):
    """A transformer whose tokens, patches of the field, sit on a torus or a cylinder and attend through its streams.

    Nothing in it knows where the grid was cut: rolling the input by whole patches rolls the output.

    Args:
        config: the architecture; its ``network`` is not looked at.
        backend: backend of `torus_attention` in every layer.
    """

    def __init__(self, config: FieldConfig, backend: str | None = None) -> None:
        super().__init__(config, LatticeTransformer(config, (
            TorusBlock(
                config.width, config.heads, config.lattice, ff_width=config.ff_width, dropout=config.dropout,
                token_gated=config.token_gated, compounding=layer > 0, backend=backend,
            )
            for layer in range(config.layers)
        )))
        # Every stream starts flat: training from the operator's default decay ended with larger errors.
        for block in self.network.blocks:
            block.attention.reset_stream_parameters(decay=(0.0,) * NUM_STREAMS)
