"""Dense attention: every patch sees every other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from torus_kernels import lattice_rope

from ...block import AttentionBlock
from ..config import FieldConfig
from ..model import FieldModel, LatticeTransformer


class DenseAttention(nn.Module):
    """Multi-head attention of all tokens of the lattice to all.

    Projections, QK-norm and lattice rope are those of `TorusAttention`, so that two such layers differ in who sees
    whom alone. There is no state.

    Args:
        config: sizes.
    """

    def __init__(self, config: FieldConfig) -> None:
        super().__init__()
        self.lattice = config.lattice
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.width // config.heads)
        self.k_norm = nn.RMSNorm(config.width // config.heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, H, T, D] -> [B, H, T, D]``."""
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        """``x`` ``[B, T, width]``, row-major; returns the projected output ``[B, T, width]`` and no state."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = self.attend(lattice_rope(q, self.lattice), lattice_rope(k, self.lattice), v)
        return self.out_proj(out.transpose(1, 2).flatten(-2)), None


class DenseField(FieldModel):
    """A transformer of dense attention: a ViT (Dosovitskiy et al. 2021) with the lattice's rotary positions.

    Its positions wrap, so that rolls by whole patches commute with it; on the cylinder, rolls along the second axis.

    Args:
        config: the architecture; its ``network`` is not looked at.
    """

    def __init__(self, config: FieldConfig) -> None:
        super().__init__(config, LatticeTransformer(config, (
            AttentionBlock(config.width, DenseAttention(config), ff_width=config.ff_width, dropout=config.dropout)
            for _ in range(config.layers)
        )))
