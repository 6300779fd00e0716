"""Knowledge distillation: a model learns from the predictions of another one."""

from __future__ import annotations

import functools
import hashlib
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from torus_kernels.checks import parameter_dtype

from . import checkpoint
from .data import IGNORED
from .lm import TorusLM, cross_entropy
from .tokenizer import Tokenizer, TokenizerError


class Distillation:
    """A loss between what the student and what a larger teacher expect of the next token.

    With the logits z of the student and u of the teacher, the weight w and the temperature T::

        (1 - w) CE(z, target) + w T^2 KL(softmax(u / T) || softmax(z / T))

    as means over the targets (Hinton et al. 2015, section 2; the factor T^2 keeps the size of the gradients). The
    teacher is in evaluation mode and gets no gradient.

    Args:
        teacher: of the same vocabulary; put into evaluation mode.
        weight: w, from 0 to 1.
        temperature: T, positive.
    """

    def __init__(self, teacher: TorusLM, weight: float, temperature: float) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight
        self.temperature = temperature

    def __call__(self, logits: Tensor, targets: Tensor, tokens: Tensor, first_key: Tensor | None) -> Tensor:
        """The loss, in nats per token.

        Args:
            logits: the student's, ``[B, T, vocab_size]``.
            targets, tokens, first_key: each ``[B, T]``, as in `TorusLM.loss`.
        """
        with torch.no_grad():
            expected = self.teacher(tokens, first_key=first_key)
        seen = targets != IGNORED
        log_p, log_q = (
            F.log_softmax(z[seen].to(parameter_dtype(z.dtype)) / self.temperature, -1) for z in (logits, expected)
        )  # [targets, vocab_size]
        soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return (1 - self.weight) * cross_entropy(logits, targets) + self.weight * self.temperature**2 * soft

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the teacher's weights: tells whether a run that continues still has the same one."""
        digest = hashlib.sha256()
        for name, x in sorted(self.teacher.state_dict().items()):
            digest.update(name.encode())
            digest.update(x.dequantize().numpy().tobytes())
        return digest.hexdigest()


def load_teacher(path: str | os.PathLike, tokenizer: Tokenizer, backend: str | None = None) -> TorusLM:
    """The model of a checkpoint, for students with this tokenizer.

    Raises:
        CheckpointError: there is no model.
        TokenizerError: it has another tokenizer.
    """
    model = checkpoint.load_model(path, backend)
    if checkpoint.load_tokenizer(path).fingerprint != tokenizer.fingerprint:
        raise TokenizerError(f"a teacher must have the tokenizer of its student, but that of {path} is another")
    return model
