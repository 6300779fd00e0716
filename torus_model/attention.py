"""Torus attention as a layer: projections, QK-norm, lattice rope, and learned stream weights, decay and alpha."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torus_kernels import (
    DEFAULT_DECAY,
    Stream,
    TorusKVCache,
    TorusLattice,
    TorusStats,
    lattice_rope,
    torus_attention,
    torus_attention_decode,
    torus_attention_with_stats,
)
from torus_kernels.backends import check_name
from torus_kernels.checks import parameter_dtype
from torus_kernels.lattice import NUM_STREAMS

from .compounding import (
    ALPHA_RANGE,
    MomentumCompounding,
    MultiscaleCompounding,
    State,
    bounded,
    check_memory,
    initial_alphas,
    unbounded,
)
from .rotary import sequence_rope

SMALLEST_INITIAL_DECAY = 0.05
"""Initial decay of the streams whose default is 0, which a softplus cannot reach.

The bias ``-0.5 * decay * rho^2`` with ``rho <= pi`` is then above -0.25: no key loses more than a fifth of its
weight, while the gradient through the softplus, about ``decay`` times that of the decay, is not negligible.
"""

ROTARY = ("lattice", "sequence")
"""Kinds of rotary positions: `lattice_rope` and `sequence_rope`."""

NARROWEST_HEAD = 2.0
"""Tokens: standard deviation of the narrowest head's initial window on the forward minor loop."""

FAVOURED_LOGIT = 2.0
"""Initial logit of the weight of the forward minor loop, where heads are graded; that of the other streams is 0."""


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with ``softplus(y) == x``, for ``x > 0``."""
    return x + torch.log(-torch.expm1(-x))


class HeadExchange(Protocol):
    """Moves tensors between processes that each hold a share of the tokens, and the same number of which each compute
    a share of the heads."""

    def to_heads(self, x: Tensor) -> Tensor:
        """``[B, H, T / p, ...] -> [B, H / p, T, ...]``: all tokens for this process's heads."""

    def to_tokens(self, x: Tensor) -> Tensor:
        """``[B, H / p, T, ...] -> [B, H, T / p, ...]``: all heads for this process's tokens."""

    def own_heads(self, x: Tensor) -> Tensor:
        """``[H, ...] -> [H / p, ...]``: what this process's heads use of a parameter."""


