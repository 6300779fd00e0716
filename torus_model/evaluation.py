"""How well a language model predicts text, in units that do not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import IGNORED, within_documents
from .lm import TorusLM
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """What a model made of a text.

    Attributes:
        nats: cross-entropy of all predicted tokens together.
        tokens: how many were predicted.
        bytes: length of the text that they stand for; special tokens stand for none.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; what predicting the special tokens costs is included."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Of a token: comparable only where the tokenizer is the same."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:  # above 709 nats for each token
            return math.inf


@torch.inference_mode()
def score(
    model: TorusLM,
    batches: Iterable[tuple[Tensor, Tensor]],
    tokenizer: Tokenizer,
    *,
    pack_documents: bool = False,
    loss: Callable[..., Tensor] | None = None,
) -> Score:
    """Scores a model, in evaluation mode and without autocast.

    Args:
        model: the model.
        batches: ``(tokens, targets)``, each ``[B, T]`` int64.
        tokenizer: that of the tokens.
        pack_documents: whether the documents in a window see nothing of each other, as in training.
        loss: takes the place of `TorusLM.loss` of the model.
    """
    loss = model.loss if loss is None else loss
    was_training = model.training
    model.eval()
    nats, count, length = 0.0, 0, 0
    for tokens, targets in batches:
        first_key = None
        if pack_documents:
            first_key, targets = within_documents(tokens, targets, tokenizer)
        predicted = targets[targets != IGNORED]
        if len(predicted):
            nats += loss(tokens, targets, first_key=first_key).item() * len(predicted)
            count += len(predicted)
            length += int(tokenizer.token_lengths[predicted].sum())
    model.train(was_training)
    return Score(nats, count, length)
