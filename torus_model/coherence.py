"""Cognitive coherence of a layer, from the statistics that the operator gives beside its output.

After the three components of the sense of coherence (Antonovsky 1987, *Unraveling the Mystery of Health*):
comprehensibility, manageability and meaningfulness. The formulas are this project's own; that a layer with more of them
is a better one is not claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torus_kernels import Stream, TorusLattice, TorusStats

if TYPE_CHECKING:
    from .lm import TorusLM

WEIGHTS = {"comprehensibility": 0.25, "manageability": 0.25, "meaningfulness": 0.5}
"""Of the measures in the score."""

MEASURES = (*WEIGHTS, "score", "cohesion")
"""The fields of `Coherence` that are numbers."""


class VisibleKeys(NamedTuple):
    """How many keys a query sees, its own included; B is 1 where all sequences are alike.

    Attributes:
        streams: through each stream ``[B, T, 8]`` int64; 0 for a stream that the lattice leaves out.
        together: through any of them ``[B, T]`` int64.
    """

    streams: Tensor
    together: Tensor


def visible_keys(lattice: TorusLattice, seq_len: int, first_key: Tensor | None = None) -> VisibleKeys:
    """Counts the keys that each query of a sequence sees.

    Args:
        lattice: any topology.
        seq_len: length of the sequence (T).
        first_key: ``[B, T]``, as in `torus_attention`, causal only.

    Raises:
        ValueError: the sequence does not fit the lattice, or ``first_key`` comes without time.
    """
    lattice.check_length(seq_len)
    if first_key is not None and not lattice.is_causal:
        raise ValueError(f"first_key belongs to the causal topology, got it with a {lattice.topology} lattice")
    device = None if first_key is None else first_key.device
    if lattice.is_causal:
        lags = torch.arange(min(seq_len, lattice.num_sites), device=device)
        visible = _by_stream(lattice, lambda stream: lattice.lag_geometry(stream, lags)[0])  # [lags, 8 + 1]
        t = torch.arange(seq_len, device=device)[None]  # [1, T]
        furthest = t if first_key is None else t - first_key.clamp(min=0).minimum(t)  # [B, T]
        counts = visible.cumsum(0)[furthest.clamp(max=len(lags) - 1)]  # [B, T, 8 + 1]
    else:
        rows, columns = torch.arange(lattice.n_major), torch.arange(lattice.n_minor)
        a = (rows[:, None] - rows)[:, :, None]  # [M, M, 1]
        visible = _by_stream(lattice, lambda stream: lattice.displacement_geometry(stream, a, columns)[0])
        counts = visible.sum((1, 2)).repeat_interleave(lattice.n_minor, 0)[None]  # [1, T, 8 + 1]
    return VisibleKeys(counts[..., :-1], counts[..., -1])


def _by_stream(lattice: TorusLattice, visible: Callable[[Stream], Tensor]) -> Tensor:
    """``[..., 8 + 1]`` int64: what each stream sees, nothing where it is left out, and what any of them sees."""
    streams = {stream: visible(stream) for stream in sorted(lattice.streams)}
    nothing = torch.zeros_like(next(iter(streams.values())))
    columns = [streams.get(stream, nothing) for stream in Stream]
    return torch.stack((*columns, torch.stack(columns).any(0)), dim=-1).long()


@dataclass(frozen=True)
class Coherence:
    """Coherence of one layer; all in [0, 1].

    Attributes:
        comprehensibility: 1 - entropy / log(keys), a mean: 0 where all visible keys weigh the same, 1 where one does.
        manageability: (exp(entropy) - 1) / (keys - 1), a mean: 0 where one visible key is taken in, 1 where all are.
        meaningfulness: concentration of the mixed attention at least, a mean: see `measure`.
        alignment: similarity of the streams' behaviour ``[8, 8]`` float64, symmetric, NaN nowhere; 0 where
            ``aligned`` is False.
        aligned: ``[8, 8]`` bool, the pairs of streams that could be compared.
    """

    comprehensibility: float
    manageability: float
    meaningfulness: float
    alignment: Tensor
    aligned: Tensor

    @property
    def score(self) -> float:
        """A quarter comprehensibility, a quarter manageability and a half meaningfulness."""
        return sum(weight * getattr(self, name) for name, weight in WEIGHTS.items())

    @property
    def cohesion(self) -> float:
        """Mean alignment of the pairs of different streams; 1 where no two can be compared."""
        pairs = self.aligned & ~torch.eye(len(self.aligned), dtype=torch.bool, device=self.aligned.device)
        return self.alignment[pairs].mean().item() if pairs.any() else 1.0


def measure(entropy: Tensor, stream_weights: Tensor, visible: VisibleKeys) -> Coherence:
    """The coherence of a layer.

    With ``E`` the entropy of a stream's softmax, ``n`` the keys it sees, ``w`` its weight in the mixture, ``H(w)`` the
    entropy of the weights and ``n_any`` the keys seen through any stream, for each query and head::

        comprehensibility = mean over streams of 1 - E / log(n)                              weighted by w
        manageability     = mean over streams of (exp(E) - 1) / (n - 1)                      weighted by w
        meaningfulness    = mean of 1 - min(1, (sum_s w_s E_s + H(w)) / log(n_any))
        alignment[s, s']  = mean of 1 - |E_s / log(n_s) - E_s' / log(n_s')|

    each over the batch, the heads and the queries. Comprehensibility is one minus Pielou's evenness. Manageability sets
    capacity, the number of keys that a softmax in effect spreads over (its perplexity), against demand, the number that
    there is to attend to. The two pull in opposite directions.

    The entropy H of the mixture ``sum_s w_s P_s`` is not among the statistics, but bounded by them: ``H <= sum_s w_s
    E_s + H(w)``, the joint entropy of stream and key (chain rule, Cover & Thomas 2006, theorem 2.2.1). Meaningfulness
    is therefore a lower bound of ``1 - H / log(n_any)``, the concentration of the mixed attention. Streams that agree
    on a key are not seen to, so that eight equally weighted ones have little of it however sharp they are.

    A softmax over a single key has no choice and says nothing: such rows, as at the beginning of a text, are left out
    of every mean. Without any other row entropy counts as 0 and demand as met: all three measures are then 1.

    Args:
        entropy: of `TorusStats`, ``[B, H, T, 8]`` in nats.
        stream_weights: ``[H, 8]`` or ``[B, H, T, 8]``, not negative, with sum 1 over the streams, and 0 for a stream
            that is left out.
        visible: the keys that each query sees, from `visible_keys`.
    """
    entropy = entropy.double()
    weights = stream_weights.detach().double()
    weights = weights if weights.dim() == 4 else weights[:, None]  # [B, H, T, 8] or [H, 1, 8]
    keys = visible.streams[:, None].to(entropy)  # [B, 1, T, 8]
    choice = keys > 1
    evenness = (entropy / keys.clamp(min=2).log()).clamp(0, 1) * choice  # [B, H, T, 8]
    taken_in = ((entropy.exp() - 1) / (keys - 1).clamp(min=1)).clamp(0, 1)

    counted = weights.expand_as(entropy) * choice
    together = visible.together[:, None].to(entropy)  # [B, 1, T]
    joint = (weights * entropy).sum(-1) + torch.special.entr(weights).sum(-1)  # [B, H, T]
    concentration = 1 - (joint / together.clamp(min=2).log()).clamp(0, 1)

    rows, total = [], []
    for stream in Stream:  # one at a time: all pairs at once would be large
        both = (choice & choice[..., [stream]]).expand_as(entropy)  # [B, H, T, 8]
        rows.append(both.sum((0, 1, 2)))
        total.append(((1 - (evenness - evenness[..., [stream]]).abs()) * both).sum((0, 1, 2)))
    compared = torch.stack(rows)  # [8, 8]
    return Coherence(
        comprehensibility=_mean(1 - evenness, counted),
        manageability=_mean(taken_in, counted),
        meaningfulness=_mean(concentration, (together > 1).expand_as(concentration)),
        alignment=torch.stack(total) / compared.clamp(min=1),
        aligned=compared > 0,
    )


@torch.no_grad()
def measure_layers(model: TorusLM, tokens: Tensor, first_key: Tensor | None = None) -> list[Coherence]:
    """The coherence of every layer of a model on these tokens, in evaluation mode and without autocast.

    Args:
        model: the model.
        tokens: ``[B, T]`` int64.
        first_key: ``[B, T]``, as in `TorusLM`.
    """
    visible = visible_keys(model.config.lattice, tokens.shape[1], first_key)
    found: list[Coherence] = []

    def on_stats(stats: TorusStats, stream_weights: Tensor) -> None:
        found.append(measure(stats.entropy, stream_weights, visible))

    was_training = model.training
    model.eval()
    model(tokens, first_key=first_key, on_stats=on_stats)
    model.train(was_training)
    return found


def _mean(values: Tensor, weights: Tensor) -> float:
    """A weighted mean of numbers in [0, 1]; 1 where nothing has a weight."""
    total = weights.sum().item()
    return min(1.0, (values * weights).sum().item() / total) if total > 0 else 1.0


def alpha_factor(score: float, cohesion: float) -> float:
    """What an adaptive rate of compounding is multiplied by, from 1/2 to 1: the more coherent a layer, the more of its
    own attention it lets into the state::

        0.5 + 0.5 * (0.6 * score + 0.4 * score * cohesion)
    """
    return 0.5 + 0.5 * (0.6 * score + 0.4 * score * cohesion)
