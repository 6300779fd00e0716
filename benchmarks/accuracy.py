"""Whether a result is right: the error budget that every backend, and every peer before it is timed, has to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .workloads import DIFFERENTIABLE, Attention, Inputs, head_dimension

RESULTS = ("out", *(f"d_{name}" for name in DIFFERENTIABLE))

FACTOR = 2.0
"""How many times the error of plain PyTorch a result may have."""

PEER_FACTOR = 8.0
"""The same for a peer: low precision may cost it more than it costs SDPA, which keeps scores in float32, and it is
timed all the same. Its parameters' gradients may also be off by a rounding to the dtype of the tokens that they are
sums of. What is wrong is further off."""

_ROUNDINGS = 8


class WrongResult(RuntimeError):
    """A candidate exceeds its error budget, so that its time would mean nothing."""


@dataclass(frozen=True)
class Check:
    """One tensor of a result: its largest error against float64, and the error that it may have."""

    result: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # false for NaN


def evaluate(attention: Attention, inputs: Inputs, *, backward: bool) -> dict[str, Tensor]:
    """``out`` and, with ``backward``, the gradients of the seven inputs by the names of `RESULTS`."""
    if not backward:
        return {"out": inputs.forward(attention)}
    return dict(zip(RESULTS, inputs.forward_backward(attention), strict=True))


def _error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth.double()).abs().max().item()


def checks(
    actual: Mapping[str, Tensor], truth: Mapping[str, Tensor], plain: Mapping[str, Tensor], *, peer: bool = False
) -> list[Check]:
    """``error <= factor * (error of plain PyTorch in the same dtype) + eps`` for every tensor of ``actual``.

    ``eps`` is the final rounding to the tensor's dtype and a few roundings of the accumulation, relative to the
    tensor's largest value: plain PyTorch may be right by luck in a small tensor.

    Args:
        actual: the results to judge.
        truth: the same results in float64, from the same numbers.
        plain: the same results by plain PyTorch calls, in the dtype of ``actual``.
        peer: judges as a peer, see `PEER_FACTOR`.
    """
    factor = PEER_FACTOR if peer else FACTOR
    found = []
    for name, value in actual.items():
        if value is None or value.shape != truth[name].shape:
            raise WrongResult(f"{name} has shape {None if value is None else list(value.shape)}, "
                              f"not {list(truth[name].shape)}")
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        rounded_to = actual["out"].dtype if peer else value.dtype
        eps = (torch.finfo(rounded_to).eps + _ROUNDINGS * torch.finfo(wide).eps) * truth[name].abs().max().item()
        budget = factor * _error(plain[name], truth[name]) + eps
        found.append(Check(name, _error(value, truth[name]), budget))
    return found


def refuse_wrong(name: str, found: list[Check]) -> list[Check]:
    """The checks of a candidate, all of them passed.

    Raises:
        WrongResult: one of them is not.
    """
    if wrong := [f"{c.result}: error {c.error:.2e}, budget {c.budget:.2e}" for c in found if not c.ok]:
        raise WrongResult(f"{name} is wrong and is not timed: {'; '.join(wrong)}")
    return found


class Gate:
    """Lets nothing be timed on these inputs that is wrong.

    Args:
        inputs: the inputs to be timed.
        trusted: plain PyTorch, evaluated in float64 for the truth and in the inputs' dtype for the budget.
        backward: gradients are judged as well, and ``out`` as it is where gradients are wanted.
        heads: the heads to judge; all by default. No head depends on another, and the truth costs less so.
    """

    def __init__(
        self, inputs: Inputs, trusted: Attention, *, backward: bool, heads: Sequence[int] | None = None
    ) -> None:
        self._inputs, self._backward = inputs, backward
        self._heads = None if heads is None else list(heads)
        judged = inputs if heads is None else inputs.of_heads(self._heads)
        self._truth = evaluate(trusted, judged.to(torch.float64), backward=backward)
        self._plain = evaluate(trusted, judged, backward=backward)

    def check(self, name: str, attention: Attention, *, peer: bool = False) -> list[Check]:
        """The checks of a candidate's results.

        Raises:
            WrongResult: one of them exceeds its budget.
        """
        return self.judge(name, evaluate(attention, self._inputs, backward=self._backward), peer=peer)

    def judge(self, name: str, actual: Mapping[str, Tensor | None], *, peer: bool = False) -> list[Check]:
        """`check` of results that were computed elsewhere."""
        if self._heads is not None:
            actual = {result: None if x is None else x.index_select(head_dimension(x), torch.tensor(self._heads))
                      for result, x in actual.items()}
        return refuse_wrong(name, checks(actual, self._truth, self._plain, peer=peer))
