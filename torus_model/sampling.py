"""From logits to tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_numbers, check_positive_integers


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits; the restrictions apply in the order of the arguments.

    Args:
        repetition_penalty: logits of tokens that the text already has are divided by it where they are positive and
            multiplied where they are negative (CTRL, Keskar et al. 2019, section 4.1); 1 for none.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draws from the k likeliest tokens (and those that tie with the last of them); None for all.
        top_p: draws from the fewest likeliest tokens whose probabilities reach this sum (nucleus sampling, Holtzman
            et al. 2020); None for all.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "repetition_penalty", where=lambda x: 0 < x < math.inf, needs="positive")
        check_numbers(self, "temperature", where=lambda x: 0 <= x < math.inf, needs="at least 0")
        check_positive_integers(self, optional=["top_k"])
        check_numbers(self, optional=["top_p"], where=lambda x: 0 < x <= 1, needs="above 0 and at most 1")

    def draw(
        self, logits: Tensor, text: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Tokens ``[B]`` from logits ``[B, vocab_size]``.

        Args:
            logits: of the next token.
            text: ``[B, T]`` int64, the text so far, which the repetition penalty looks at; negative entries are none.
            generator: source of the random numbers; None for the global one.
        """
        if self.repetition_penalty != 1 and text is not None:
            logits = self._penalise(logits, text)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -math.inf)
        if self.top_p is not None:
            ordered, index = logits.softmax(-1).sort(descending=True)
            before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens; 0 for the likeliest
            excluded = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= self.top_p)
            logits = logits.masked_fill(excluded, -math.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    def _penalise(self, logits: Tensor, text: Tensor) -> Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen.scatter_(-1, text.clamp(min=0), True)
        # A negative entry went to token 0, which is seen only where the text has it.
        seen[:, 0] = (text == 0).any(-1)
        penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, penalised, logits)
