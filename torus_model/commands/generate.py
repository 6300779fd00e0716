"""Continues a text with a trained model."""

from __future__ import annotations

import argparse
import codecs
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..checks import check_seed
from ..generate import beam_search, check_request, generate, generate_batch
from ..sampling import Sampling
from ..tokenizer import Tokenizer
from .options import add_model_options, load_model_and_tokenizer

HELP = "write text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to continue, and how."""
    add_model_options(parser)
    parser.add_argument("--prompt", required=True, action="append",
                        help="text to continue; given several times, all are continued together")
    parser.add_argument("--tokens", "--bytes", type=int, default=200, dest="new_tokens", metavar="N",
                        help="how many to write at most; a model of bytes writes bytes (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="0 for the likeliest token every time (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float,
                        help="sample from the fewest likeliest tokens whose probabilities reach this (default: all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0,
                        help="above 1, tokens that the text already has become less likely (default: %(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TOKEN",
                        help="text of one token, of one byte for a model of bytes, after which to stop; may be given "
                             "several times")
    parser.add_argument("--ignore-eos", action="store_true",
                        help="do not stop at the end of a document, where the model knows of documents")
    parser.add_argument("--beams", type=int,
                        help="search for the likeliest text with so many beams, instead of sampling")
    parser.add_argument("--length-penalty", type=float, default=1.0,
                        help="of the beam search: 0 compares sums of log-probabilities, 1 means (default: %(default)s)")
    parser.add_argument("--no-cache", dest="use_cache", action="store_false",
                        help="run the whole text for every token, instead of keeping keys and values")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Bytes of the command line that are not UTF-8 go to the tokenizer as they are."""
    return tokenizer.encode(text.encode(errors="surrogateescape")).tolist()


def _prompt(tokenizer: Tokenizer, text: str) -> Tensor:
    tokens = _encode(tokenizer, text)
    if tokens and tokenizer.bos is not None:
        tokens = [tokenizer.bos, *tokens]
    return torch.tensor(tokens, dtype=torch.int64)


def _stop_tokens(tokenizer: Tokenizer, stops: list[str], ignore_eos: bool) -> set[int]:
    codes = [_encode(tokenizer, stop) for stop in stops]
    if wrong := [stop for stop, code in zip(stops, codes, strict=True) if len(code) != 1]:
        raise ValueError(f"--stop must be one token, a character of one byte for a model of bytes, got {wrong[0]!r}")
    ends = set() if tokenizer.eos is None or ignore_eos else {tokenizer.eos}
    return {code for [code] in codes} | ends


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Reads the model and the prompts."""
    check_seed(options.seed)
    model, tokenizer = load_model_and_tokenizer(options)
    prompts = [_prompt(tokenizer, text) for text in options.prompt]
    stop_tokens = _stop_tokens(tokenizer, options.stop, options.ignore_eos)
    new_tokens = options.new_tokens
    sampled = {
        "temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p,
        "repetition_penalty": options.repetition_penalty, "stop_tokens": stop_tokens, "use_cache": options.use_cache,
        "generator": torch.Generator().manual_seed(options.seed),
    }
    if options.beams is not None:
        check_request(prompts, new_tokens, options.beams, options.length_penalty)
        found = (
            beam_search(model, prompt, new_tokens, beams=options.beams, length_penalty=options.length_penalty,
                        stop_tokens=stop_tokens, use_cache=options.use_cache)
            for prompt in prompts
        )
        return lambda: _write_texts(tokenizer, prompts, found)
    if len(prompts) > 1:
        check_request(prompts, new_tokens)
        Sampling(options.repetition_penalty, options.temperature, options.top_k, options.top_p)  # checks them
        return lambda: _write_texts(tokenizer, prompts, generate_batch(model, prompts, new_tokens, **sampled))
    tokens = generate(model, prompts[0], new_tokens, **sampled)
    return lambda: _write_text(tokenizer, itertools.chain(prompts[0].tolist(), tokens))


def _write_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> None:
    """Writes tokens as they come: their bytes need not be UTF-8, and a character may arrive in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        print(decoder.decode(tokenizer.token_bytes[token]), end="", flush=True)
    print(decoder.decode(b"", final=True))


def _write_texts(tokenizer: Tokenizer, prompts: list[Tensor], continuations: Iterable[Tensor]) -> None:
    for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        if number:
            print("---")
        _write_text(tokenizer, prompt.tolist() + continuation.tolist())
