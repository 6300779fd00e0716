"""Sequence parallelism: every process holds a share of the tokens and, within attention, a share of the heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..lm import TorusLM
from .data_parallel import DataParallel


class _Exchange(torch.autograd.Function):
    """Part i of ``x`` ``[p, ...]`` goes to process i; part j of the result comes from process j. Its gradient goes the
    same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Exchange.apply(gradient.contiguous())


class AllToAll:
    """The `HeadExchange` of the processes of the default group: process r has tokens ``[r T/p, (r + 1) T/p)`` and
    heads ``[r H/p, (r + 1) H/p)``."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def to_heads(self, x: Tensor) -> Tensor:
        """``[B, H, T / p, ...] -> [B, H / p, T, ...]``."""
        parts = x.transpose(1, 2).unflatten(2, (self.size, -1))  # [B, T / p, p, H / p, ...]
        received = _Exchange.apply(parts.movedim(2, 0).contiguous())  # [p, B, T / p, H / p, ...]
        return received.transpose(0, 1).flatten(1, 2).transpose(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """``[B, H / p, T, ...] -> [B, H, T / p, ...]``."""
        parts = x.transpose(1, 2).unflatten(1, (self.size, -1))  # [B, p, T / p, H / p, ...]
        received = _Exchange.apply(parts.transpose(0, 1).contiguous())  # [p, B, T / p, H / p, ...]
        return received.movedim(0, 2).flatten(2, 3).transpose(1, 2)

    def own_heads(self, x: Tensor) -> Tensor:
        """``[H, ...] -> [H / p, ...]``."""
        return x.chunk(self.size)[self.rank]


class SequenceParallel(DataParallel):
    """Sequence parallelism by all-to-all over heads (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509, section
    3): everything but the operator works on ``T / p`` tokens; queries, keys and values change hands before it and its
    output after it, and every process runs the unmodified kernel on ``H / p`` heads and all T tokens.

    The EMA state stays with its heads from layer to layer and does not travel. Token-gated stream weights do; one set
    of them per head, the decay and alpha are parameters, of which a process uses its heads' rows. With c bytes per
    channel, one process sends ``(p - 1) / p**2 * B * T`` times ``c * D * (2 H + 2 Hkv)`` bytes, and 32 H for
    token-gated weights, in each layer, and as much again in the backward pass; weights are copied and their gradients
    added up as in `DataParallel`.
    """

    def place(self, model: TorusLM) -> None:
        exchange = AllToAll()
        for block in model.blocks:
            block.attention.exchange = exchange
        super().place(model)

    def share(self, x: Tensor) -> Tensor:
        return x.chunk(self.size, dim=1)[self.rank]

    def share_of_keys(self, first_key: Tensor) -> Tensor:
        return first_key  # the operator sees all tokens
