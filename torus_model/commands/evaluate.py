"""Scores a trained model on a part of the text that its run was given: bits per byte, and perplexity of a token."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .options import add_model_options, load_model_and_tokenizer
from .part import add_part_options, load_part

HELP = "score a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to score, and on what."""
    add_model_options(parser)
    add_part_options(parser, "test")


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Reads model and text."""
    model, tokenizer = load_model_and_tokenizer(options)
    part = load_part(options, tokenizer)

    def run() -> None:
        found = part.score(model)
        print(f"{options.split}: {found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.4f} "
              f"({found.tokens:,} tokens, {found.bytes:,} bytes, in {part.number_of_windows:,} windows of "
              f"{part.seq_len})")

    return run
