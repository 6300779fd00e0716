"""Text from a model: sampling and beam search, one token at a time in constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from .cache import LMCache
from .lm import TorusLM
from .sampling import Sampling

_PADDING = -1
"""Marks what is not text: the left padding of a shorter prompt, and what follows a stop token."""


class _Texts:
    """Texts that grow together, and the logits of their next tokens.

    Shorter prompts are padded on the left and see nothing of the padding. Scores depend on lags alone, so that where
    a text begins makes no difference but rounding.
    """

    def __init__(self, model: TorusLM, prompts: Sequence[Tensor], use_cache: bool) -> None:
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        self.tokens = torch.stack([
            torch.cat((prompt.new_full((pad,), _PADDING), prompt))
            for prompt, pad in zip(prompts, padding, strict=True)
        ])  # [B, T]
        self._first_key = self.tokens.new_tensor(padding) if any(padding) else None  # [B]
        self._model = model
        self._cache = LMCache(model, len(prompts)) if use_cache else None

    def logits(self) -> Tensor:
        """``[B, vocab_size]``."""
        if self._cache is not None:
            unread = self.tokens[:, len(self._cache):].clamp(min=0)
            return self._cache.logits(self._model, unread, self._first_key)
        first_key = None if self._first_key is None else self._first_key[:, None].expand_as(self.tokens)
        return self._model(self.tokens.clamp(min=0), first_key=first_key)[:, -1]

    def append(self, tokens: Tensor) -> None:
        """One token ``[B]`` for each text."""
        self.tokens = torch.cat((self.tokens, tokens[:, None]), 1)

    def reorder(self, indices: Tensor) -> None:
        """Text b becomes text ``indices[b]``."""
        self.tokens = self.tokens[indices]
        if self._first_key is not None:
            self._first_key = self._first_key[indices]
        if self._cache is not None:
            self._cache.reorder(indices)


def check_request(prompts: Sequence[Tensor], new_tokens: int, beams: int = 1, length_penalty: float = 1.0) -> None:
    """Raises ValueError where there is no prompt, a prompt is not ``[T]`` with a token, or a number is out of range."""
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    for prompt in prompts:
        if prompt.dim() != 1 or len(prompt) == 0:
            raise ValueError(f"prompt must have shape [T] with at least one token, got {list(prompt.shape)}")
    for name, count, smallest in (("new_tokens", new_tokens, 0), ("beams", beams, 1)):
        if count < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {count}")
    if not -100 <= length_penalty <= 100:
        raise ValueError(f"length_penalty must be at least -100 and at most 100, got {length_penalty}")


def generate(
    model: TorusLM,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yields tokens that continue the prompt, one at a time.

    Args:
        model: in evaluation mode, unless its dropout is wanted.
        prompt: ``[T]`` int64, at least one token.
        new_tokens: how many to yield at most.
        temperature, top_k, top_p, repetition_penalty: as in `Sampling`.
        stop_tokens: the first of them that is drawn is the last that is yielded.
        generator: source of the random numbers; None for the global one.
        use_cache: keep keys and values from token to token: time and memory of a token are then constant. Otherwise
            every token runs the whole text; the logits are the same up to rounding.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, before anything is computed.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p)
    check_request([prompt], new_tokens)
    steps = _sample(model, [prompt], new_tokens, sampling, frozenset(stop_tokens), generator, use_cache)
    return (int(tokens[0]) for tokens in steps)


def generate_batch(
    model: TorusLM,
    prompts: Sequence[Tensor],
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> list[Tensor]:
    """Continues several prompts at once, of any lengths.

    Args:
        model: as in `generate`, like all arguments that are not listed here.
        prompts: each ``[T]`` int64, at least one token.
        on_tokens: called at every step with the new token of each text, None for a text that has ended.

    Returns:
        For each prompt the new tokens ``[n]`` int64; a stop token, where one was drawn, is the last of them.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p)
    check_request(prompts, new_tokens)
    drawn = []
    for tokens in _sample(model, prompts, new_tokens, sampling, frozenset(stop_tokens), generator, use_cache):
        drawn.append(tokens)
        if on_tokens is not None:
            on_tokens([None if token == _PADDING else token for token in tokens.tolist()])
    texts = torch.stack(drawn, 1) if drawn else prompts[0].new_empty(len(prompts), 0)  # [B, steps]
    return [text[text != _PADDING] for text in texts]