class TorusAttention(nn.Module):
    """Multi-head torus attention with everything that is learned around the operator.

    Queries and keys pass an RMSNorm over the head dimension (QK-norm) and rotary positions. The streams are mixed by
    a softmax, of one logit per head and stream or, ``token_gated``, of a linear function of the token. The geodesic
    decay is a softplus, one per head and stream. A layer with ``compounding`` blends its output into the state of
    the layer before, ``state + alpha * (y - state)``, with one alpha per head in `ALPHA_RANGE`, within the operator;
    with ``ema_momentum`` or several ``ema_scales`` after it, as `MomentumCompounding` and `MultiscaleCompounding` say.

    Only the streams of the lattice have parameters; one left out gets weight 0.

    Args:
        width: size of the tokens' embedding.
        heads: query heads (H).
        lattice: any topology. Every sequence must fit it.
        kv_heads: key and value heads (Hkv), a divisor of ``heads``; as many as ``heads`` by default.
        head_dim: channels per head (D), a multiple of 8 up to 256; ``width // heads`` by default.
        token_gated: stream weights from each token instead of one set per head.
        compounding: whether `forward` takes the state of a layer before, with the alpha to learn for it.
        rotary: one of `ROTARY`; positions along the sequence are for the causal topology.
        ema_momentum: compound with momentum.
        ema_scales: number of time constants of the compounding (S), each with its own alpha; without momentum, if
            more than one.
        adaptive_alpha: multiply alpha by the buffer ``alpha_factor``, 1 at first, which training may set
            (`torus_model.coherence.alpha_factor`).
        backend: backend of `torus_attention`.

    Raises:
        TypeError, ValueError: ``backend`` or ``rotary`` names none, or momentum and several time constants are asked
            for; a size that the operator refuses raises in `forward`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        lattice: TorusLattice,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        token_gated: bool = False,
        compounding: bool = False,
        rotary: str = "lattice",
        ema_momentum: bool = False,
        ema_scales: int = 1,
        adaptive_alpha: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_memory(ema_momentum, ema_scales)
        if rotary not in ROTARY or (rotary == "sequence" and lattice.topology != "causal"):
            raise ValueError(f"rotary must be 'lattice' or, in the causal topology, 'sequence', got {rotary!r} in the "
                             f"{lattice.topology} topology")
        self.rotary = rotary
        self.lattice = lattice
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.head_dim = width // heads if head_dim is None else head_dim
        self.backend = None if backend is None else check_name(backend)
        self.exchange: HeadExchange | None = None

        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim)
        self.k_norm = nn.RMSNorm(self.head_dim)

        streams = sorted(lattice.streams)
        self.register_buffer("stream_index", torch.tensor([s.index for s in streams]), persistent=False)
        self.stream_gate = nn.Linear(width, heads * len(streams)) if token_gated else None
        self.stream_logits = None if token_gated else nn.Parameter(torch.empty(heads, len(streams)))
        self.raw_decay = nn.Parameter(torch.empty(heads, len(streams)))
        alphas = (heads,) if ema_scales == 1 else (ema_scales, heads)
        self.raw_alpha = nn.Parameter(torch.empty(alphas)) if compounding else None
        self.memory: MomentumCompounding | MultiscaleCompounding | None = None  # in place of the operator's own
        if compounding and ema_momentum:
            self.memory = MomentumCompounding(heads)
        elif compounding and ema_scales > 1:
            self.memory = MultiscaleCompounding(ema_scales)
        self.register_buffer("alpha_factor", torch.ones(()) if compounding and adaptive_alpha else None)
        self.register_buffer("scheduled_factor", None)
        self.reset_stream_parameters()

    @torch.no_grad()
    def reset_stream_parameters(self, decay: Sequence[float] = DEFAULT_DECAY) -> None:
        """Starts from equal stream weights, a ``decay`` for each of the eight streams, by default the operator's, and
        the initial alpha, beta and weights of the compounding."""
        if self.stream_gate is not None:
            nn.init.zeros_(self.stream_gate.weight)
            nn.init.zeros_(self.stream_gate.bias)
        else:
            nn.init.zeros_(self.stream_logits)
        initial = torch.tensor(decay).clamp(min=SMALLEST_INITIAL_DECAY).to(self.raw_decay)
        self.raw_decay.copy_(inverse_softplus(initial[self.stream_index]))
        if self.raw_alpha is not None:
            initial = unbounded(initial_alphas(self.raw_alpha.numel() // self.heads), ALPHA_RANGE)  # [S]
            self.raw_alpha.copy_(initial[:, None].expand(-1, self.heads).reshape(self.raw_alpha.shape))
        if self.memory is not None:
            self.memory.reset_parameters()

    @torch.no_grad()
    def grade_heads(self) -> None:
        """Starts heads with windows of different widths on the forward minor loop, the tokens right before, and with
        more weight on it, so that some look nearby and some far from the first step on.

        The bias of a key k tokens back is ``-0.5 * decay * (pi * k / m)**2`` in the causal topology, a Gaussian window
        of standard deviation ``m / (pi * sqrt(decay))`` tokens. Decays go in equal ratios from
        `SMALLEST_INITIAL_DECAY` in the first head, a flat window, to one of `NARROWEST_HEAD` tokens in the last. The
        idea of a slope for each head is that of ALiBi (Press et al. 2022). Nothing changes where the stream is left
        out.
        """
        if Stream.minor_forward not in self.lattice.streams:
            return
        place = sorted(self.lattice.streams).index(Stream.minor_forward)
        narrowest = (self.lattice.n_minor / (math.pi * NARROWEST_HEAD)) ** 2
        ratio = max(1.0, narrowest / SMALLEST_INITIAL_DECAY)
        decays = SMALLEST_INITIAL_DECAY * ratio ** torch.linspace(0, 1, self.heads)
        self.raw_decay[:, place] = inverse_softplus(decays).to(self.raw_decay)
        logits = self.stream_logits if self.stream_gate is None else self.stream_gate.bias
        logits.view(self.heads, -1)[:, place] = FAVOURED_LOGIT

    def schedule_alpha(self) -> None:
        """Adds ``scheduled_factor``, a buffer of the weights that alpha is multiplied by and training sets; 1 at
        first."""
        if self.raw_alpha is not None:
            self.scheduled_factor = torch.ones((), device=self.raw_alpha.device)

    @property
    def compounding(self) -> bool:
        """Whether `forward` takes a state."""
        return self.raw_alpha is not None

    def stream_weights(self, x: Tensor) -> Tensor:
        """Mixing weights, ``[H, 8]`` or, token-gated, ``[B, H, T, 8]`` for tokens ``x`` ``[B, T, width]``."""
        if self.stream_gate is None:
            logits = self.stream_logits
        else:
            logits = self.stream_gate(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, streams]
        return self._all_streams(logits.to(parameter_dtype(logits.dtype)).softmax(dim=-1))

    def decay(self) -> Tensor:
        """Geodesic decay ``[H, 8]``; 0 for a stream left out."""
        return self._all_streams(F.softplus(self.raw_decay.to(parameter_dtype(self.raw_decay.dtype))))

    def alpha(self) -> Tensor | None:
        """Rate of compounding ``[H]``, of each time constant ``[S, H]``, or None in a layer without a state."""
        if self.raw_alpha is None:
            return None
        alpha = bounded(self.raw_alpha, ALPHA_RANGE)
        for factor in (self.alpha_factor, self.scheduled_factor):
            if factor is not None:
                alpha = alpha * factor
        return alpha

    def _all_streams(self, values: Tensor) -> Tensor:
        """``[..., streams of the lattice] -> [..., 8]``, zero where a stream is left out."""
        if values.shape[-1] == NUM_STREAMS:
            return values
        return values.new_zeros(*values.shape[:-1], NUM_STREAMS).index_copy(-1, self.stream_index, values)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        first_key: Tensor | None = None,
        offset: int = 0,
        cache: TorusKVCache | None = None,
        on_stats: Callable[[TorusStats, Tensor], None] | None = None,
    ) -> tuple[Tensor, State]:
        """Attends.

        Args:
            x: ``[B, T, width]``.
            state: the state that the layer before returned; exactly in a layer with compounding.
            first_key: as in `torus_attention`.
            offset: position of the first token, as in `lattice_rope`.
            cache: takes the keys and values of the tokens. An empty one takes any number; afterwards one token at a
                time attends to what it holds, at the position that it gives, without gradient.
            on_stats: called with the statistics of the streams and the stream weights; not from a cache.

        Returns:
            The projected output ``[B, T, width]`` and the state for the next layer, ``[B, H, T, D]`` unless there is
            momentum or several time constants (`torus_model.compounding.State`).

        Raises:
            ValueError: a state is missing or not wanted, several tokens come to a cache that is not empty, statistics
                are wanted from a cache, or the operator refuses an argument.
        """
        if (state is not None) != self.compounding:
            wanted, got = ("needs", "none") if self.compounding else ("takes no", "one")
            raise ValueError(f"a layer with compounding={self.compounding} {wanted} state, got {got}")
        if cache is not None and on_stats is not None:
            raise ValueError("on_stats takes no cache: decoding gives no statistics")
        # The transposes are views: the operator takes any strides and keeps this memory order.
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, -1))).transpose(1, 2)  # [B, Hkv, T, D]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)  # [B, Hkv, T, D]
        if cache is not None:
            offset = len(cache)
            if offset > 0 and x.shape[1] != 1:
                raise ValueError(f"x must be one token [B, 1, width] where the cache is not empty, got {list(x.shape)}")
        parameters = {"stream_weights": self.stream_weights(x), "decay": self.decay(), "ema_alpha": self.alpha()}
        if self.exchange is not None:
            q, k, v = (self.exchange.to_heads(y) for y in (q, k, v))
            parameters = self._of_own_heads(self.exchange, parameters)
        if self.rotary == "sequence":
            q, k = sequence_rope(q, k, offset=offset)
        else:
            q, k = (lattice_rope(y, self.lattice, offset=offset) for y in (q, k))
        alpha = parameters.pop("ema_alpha")
        options: dict[str, Any] = {**parameters, "first_key": first_key, "backend": self.backend}
        if self.memory is None:
            options |= {"ema_state": state, "ema_alpha": alpha}
        if cache is not None:
            cache.append(k, v)
        if cache is not None and offset > 0:
            out = torus_attention_decode(q, cache, **options)  # [B, H, 1, D]
        elif on_stats is not None:
            out, stats = torus_attention_with_stats(q, k, v, self.lattice, **options)
            on_stats(stats, options["stream_weights"])
        else:
            out = torus_attention(q, k, v, self.lattice, **options)  # [B, H, T, D]
        out, state = (out, out) if self.memory is None else self.memory(out, state, alpha)
        mixed = out if self.exchange is None else self.exchange.to_tokens(out)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2)), state

    @staticmethod
    def _of_own_heads(exchange: HeadExchange, parameters: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """What the heads of this process use of the operator's parameters, of which token-gated weights are tensors of
        tokens."""
        return {
            name: None if x is None else exchange.to_heads(x) if x.ndim == 4 else exchange.own_heads(x)
            for name, x in parameters.items()
        }
