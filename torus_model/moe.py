"""A mixture of experts in the place of a feed-forward layer, and the loss that keeps its experts busy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torus_kernels.checks import parameter_dtype


class Router(nn.Linear):
    """The linear layer that scores experts, in float32 or better also under autocast: a rounded score sends a token
    elsewhere (Fedus et al. 2021, section 2.4)."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width] -> [..., experts]``."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = parameter_dtype(x.dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype))


class MixtureOfExperts(nn.Module):
    """Sends every token to ``k`` of ``E`` experts, chosen by a learned router, and adds up what they make of it.

    With the router's probabilities ``p = softmax(W x)``, what the experts make of the token, ``f_e(x)``, and the set S
    of the k likeliest experts::

        y = sum over e in S of g_e f_e(x)        g_e = p_e for k = 1, otherwise p_e / sum over S of p

    (k = 1: Fedus et al. 2021, Switch Transformer, equations 1-2; k > 1: Lepikhin et al. 2020, GShard, algorithm 1, and
    Jiang et al. 2024, Mixtral, section 2.1.) There is no capacity and no token is dropped, so that a token's output
    depends on no other token. Of equal probabilities it is PyTorch's ``topk`` that chooses, and results repeat.

    Args:
        experts: modules that take and return ``[n, width]``; E of them.
        width: size of the tokens' embedding.
        per_token: k, from 1 to E.

    Attributes:
        load: ``[E]`` float32, the part of all choices that fell on each expert in the last forward pass; zeros before
            the first one.

    Raises:
        ValueError: ``per_token`` is out of range.
    """

    load: Tensor

    def __init__(self, experts: Sequence[nn.Module], width: int, per_token: int) -> None:
        super().__init__()
        if not 1 <= per_token <= len(experts):
            raise ValueError(f"per_token must be at least 1 and at most experts = {len(experts)}, got {per_token}")
        self.router = Router(width, len(experts))
        self.experts = nn.ModuleList(experts)
        self.per_token = per_token
        self.register_buffer("load", torch.zeros(len(experts)), persistent=False)
        self._collected: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` in and out."""
        tokens = x.flatten(0, -2)  # [n, width]
        probabilities = self.router(tokens).softmax(-1)  # [n, E]
        gates, chosen = probabilities.topk(self.per_token, -1)  # [n, k]
        if self.per_token > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        load = F.one_hot(chosen, len(self.experts)).sum(1).to(gates.dtype).mean(0) / self.per_token  # [E]
        self.load.copy_(load)
        balance = len(self.experts) * (load * probabilities.mean(0)).sum()
        if self._collected is not None:
            self._collected.append(balance)
        out = torch.zeros_like(tokens, dtype=gates.dtype)
        for number, expert in enumerate(self.experts):
            token, choice = (chosen == number).nonzero(as_tuple=True)
            # A token chooses an expert at most once: the indices differ, and the order of the sum is fixed.
            weighted = gates[token, choice, None] * expert(tokens.index_select(0, token))
            out = out.index_add(0, token, weighted.to(out.dtype))
        return out.to(x.dtype).view_as(x)


@contextlib.contextmanager
def collected_balance(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, every forward pass of a `MixtureOfExperts` in the model adds its load-balancing loss to the list.

    With f_e the part of the choices that fell on expert e and P_e the mean of its probability over the tokens,
    ``E * sum over e of f_e P_e``: 1 where all are used alike, E where one does everything (Fedus et al. 2021, equations
    4-6; with k > 1, f counts all k choices). What activation checkpointing computes a second time, it does after the
    forward pass, outside.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    collected: list[Tensor] = []
    for mixture in mixtures:
        mixture._collected = collected
    try:
        yield collected
    finally:
        for mixture in mixtures:
            mixture._collected = None
