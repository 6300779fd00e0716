"""Sampling from a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .lm import TorusLM


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    """One token from ``softmax(logits / temperature)``, ``logits`` ``[vocab_size]``; the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        smallest = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return int(torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))


def generate(
    model: TorusLM,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields tokens that continue the prompt, one at a time.

    Every step runs the whole model on the last ``n_major * n_minor`` tokens, the lattice's window, at their
    positions in the text.

    Args:
        model: in evaluation mode, unless its dropout is wanted.
        prompt: ``[T]`` int64, at least one token.
        new_tokens: how many to yield.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: samples from the k likeliest tokens (and those that tie with the last of them); None for all.
        generator: source of the random numbers; None for the global one.

    Raises:
        ValueError: an argument is out of range.
    """
    if prompt.dim() != 1 or len(prompt) == 0:
        raise ValueError(f"prompt must have shape [T] with at least one token, got {list(prompt.shape)}")
    if new_tokens < 0:
        raise ValueError(f"new_tokens must not be negative, got {new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return _generate(model, prompt, new_tokens, temperature, top_k, generator)


@torch.inference_mode()
def _generate(model, prompt, new_tokens, temperature, top_k, generator) -> Iterator[int]:
    window = model.config.lattice.num_sites
    text = prompt
    for _ in range(new_tokens):
        offset = max(0, len(text) - window)
        logits = model(text[None, offset:], offset=offset)[0, -1]  # [vocab_size]
        token = sample(logits, temperature, top_k, generator)
        text = torch.cat((text, text.new_tensor([token])))
        yield token
