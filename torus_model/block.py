"""A transformer block around torus attention."""

from __future__ import annotations

from torch import Tensor, nn

from torus_kernels import TorusLattice

from .attention import TorusAttention


class TorusBlock(nn.Module):
    """Pre-RMSNorm block: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    Args:
        width: size of the tokens' embedding.
        heads: query heads.
        lattice: who sees whom.
        ff_width: hidden size of the GELU feed-forward layer; ``4 * width`` by default.
        dropout: probability on the output of each branch.
        kv_heads, token_gated, compounding, backend: as in `TorusAttention`.
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
        backend: str | None = None,
    ) -> None:
        super().__init__()
        ff_width = 4 * width if ff_width is None else ff_width
        self.attention_norm = nn.RMSNorm(width)
        self.attention = TorusAttention(
            width, heads, lattice, kv_heads=kv_heads, token_gated=token_gated, compounding=compounding, backend=backend
        )
        self.ff_norm = nn.RMSNorm(width)
        self.ff = nn.Sequential(
            nn.Linear(width, ff_width, bias=False), nn.GELU(), nn.Linear(ff_width, width, bias=False)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, first_key: Tensor | None = None, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """``x`` ``[B, T, width]`` and the state for the next block, as `TorusAttention.forward`."""
        attended, state = self.attention(self.attention_norm(x), state, first_key=first_key, offset=offset)
        x = x + self.dropout(attended)
        return x + self.dropout(self.ff(self.ff_norm(x))), state
