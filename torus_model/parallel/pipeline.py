"""Pipeline parallelism: every process holds some of the blocks, and parts of the batch travel through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.optim import Optimizer

from torus_kernels.checks import parameter_dtype

from ..checkpoint import parameter_of
from ..data import IGNORED
from ..lm import TorusLM
from .layout import ManyProcesses, count_targets

EMBEDDING = "embedding.weight"


class _Stage(nn.Module):
    """The blocks of one process, with the embedding before the first and the logits after the last.

    The state of the EMA compounding travels beside x, in the memory order of the operator ``[B, T, H, D]``.
    """

    def __init__(self, model: TorusLM, *, first: bool, last: bool) -> None:
        super().__init__()
        self.model, self.first, self.last = model, first, last
        self.autocast = False

    def forward(self, x: Tensor, state: Tensor | None = None, *, first_key: Tensor | None = None) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            if self.first:
                x = self.model.embedding(x)
            x, out = self.model.run_blocks(x, None if state is None else state.transpose(1, 2), first_key=first_key)
            return self.model.logits(x) if self.last else (x, out.transpose(1, 2).contiguous())


class Pipeline(ManyProcesses):
    """Pipeline parallelism by `torch.distributed.pipelining`: process r holds the r-th share of the blocks.

    A step's ``accumulate`` parts are the micro-batches. While a process works on one, the process before works on the
    next: of ``m + p - 1`` turns a process idles in ``p - 1``, a part ``(p - 1) / (m + p - 1)`` of the step (Huang et
    al. 2019, "GPipe", section 2.3). With at least p micro-batches the schedule is 1F1B, which holds the activations
    of at most p of them (Narayanan et al. 2019, "PipeDream", section 3.2; Narayanan et al. 2021, arXiv 2104.04473,
    section 2.2.1), otherwise GPipe's.

    Over each boundary travel x and the EMA state, and their gradients back: ``2 * B * T`` times ``width + H * D``
    channels in a step. The embedding is tied to the logits: the first and the last process both hold it and add up
    its gradients, ``vocab_size * width`` numbers.
    """

    def place(self, model: TorusLM) -> None:
        own = torch.arange(len(model.blocks)).tensor_split(self.size)[self.rank].tolist()
        for layer in range(len(model.blocks)):
            if layer not in own:
                model.blocks.register_module(str(layer), None)
        self._first, self._last = self.rank == 0, self.rank == self.size - 1
        if not (self._first or self._last):
            model.register_module("embedding", None)
        if not self._last:
            model.register_module("norm", None)
        self._ends = dist.new_group([0, self.size - 1])
        self._stage = _Stage(model, first=self._first, last=self._last)
        self._schedules: dict[Any, ScheduleGPipe | Schedule1F1B] = {}

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
        if options:
            raise ValueError(f"the loss of a pipeline takes no options, got {', '.join(options)}")
        loss = self._through(tokens, targets, first_key, accumulate, autocast=autocast, training=True)
        if self._first or self._last:
            dist.all_reduce(self._stage.model.embedding.weight.grad, group=self._ends)
        return loss

    def loss(self, model: TorusLM, tokens: Tensor, targets: Tensor, *, first_key: Tensor | None = None) -> Tensor:
        return torch.tensor(self._through(tokens, targets, first_key, 1), dtype=torch.float64)

    def _through(
        self,
        tokens: Tensor,
        targets: Tensor,
        first_key: Tensor | None,
        micro_batches: int,
        *,
        autocast: bool = False,
        training: bool = False,
    ) -> float:
        """The loss of a batch that travels through all stages, and with ``training`` its gradient that travels back."""
        self._stage.autocast = autocast
        self._targets = max(1, count_targets(targets))
        key = (micro_batches, tokens.shape, autocast, training)
        if key not in self._schedules:
            self._schedules[key] = self._make_schedule(*key)
        schedule, losses = self._schedules[key], list[Tensor]()
        options: dict[str, Any] = {} if first_key is None else {"first_key": first_key}
        (schedule.step if training else schedule.eval)(
            *([tokens] if self._first else []), target=targets, losses=losses, return_outputs=False, **options
        )
        found = torch.tensor(sum(loss.item() for loss in losses), dtype=torch.float64)
        return float(self._everywhere(found, source=self.size - 1))

    def _make_schedule(
        self, micro_batches: int, shape: torch.Size, autocast: bool, training: bool
    ) -> ScheduleGPipe | Schedule1F1B:
        """A schedule for batches ``[B, T]`` of this shape: the stages agree beforehand on what they will receive."""
        config, rows, length = self._stage.model.config, shape[0] // micro_batches, shape[1]
        dtype = next(self._stage.parameters()).dtype
        low = torch.bfloat16 if autocast and dtype != torch.float64 else dtype  # which autocast leaves alone

        def like(*sizes: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device="meta", requires_grad=training and dtype.is_floating_point)

        between = (like(rows, length, config.width, dtype=dtype),
                   like(rows, length, config.heads, config.width // config.heads, dtype=low))
        stage = PipelineStage(
            self._stage, self.rank, self.size, torch.device("cpu"),
            input_args=like(rows, length, dtype=torch.int64) if self._first else between,
            output_args=like(rows, length, config.vocab_size, dtype=low) if self._last else between,
        )
        schedule = Schedule1F1B if micro_batches >= self.size else ScheduleGPipe
        return schedule(stage, micro_batches, loss_fn=self._loss_of_a_part, scale_grads=False)

    def _loss_of_a_part(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.flatten(0, 1)
        logits = logits.to(parameter_dtype(logits.dtype))
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum") / self._targets

    def clip(self, model: nn.Module, largest: float) -> None:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        counted = [x for name, x in gradients.items() if self._counts_here(name)]
        norm = self._sum(float(nn.utils.get_total_norm(counted)) ** 2) ** 0.5
        nn.utils.clip_grads_with_norm_(model.parameters(), largest, torch.tensor(norm))

    def _counts_here(self, name: str | None) -> bool:
        """False for the second copy of the embedding."""
        return name != EMBEDDING or self._first

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: x for name, x in tensors.items()
               if self._first or (parameter_of(name) is not None and self._counts_here(parameter_of(name)))}
        stages: list[Any] | None = [None] * self.size if self._first else None
        dist.gather_object(own, stages)
        return {name: x for stage in stages or [] for name, x in stage.items()}

    def scatter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {None, *model.state_dict()}
        return {name: x for name, x in tensors.items() if parameter_of(name) in own}

    def param_groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        groups = optimizer.state_dict()["param_groups"]
        names = [[name for name in group["param_names"] if self._counts_here(name)] for group in groups]
        stages: list[Any] = [None] * self.size
        dist.all_gather_object(stages, names)
        whole, count = [], 0
        for group, *parts in zip(groups, *stages, strict=True):
            of_group = [name for part in parts for name in part]
            indices = list(range(count, count := count + len(of_group)))
            whole.append(group | {"param_names": of_group, "params": indices})
        return whole
