"""A dense causal transformer: what a language model of torus blocks is compared with."""

from __future__ import annotations

import bisect
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torus_kernels.checks import parameter_dtype

from .block import AttentionBlock
from .lm import ModelConfig, TorusLM, initialise
from .rotary import sequence_rope


class DenseCausalAttention(nn.Module):
    """Multi-head attention of every token to all before it and to itself.

    Projections and QK-norm are those of `TorusAttention`; positions are rotary along the sequence. There is no state.

    Args:
        width: size of the tokens' embedding.
        heads: query, key and value heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        """``x`` ``[B, T, width]``; returns the projected output ``[B, T, width]`` and no state."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k = sequence_rope(q, k)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(-2)), None


class DenseLM(nn.Module):
    """Decoder-only language model of dense attention, in all else a `TorusLM`: the same blocks, initial weights and
    tied embeddings. For comparisons: it has no cache and does not pack documents.

    Args:
        config: of which it takes ``vocab_size``, ``width``, ``layers``, ``heads``, ``ff_width``, ``dropout`` and
            ``qk_gain``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            AttentionBlock(
                config.width, DenseCausalAttention(config.width, config.heads), ff_width=config.ff_width,
                dropout=config.dropout,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width)
        initialise(self.embedding, self.blocks, config.qk_gain)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token: ``[B, T]`` int64, of any length T, to ``[B, T, vocab_size]``."""
        x = self.embedding(tokens)  # [B, T, width]
        for block in self.blocks:
            x, _ = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, tokens: Tensor, targets: Tensor, *, first_key: None = None) -> Tensor:
        """Mean cross-entropy of the next tokens ``targets`` ``[B, T]``, in nats per token; -100 is no target.

        Raises:
            ValueError: there is a ``first_key``.
        """
        if first_key is not None:
            raise ValueError("first_key must be None: dense attention here does not pack documents")
        logits = self(tokens).flatten(0, 1)
        return F.cross_entropy(logits.to(parameter_dtype(logits.dtype)), targets.flatten())


def number_of_parameters(model: nn.Module) -> int:
    """Learned numbers of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def dense_config(config: ModelConfig) -> ModelConfig:
    """The configuration whose `DenseLM` has the number of parameters nearest to that of ``config``'s `TorusLM`.

    It differs in ``ff_width`` alone: what the torus spends on its gates, the dense model spends there.
    """
    def count(ff_width: int) -> int:
        return number_of_parameters(DenseLM(dataclasses.replace(config, ff_width=ff_width)))

    with torch.device("meta"):  # shapes alone
        target = number_of_parameters(TorusLM(config))
        sizes = range(1, 16 * config.width + 1)
        above = bisect.bisect_left(sizes, target, key=count)
        nearest = min(sizes[max(0, above - 1) : above + 1], key=lambda size: abs(count(size) - target))
    return dataclasses.replace(config, ff_width=nearest)
