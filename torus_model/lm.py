"""A causal language model of torus blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torus_kernels import TorusLattice, TorusStats
from torus_kernels.checks import parameter_dtype

from .attention import ROTARY
from .block import TorusBlock
from .checks import check_heads, check_numbers, check_positive_integers
from .compounding import check_memory
from .moe import MixtureOfExperts, collected_balance
from .positions import SinusoidalPositions

if TYPE_CHECKING:
    from .cache import LMCache

EMBEDDING_STD = 0.02
"""Initial standard deviation of the embedding, as of GPT-2."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines a `TorusLM`; which kernels compute it is not part of it.

    Args:
        vocab_size: number of tokens, that of the tokenizer; 256 for bytes.
        width: size of the tokens' embedding.
        layers: number of blocks.
        heads: query heads; ``width / heads`` must be a multiple of 8 up to 256.
        kv_heads: key and value heads, a divisor of ``heads``; None for as many as ``heads``.
        ff_width: hidden size of the feed-forward layers; None for ``4 * width``.
        n_major, n_minor, winding, cross_radius, streams: the causal `TorusLattice`; a token sees the last
            ``n_major * n_minor`` tokens. ``streams`` are names; None for all eight.
        token_gated: stream weights from each token; otherwise one set per head.
        dropout: probability on the output of each branch of a block.
        compounding: blend the attention of every layer but the first into that of the layer before.
        experts: feed-forward layers in each block, each with ``ff_width`` hidden units; where there are more than one,
            a router sends each token to ``experts_per_token`` of them, as in `MixtureOfExperts`.
        experts_per_token: at most ``experts``; not looked at where there is one.
        balance_weight: of the load-balancing loss of every block with several experts, added to the loss in training
            (Fedus et al. 2021, equation 4, where it is 0.01).
        rotary: ``"lattice"`` for the positions of `lattice_rope`, ``"sequence"`` for those of `sequence_rope`.
        graded_heads: heads begin with windows of different widths, as `TorusAttention.grade_heads` says; otherwise all
            begin alike.
        qk_gain: initial gain of the norm of queries.
        sinusoidal_positions: add `SinusoidalPositions` to the embedding; the rotary ones stay.
        ema_momentum: compound from layer to layer with momentum, as `MomentumCompounding`.
        ema_scales: time constants of the compounding; with more than one, as `MultiscaleCompounding`.
        adaptive_alpha: scale alpha by the coherence of earlier training steps (`torus_model.coherence`).
        scheduled_alpha: multiply the rates of this blending by a factor, 1 at first, that training may set
            (`TorusLM.set_alpha_factor`) and a checkpoint holds.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    vocab_size: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    ff_width: int | None = None
    n_major: int = 16
    n_minor: int = 16
    winding: int = 1
    cross_radius: tuple[int, int] = (3, 7)
    streams: tuple[str, ...] | None = None
    token_gated: bool = True
    dropout: float = 0.0
    compounding: bool = True
    experts: int = 1
    experts_per_token: int = 2
    balance_weight: float = 0.01
    rotary: str = "lattice"
    graded_heads: bool = False
    qk_gain: float = 1.0
    sinusoidal_positions: bool = False
    ema_momentum: bool = False
    ema_scales: int = 1
    adaptive_alpha: bool = False
    scheduled_alpha: bool = False

    def __post_init__(self) -> None:
        check_positive_integers(
            self, "vocab_size", "width", "layers", "heads", "experts", "experts_per_token", "ema_scales",
            optional=("kv_heads", "ff_width"),
        )
        check_heads(self.width, self.heads)
        if self.kv_heads is not None and self.heads % self.kv_heads != 0:
            raise ValueError(f"kv_heads must divide heads = {self.heads}, got {self.kv_heads}")
        check_numbers(self, "dropout", where=lambda x: 0 <= x < 1, needs="at least 0 and below 1")
        check_numbers(self, "balance_weight", where=lambda x: 0 <= x < math.inf, needs="at least 0")
        if 1 < self.experts < self.experts_per_token:
            raise ValueError(f"experts_per_token must be at most experts = {self.experts}, "
                             f"got {self.experts_per_token}")
        check_numbers(self, "qk_gain", where=lambda x: 0 < x < math.inf, needs="positive")
        if self.rotary not in ROTARY:
            raise ValueError(f"rotary must be one of {', '.join(ROTARY)}, got {self.rotary!r}")
        check_memory(self.ema_momentum, self.ema_scales)
        if not self.compounding and (self.ema_momentum or self.ema_scales > 1 or self.adaptive_alpha):
            raise ValueError("ema_momentum, ema_scales and adaptive_alpha need compounding, got compounding = False")
        lattice = self.lattice  # checks the lattice's fields
        # One form for each value, whatever collection it came in: configurations compare and travel through JSON.
        object.__setattr__(self, "cross_radius", lattice.cross_radius)
        if self.streams is not None:
            object.__setattr__(self, "streams", tuple(s.name for s in sorted(lattice.streams)))

    @property
    def lattice(self) -> TorusLattice:
        """The causal lattice that the model is wound on."""
        return TorusLattice(self.n_major, self.n_minor, "causal", self.winding, self.cross_radius, self.streams)

    def to_dict(self) -> dict[str, Any]:
        """Fields as values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The configuration of `to_dict`, also after a way through JSON.

        Raises:
            TypeError, ValueError: a field is unknown or wrong.
        """
        return cls(**fields)


