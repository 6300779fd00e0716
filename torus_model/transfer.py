"""What a run takes over from others: initial weights, parts of which may be frozen or kept sparse, and a teacher."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .checks import check_numbers


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Transfer from other runs. Every default is a run that takes over nothing.

    Args:
        initial: checkpoint, or folder of a run, whose weights this run begins with and whose tokenizer it has;
            ``model`` must be its model. Optimiser, schedule and text are new. It is read at the start only.
        freeze: parts of the model that do not learn, as in `freeze`.
        keep_zeros: weights of linear layers that are 0 at the start stay 0: for the weights of a pruned model.
        teacher: checkpoint, or folder of a run, to learn from as in `Distillation`; it must have the same tokenizer.
        distill_weight: part of the loss that the teacher's predictions have, from 0 to 1.
        distill_temperature: of the softmaxes that are compared; positive.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    initial: str | None = None
    freeze: tuple[str, ...] = ()
    keep_zeros: bool = False
    teacher: str | None = None
    distill_weight: float = 0.5
    distill_temperature: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.freeze, (tuple, list)) or not all(isinstance(part, str) for part in self.freeze):
            raise TypeError(f"freeze must be names of parts of the model, got {self.freeze!r}")
        object.__setattr__(self, "freeze", tuple(self.freeze))  # a list, where it came from JSON
        if self.keep_zeros and self.initial is None:
            raise ValueError("keep_zeros needs an initial checkpoint, got none")
        check_numbers(self, "distill_weight", where=lambda x: 0 <= x <= 1, needs="at least 0 and at most 1")
        check_numbers(self, "distill_temperature", where=lambda x: 0 < x < math.inf, needs="positive")


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Takes the gradients from parts of a model, so that an optimiser made afterwards leaves them alone.

    Args:
        parts: names of modules or parameters as in ``named_parameters``, each with all that is below it; a number may
            be a range: ``"embedding"``, ``"blocks.0-2"``, ``"blocks.0-1.attention"``.

    Raises:
        ValueError: a part is not there, or nothing is left to learn.
    """
    parameters = dict(model.named_parameters())
    for part in parts:
        for name in _expand(part):
            found = [p for key, p in parameters.items() if key == name or key.startswith(f"{name}.")]
            if not found:
                raise ValueError(f"freeze must name parts of the model ({', '.join(_parts(parameters))}, or what is "
                                 f"below one, such as blocks.0.attention), got {part!r}")
            for parameter in found:
                parameter.requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError("freeze must leave something to learn, got all parts of the model")


def _expand(part: str) -> Iterable[str]:
    """``"a.0-2"`` as ``"a.0", "a.1", "a.2"``."""
    choices = []
    for component in part.split("."):
        first, _, last = component.partition("-")
        is_range = first.isdigit() and last.isdigit() and int(first) <= int(last)
        choices.append([str(n) for n in range(int(first), int(last) + 1)] if is_range else [component])
    return [".".join(components) for components in itertools.product(*choices)]


def _parts(names: Iterable[str]) -> list[str]:
    """The parts of a model in words: ``["embedding", "blocks.0-3", "norm"]``."""
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    tops = dict.fromkeys(name.split(".")[0] for name in names)
    return [f"blocks.0-{max(blocks)}" if top == "blocks" else top for top in tops]


def keep_zeros(model: nn.Module) -> None:
    """Lets the weights of linear layers that are 0 stay 0: they get no gradient, so that AdamW, which decays them to 0,
    never moves them."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            mask = module.weight.detach() != 0
            module.weight.register_hook(mask.mul)