@torch.inference_mode()
def _sample(
    model: TorusLM,
    prompts: Sequence[Tensor],
    new_tokens: int,
    sampling: Sampling,
    stop_tokens: frozenset[int],
    generator: torch.Generator | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    """Yields ``[B]`` tokens a step, `_PADDING` for texts that have ended, until all have."""
    texts = _Texts(model, prompts, use_cache)
    stops = texts.tokens.new_tensor(sorted(stop_tokens))
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=texts.tokens.device)
    for _ in range(new_tokens):
        tokens = sampling.draw(texts.logits(), texts.tokens, generator).masked_fill(ended, _PADDING)
        texts.append(tokens)
        yield tokens
        ended = ended | torch.isin(tokens, stops)
        if ended.all():
            return


@torch.inference_mode()
def beam_search(
    model: TorusLM,
    prompt: Tensor,
    new_tokens: int,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    stop_tokens: Collection[int] = (),
    use_cache: bool = True,
) -> Tensor:
    """The likeliest continuation that a beam search finds.

    Continuations are compared by the sum of their log-probabilities over ``length ** length_penalty`` (Wu et al. 2016,
    equation 14, with the length alone). One beam is greedy decoding.

    Args:
        model: in evaluation mode.
        prompt: ``[T]`` int64, at least one token.
        new_tokens: length of a continuation without a stop token.
        beams: continuations kept at every step.
        length_penalty: 0 compares sums, 1 means; larger values prefer longer continuations; from -100 to 100.
        stop_tokens: they end a continuation and belong to it.
        use_cache: as in `generate`.

    Returns:
        The new tokens, ``[n]`` int64.

    Raises:
        ValueError: an argument is out of range.
    """
    check_request([prompt], new_tokens, beams, length_penalty)
    texts = _Texts(model, [prompt] * beams, use_cache)
    # All beams are the same prompt: only the first may have children, or they would all have the same.
    scores = torch.full((beams,), -torch.inf, device=prompt.device)
    scores[0] = 0.0
    best, best_score = prompt.new_empty(0), -torch.inf
    for length in range(1, new_tokens + 1):
        log_probabilities = texts.logits().float().log_softmax(-1)  # [beams, vocab_size]
        vocab_size = log_probabilities.shape[-1]
        candidates = (scores[:, None] + log_probabilities).flatten()
        # As many as there may be continuations that end, and beams that go on.
        kept = min(len(candidates), beams * (1 + len(stop_tokens)))
        top, index = candidates.topk(kept)
        going_on: list[tuple[float, int, int]] = []
        for score, candidate in zip(top.tolist(), index.tolist(), strict=True):
            beam, token = divmod(candidate, vocab_size)
            if token in stop_tokens or length == new_tokens:
                if (penalized := _penalized(score, length, length_penalty)) > best_score:
                    best_score = penalized
                    best = torch.cat((texts.tokens[beam, len(prompt):], prompt.new_tensor([token])))
            elif len(going_on) < beams:
                going_on.append((score, beam, token))
        if not going_on:
            break
        going_on += [(-torch.inf, *going_on[0][1:])] * (beams - len(going_on))
        scores = scores.new_tensor([score for score, _, _ in going_on])
        texts.reorder(prompt.new_tensor([beam for _, beam, _ in going_on]))
        texts.append(prompt.new_tensor([token for _, _, token in going_on]))
    return best


def _penalized(score: float, length: int, length_penalty: float) -> float:
    """Orders as ``score / length ** length_penalty``, whose power may overflow; no score is above 0."""
    return math.inf if score >= 0 else length_penalty * math.log(length) - math.log(-score)