Criterion = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""A loss from logits ``[B, T, vocab_size]``, targets, tokens and ``first_key``, each ``[B, T]``."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets ``[B, T]`` that are not -100, in float32 or better, of logits ``[B, T, vocab_size]``."""
    return F.cross_entropy(logits.flatten(0, 1).to(parameter_dtype(logits.dtype)), targets.flatten())


def initialise(embedding: nn.Embedding, blocks: nn.ModuleList, qk_gain: float) -> None:
    """Draws the weights of the matrices of a language model of `AttentionBlock` s, and sets the gain of queries."""
    nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
    for block in blocks:
        attention = block.attention
        nn.init.constant_(attention.q_norm.weight, qk_gain)
        mixture = isinstance(block.ff, MixtureOfExperts)
        experts, routers = (block.ff.experts, [block.ff.router]) if mixture else ([block.ff], [])
        first, last = zip(*((expert[0], expert[2]) for expert in experts), strict=True)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, *first, *routers):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        # 2 * layers branches add up in the residual stream (GPT-2, Radford et al. 2019, section 2.3).
        for linear in (attention.out_proj, *last):
            nn.init.normal_(linear.weight, std=(2 * len(blocks) * linear.in_features) ** -0.5)


class TorusLM(nn.Module):
    """Decoder-only language model on a causal torus, with tied input and output embeddings.

    The attention output of every layer, before its projection, is compounded into that of the layer before, unless
    ``config.compounding`` is off; the first layer has no state.

    Args:
        config: the architecture.
        backend: backend of `torus_attention` in every layer.
        activation_checkpointing: keep only the inputs of every block for the backward pass, which runs the block again:
            the same gradients from less memory.
    """

    def __init__(
        self, config: ModelConfig, backend: str | None = None, *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        lattice = config.lattice
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = SinusoidalPositions(config.width, EMBEDDING_STD) if config.sinusoidal_positions else None
        self.blocks = nn.ModuleList(
            TorusBlock(
                config.width, config.heads, lattice, ff_width=config.ff_width, dropout=config.dropout,
                kv_heads=config.kv_heads, token_gated=config.token_gated, compounding=config.compounding and layer > 0,
                rotary=config.rotary, ema_momentum=config.ema_momentum, ema_scales=config.ema_scales,
                adaptive_alpha=config.adaptive_alpha, backend=backend, experts=config.experts,
                experts_per_token=config.experts_per_token,
            )
            for layer in range(config.layers)
        )
        if config.scheduled_alpha:
            self.schedule_alpha()
        self.norm = nn.RMSNorm(config.width)
        initialise(self.embedding, self.blocks, config.qk_gain)
        if config.graded_heads:
            for block in self.blocks:
                block.attention.grade_heads()

    def schedule_alpha(self) -> None:
        """Makes this a model with ``scheduled_alpha``."""
        self.config = dataclasses.replace(self.config, scheduled_alpha=True)
        for block in self.blocks:
            block.attention.schedule_alpha()

    def set_alpha_factor(self, factor: float) -> None:
        """Sets what every layer's alpha is multiplied by, in a model with ``scheduled_alpha``."""
        for block in self.blocks:
            if block.attention.scheduled_factor is not None:
                block.attention.scheduled_factor.fill_(factor)

    def forward(
        self,
        tokens: Tensor,
        *,
        first_key: Tensor | None = None,
        offset: int = 0,
        cache: LMCache | None = None,
        on_stats: Callable[[TorusStats, Tensor], None] | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: ``[B, T]`` int64, of any length T.
            first_key: ``[B, T]``, as in `torus_attention`: a token sees nothing before this position.
            offset: position of the first token in its text; with a cache that counts, it is not looked at.
            cache: keeps the keys and values of the tokens, as in `TorusAttention`.
            on_stats: called by every layer in turn, as in `TorusAttention`; without a cache. Under activation
                checkpointing it is called again in the backward pass.

        Returns:
            ``[B, T, vocab_size]``.
        """
        x = self.embedding(tokens)  # [B, T, width]
        if self.positions is not None:
            x = self.positions(x, offset=offset if cache is None else len(cache), first_key=first_key)
        x, _ = self.run_blocks(x, first_key=first_key, offset=offset, cache=cache, on_stats=on_stats)
        return self.logits(x)

    def run_blocks(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        first_key: Tensor | None = None,
        offset: int = 0,
        cache: LMCache | None = None,
        on_stats: Callable[[TorusStats, Tensor], None] | None = None,
    ) -> tuple[Tensor, Any]:
        """``x`` ``[B, T, width]`` and the state after all blocks that are there: a stage of a pipeline has some of
        them, and None in the place of the others."""
        for layer, block in enumerate(self.blocks):
            if block is None:
                continue
            layer_cache = None if cache is None else cache.layers[layer]
            options = {"first_key": first_key, "offset": offset, "cache": layer_cache, "on_stats": on_stats}
            if not block.attention.compounding:
                state = None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, state = checkpoint(block, x, state, use_reentrant=False, **options)
            else:
                x, state = block(x, state, **options)
        return x, state

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``[B, T, vocab_size]`` from what the last block returned, ``[B, T, width]``."""
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        first_key: Tensor | None = None,
        criterion: Criterion | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the next tokens ``targets`` ``[B, T]``, or another ``criterion``, in nats per token; a
        target of -100 is none. In training mode `collected_balance` of blocks with several experts is added, times
        ``balance_weight``."""
        with collected_balance(self) as balance:
            logits = self(tokens, first_key=first_key)
        loss = cross_entropy(logits, targets) if criterion is None else criterion(logits, targets, tokens, first_key)
        if self.training and balance:
            loss = loss + self.config.balance_weight * torch.stack(balance).sum()
        return loss
