"""How a training run is laid out on processes; a `Layout` that is not subclassed is one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data import IGNORED

if TYPE_CHECKING:
    from ..lm import TorusLM


class Layout:
    """One process: what a run asks of its layout, and how the whole model on all of the batch answers.

    Every process draws the same batch and keeps the same history; the methods are called by all of them at the same
    points. Only the first one writes.

    Attributes:
        rank: of this process.
        size: how many processes there are.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def place(self, model: TorusLM) -> None:
        """Takes the model, the same in every process, and keeps of it what this process works on."""

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
        """Adds the gradient of the mean loss of a batch to that of the model.

        Args:
            model: the model.
            tokens, targets, first_key: the whole batch, each ``[B, T]``, as in `TorusLM.loss`.
            accumulate: parts of the batch that run one after the other.
            autocast: run the model in bfloat16 where PyTorch's autocast does.
            options: of `TorusLM.loss`.

        Returns:
            The loss of the whole batch, in nats per token.
        """
        total, mean = count_targets(targets), 0.0
        for part, goals, first in parts_of(tokens, targets, first_key, accumulate):
            if count := count_targets(goals):
                with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
                    loss = model.loss(part, goals, first_key=first, **options)
                loss = loss * (count / total)  # the parts' means weigh as their targets do
                loss.backward()
                mean += loss.item()
                self.added(model, count / total, len(part))
        return mean

    def added(self, model: TorusLM, share: float, sequences: int) -> None:
        """Called when `gradients` has added the gradient of a part, which has this share of the batch's targets and
        this many sequences; on one process only."""

    def clip(self, model: nn.Module, largest: float) -> None:
        """Scales the gradient down to the norm ``largest`` over all parameters of the run, those of other processes
        included."""
        nn.utils.clip_grad_norm_(model.parameters(), largest)

    def loss(self, model: TorusLM, tokens: Tensor, targets: Tensor, *, first_key: Tensor | None = None) -> Tensor:
        """`TorusLM.loss` of a whole batch, with at least one target, without a gradient; the same in every process."""
        return model.loss(tokens, targets, first_key=first_key)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint, whole, from what every process holds of them; for the first process only."""
        return dict(tensors)

    def scatter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process holds of the tensors of a checkpoint: undoes `gather`."""
        return dict(tensors)

    def param_groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The optimiser's ``param_groups`` for a checkpoint, with all parameters of the run."""
        return optimizer.state_dict()["param_groups"]

    def agree(self, number: float) -> float:
        """The number as the first process has it."""
        return number

    def separate_random_numbers(self) -> None:
        """Gives every process random numbers of its own, for dropout: the first one keeps PyTorch's state, the others
        take a seed from it and their rank."""


ONE_PROCESS = Layout()


class ManyProcesses(Layout):
    """What all layouts on several processes share; the process group is the default one of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def agree(self, number: float) -> float:
        return float(self._everywhere(torch.tensor(number, dtype=torch.float64), source=0))

    def separate_random_numbers(self) -> None:
        if self.rank > 0:
            shared = torch.Generator()
            shared.set_state(torch.get_rng_state())
            seed = int(torch.randint(2**62, (), generator=shared))
            torch.manual_seed(seed + self.rank)

    def _sum(self, number: float) -> float:
        """The sum of all processes' numbers, the same in each."""
        numbers = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(numbers)
        return float(numbers)

    def _everywhere(self, value: Tensor, source: int) -> Tensor:
        """A tensor as the process ``source`` has it; it is overwritten in the others."""
        dist.broadcast(value, src=source)
        return value


def count_targets(targets: Tensor) -> int:
    """How many tokens have a loss."""
    return int((targets != IGNORED).sum())


def parts_of(
    tokens: Tensor, targets: Tensor, first_key: Tensor | None, parts: int
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """A batch ``[B, T]`` in parts of ``B / parts`` sequences."""
    keys = [None] * parts if first_key is None else first_key.chunk(parts)
    return list(zip(tokens.chunk(parts), targets.chunk(parts), keys, strict=True))
