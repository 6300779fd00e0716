"""Every process works on its share of the batch: whole copies of the model (DDP), or sharded ones (FSDP2)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import parameter_of
from ..lm import TorusLM
from .layout import ManyProcesses, count_targets, parts_of


class _Loss(nn.Module):
    """A model whose `forward` is the loss: what `DistributedDataParallel` wraps is a `forward`."""

    def __init__(self, model: TorusLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, first_key: Tensor | None, **options: Any) -> Tensor:
        return self.model.loss(tokens, targets, first_key=first_key, **options)


class SharedBatch(ManyProcesses):
    """Layouts whose processes each work on a share of the batch and add up their gradients.

    With n_r of the batch's n targets on process r, the loss of the batch is ``sum_r (n_r / n) * loss_r``. PyTorch's
    data parallelism takes the mean of the gradients over the p processes, so that each differentiates
    ``p * (n_r / n) * loss_r``.
    """

    def share(self, x: Tensor) -> Tensor:
        """The part of a batch ``[B, T]`` that this process works on, which may be empty."""
        raise NotImplementedError

    def share_of_keys(self, first_key: Tensor) -> Tensor:
        """The `first_key` that belongs to the share."""
        return self.share(first_key)

    def wrapped_loss(
        self, model: TorusLM, tokens: Tensor, targets: Tensor, first_key: Tensor | None, **options: Any
    ) -> Tensor:
        """The mean loss of a share, through what adds up the gradients."""
        return model.loss(tokens, targets, first_key=first_key, **options)

    def without_exchange(self) -> contextlib.AbstractContextManager[None]:
        """A context in which gradients stay in this process, to be added up with those of the last part."""
        return contextlib.nullcontext()

    def gradients(
        self,
        model: TorusLM,
        tokens: Tensor,
        targets: Tensor,
        first_key: Tensor | None = None,
        accumulate: int = 1,
        autocast: bool = False,
        **options: Any,
    ) -> float:
        total, mean = count_targets(targets), 0.0
        for number, (part, goals, first) in enumerate(parts_of(tokens, targets, first_key, accumulate), start=1):
            part, goals, first, count = self._shares(part, goals, first)
            with contextlib.nullcontext() if number == accumulate else self.without_exchange():
                with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
                    loss = self.wrapped_loss(model, part, goals, first, **options)
                loss = loss * (count / max(1, total))
                (self.size * loss).backward()
            mean += loss.item()
        return self._sum(mean)

    def loss(self, model: TorusLM, tokens: Tensor, targets: Tensor, *, first_key: Tensor | None = None) -> Tensor:
        part, goals, first, count = self._shares(tokens, targets, first_key)
        share = model.loss(part, goals, first_key=first).item() * count
        return torch.tensor(self._sum(share) / count_targets(targets), dtype=torch.float64)

    def _shares(
        self, tokens: Tensor, targets: Tensor, first_key: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """The shares, and how many targets of this share count. One without any takes part all the same, because the
        others wait for it: with targets whose loss has no weight."""
        part, goals = self.share(tokens), self.share(targets)
        first = None if first_key is None else self.share_of_keys(first_key)
        count = count_targets(goals)
        if len(goals) == 0:
            part, goals, first = tokens[:1], targets[:1], None if first_key is None else first_key[:1]
        if count == 0:
            goals = torch.zeros_like(goals)
        return part, goals, first, count


class _Sequences(SharedBatch):
    """A share is some of the sequences."""

    def share(self, x: Tensor) -> Tensor:
        return x.tensor_split(self.size)[self.rank]


class DataParallel(_Sequences):
    """Distributed data parallelism: a copy of the model in every process, gradients added up by an all-reduce.

    `torch.nn.parallel.DistributedDataParallel` (Li et al. 2020, "PyTorch Distributed: experiences on accelerating data
    parallel training", VLDB 13) reduces gradients in buckets while the backward pass goes on. With P bytes of
    parameters a ring all-reduce sends ``2 * (p - 1) / p * P`` bytes per process and step.
    """

    def place(self, model: TorusLM) -> None:
        self._wrapper = DistributedDataParallel(_Loss(model))

    def wrapped_loss(
        self, model: TorusLM, tokens: Tensor, targets: Tensor, first_key: Tensor | None, **options: Any
    ) -> Tensor:
        return self._wrapper(tokens, targets, first_key, **options)

    def without_exchange(self) -> contextlib.AbstractContextManager[None]:
        return self._wrapper.no_sync()


class FullySharded(_Sequences):
    """Fully sharded data parallelism: every process keeps 1 / p of every parameter, gradient and optimiser state.

    `torch.distributed.fsdp.fully_shard` (FSDP2; Zhao et al. 2023, "PyTorch FSDP", VLDB 16; ZeRO stage 3, Rajbhandari
    et al. 2020) gathers the parameters of a block before its forward and its backward pass and scatters the sum of its
    gradients: three collectives of ``(p - 1) / p * P`` bytes per process for each part of the batch. The embedding
    and the last gain are gathered once, since both ends of the model need them.
    """

    def place(self, model: TorusLM) -> None:
        # Nothing here writes into the state that blocks return, a view.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)

    def loss(self, model: TorusLM, tokens: Tensor, targets: Tensor, *, first_key: Tensor | None = None) -> Tensor:
        # The first forward pass makes the buffers that later ones gather parameters into.
        with torch.inference_mode(False), torch.no_grad():
            return super().loss(model, tokens, targets, first_key=first_key)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, x in tensors.items():
            full = x.full_tensor() if isinstance(x, DTensor) else x
            if self.is_first:  # the others let go of it at once
                whole[name] = full
        return whole

    def scatter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters: dict[str | None, nn.Parameter] = dict(model.named_parameters())
        shards = {}
        for name, x in tensors.items():
            parameter = parameters.get(parameter_of(name))
            if isinstance(parameter, DTensor) and parameter.shape == x.shape:
                shards[name] = distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
            else:  # random numbers, and counts of steps
                shards[name] = x
        return shards
