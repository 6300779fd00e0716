"""The arithmetic of training on several processes: bytes that a process sends in a step, against its computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torus_model import ModelConfig
from torus_model.parallel import LAYOUTS

from .roofline import visible_pairs

FLOAT = 4
"""Bytes of a parameter, a gradient and an activation in float32."""

LINKS = {"NVLink 4": 450e9, "InfiniBand NDR": 50e9, "100 Gb Ethernet": 12.5e9, "10 Gb Ethernet": 1.25e9}
"""Nominal bytes per second that a process sends over a link of this name: inputs of the arithmetic, not measured."""

RATE = 400e12
"""FLOP/s of one process, an assumption as well: about 40 % of the dense bfloat16 peak of an H100."""

_PRODUCTS = 7  # of a visible pair: two in the forward pass, five in the backward pass (`roofline`)


@dataclass(frozen=True)
class Step:
    """One step of training in some layout.

    Args:
        model: the architecture.
        batch: sequences per step (B).
        seq_len: tokens per sequence (T).
        size: processes (p).
        parts: that the batch is split into, as ``accumulate``.
        activation: bytes of a channel of queries, keys, values and the state: 4, or 2 under autocast.
    """

    model: ModelConfig
    batch: int
    seq_len: int
    size: int
    parts: int = 1
    activation: int = FLOAT

    @property
    def block_parameters(self) -> int:
        """Of all blocks together, by the shapes in `TorusAttention` and `AttentionBlock`."""
        m = self.model
        streams, depth = len(m.lattice.streams), m.width // m.heads
        hidden = 4 * m.width if m.ff_width is None else m.ff_width
        projections = m.width * depth * (2 * m.heads + 2 * self.kv_heads)
        mixing = (m.width + 1) * m.heads * streams if m.token_gated else m.heads * streams
        of_heads = mixing + m.heads * streams + 2 * depth  # with decays and the gains of QK-norm
        compounding = (m.layers - 1) * m.heads if m.compounding else 0
        return m.layers * (projections + of_heads + 2 * m.width * hidden + 2 * m.width) + compounding

    @property
    def kv_heads(self) -> int:
        return self.model.heads if self.model.kv_heads is None else self.model.kv_heads

    @property
    def end_parameters(self) -> int:
        """Of the embedding and the last gain."""
        return self.model.vocab_size * self.model.width + self.model.width

    @property
    def flops(self) -> float:
        """Of the matrix products of one step of all processes together.

        ``6 N B T`` for N parameters in matrices, two in the forward pass and four in the backward pass (Kaplan et al.
        2020, section 2.1), the embedding among them as the output layer, and seven products of ``2 D`` for every pair
        of a query and a key that it sees (`roofline.visible_pairs`).
        """
        m = self.model
        matrices = 6 * (self.block_parameters + self.end_parameters) * self.batch * self.seq_len
        pairs = m.layers * self.batch * m.heads * visible_pairs(m.lattice, self.seq_len)
        return matrices + _PRODUCTS * 2 * (m.width // m.heads) * pairs

    def sent(self, layout: str, rank: int = 0) -> float:
        """Bytes that a process sends in one step; collectives as rings, in which one over n bytes sends ``(p - 1) / p *
        n``, an all-reduce twice that (Patarasuk & Yuan 2009).

        - ``ddp``: the all-reduce of the gradient.
        - ``fsdp``: for each part, two all-gathers and one reduce-scatter of every block, one and one of what belongs to
          no block.
        - ``pipeline``: x and the EMA state to the next process, their gradients to the one before, and at both ends the
          all-reduce of the embedding's gradient between the two.
        - ``sequence``: queries, keys, values and token-gated weights to the heads and the output back, the same for
          their gradients, in each layer; and the all-reduce of the gradient.
        """
        m, p = self.model, self.size
        share = (p - 1) / p
        everything = FLOAT * (self.block_parameters + self.end_parameters)
        if layout == "ddp":
            return 2 * share * everything
        if layout == "fsdp":
            return self.parts * share * FLOAT * (3 * self.block_parameters + 2 * self.end_parameters)
        tokens = self.batch * self.seq_len
        if layout == "pipeline":
            boundary = tokens * m.width * (FLOAT + self.activation)
            neighbours = (rank > 0) + (rank < p - 1)
            return neighbours * boundary + (rank in (0, p - 1)) * FLOAT * m.vocab_size * m.width
        depth = m.width // m.heads
        channels = self.activation * depth * (2 * m.heads + 2 * self.kv_heads)
        gates = FLOAT * 8 * m.heads if m.token_gated else 0
        return 2 * m.layers * share * tokens / p * (channels + gates) + 2 * share * everything

    def ratio(self, layout: str, bandwidth: float, rate: float = RATE) -> float:
        """Time to send over time to compute, of the process that sends most; from 1 on they cannot overlap fully.

        Args:
            bandwidth: bytes per second that a process sends.
            rate: FLOP/s of a process.
        """
        sent = max(self.sent(layout, rank) for rank in {0, 1, self.size - 1})
        return (sent / bandwidth) / (self.flops / self.size / rate)


def least_tokens(step: Step, layout: str, bandwidth: float, rate: float = RATE) -> float:
    """From how many tokens per process and step on the time to send is at most that to compute.

    What does not grow with the batch, the parameters', hides behind more tokens; what does, the activations', does not:
    infinity where it alone takes longer. With parts, each must be that large under ``fsdp``.
    """
    tokens = step.batch * step.seq_len
    doubled = Step(step.model, 2 * step.batch, step.seq_len, step.size, step.parts, step.activation)
    sent, more = (max(s.sent(layout, rank) for rank in {0, 1, s.size - 1}) for s in (step, doubled))
    per_token = (more - sent) / tokens
    spared = step.flops / step.size / rate / tokens - per_token / bandwidth
    return (sent - per_token * tokens) / bandwidth / spared / step.size if spared > 0 else float("inf")


def least_tokens_of_all(step: Step, rate: float = RATE) -> Mapping[tuple[str, str], float]:
    """`least_tokens` of every layout over every link of `LINKS`, by both names."""
    return {(layout, link): least_tokens(step, layout, bandwidth, rate)
            for layout in LAYOUTS for link, bandwidth in LINKS.items()}
