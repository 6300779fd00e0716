"""A pre-norm transformer block, around torus attention or any other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torus_kernels import TorusLattice

from .attention import TorusAttention
from .compounding import State
from .moe import MixtureOfExperts


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """A GELU layer, ``[..., width]`` in and out."""
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))


class AttentionBlock(nn.Module):
    """Pre-RMSNorm block: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    Args:
        width: size of the tokens' embedding.
        attention: takes tokens ``[B, T, width]`` and the state of the block before, and returns both anew.
        ff_width: hidden size of the GELU feed-forward layer; ``4 * width`` by default.
        dropout: probability on the output of each branch.
        experts: how many feed-forward layers there are, all of this size, in a `MixtureOfExperts` where there are more
            than one.
        experts_per_token: how many of them a token goes through.
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        *,
        ff_width: int | None = None,
        dropout: float = 0.0,
        experts: int = 1,
        experts_per_token: int = 2,
    ) -> None:
        super().__init__()
        ff_width = 4 * width if ff_width is None else ff_width
        self.attention_norm = nn.RMSNorm(width)
        self.attention = attention
        self.ff_norm = nn.RMSNorm(width)
        layers = [feed_forward(width, ff_width) for _ in range(experts)]
        self.ff = layers[0] if experts == 1 else MixtureOfExperts(layers, width, experts_per_token)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: State | None = None, **options: Any) -> tuple[Tensor, State | None]:
        """``x`` ``[B, T, width]`` and the state for the next block; the attention takes the ``options``."""
        attended, state = self.attention(self.attention_norm(x), state, **options)
        x = x + self.dropout(attended)
        return x + self.dropout(self.ff(self.ff_norm(x))), state


class TorusBlock(AttentionBlock):
    """A block of torus attention; `forward` takes the arguments of `TorusAttention.forward`.

    Args:
        width, ff_width, dropout, experts, experts_per_token: as in `AttentionBlock`.
        heads, lattice, kv_heads, token_gated, compounding, rotary, ema_momentum, ema_scales, adaptive_alpha, backend:
            as in `TorusAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        lattice: TorusLattice,
        *,
        ff_width: int | None = None,
        dropout: float = 0.0,
        kv_heads: int | None = None,
        token_gated: bool = False,
        compounding: bool = False,
        rotary: str = "lattice",
        ema_momentum: bool = False,
        ema_scales: int = 1,
        adaptive_alpha: bool = False,
        backend: str | None = None,
        experts: int = 1,
        experts_per_token: int = 2,
    ) -> None:
        attention = TorusAttention(
            width, heads, lattice, kv_heads=kv_heads, token_gated=token_gated, compounding=compounding, rotary=rotary,
            ema_momentum=ema_momentum, ema_scales=ema_scales, adaptive_alpha=adaptive_alpha, backend=backend,
        )
        super().__init__(
            width, attention, ff_width=ff_width, dropout=dropout, experts=experts, experts_per_token=experts_per_token
        )
