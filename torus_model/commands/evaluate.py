"""Scores a trained model on a part of the text that its run was given: bits per byte, and perplexity of a token."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from tqdm import tqdm

from .. import data
from ..checkpoint import CheckpointError
from ..evaluation import score
from ..train import load_config
from .options import add_model_options, load_model_and_tokenizer

HELP = "score a trained model"

SPLITS = ("training", "validation", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to score, and on what."""
    add_model_options(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="part of the text (default: %(default)s)")
    parser.add_argument("--data", metavar="PATH", help="where the text of the run is now (default: where it was)")
    parser.add_argument("--windows", type=int, metavar="N",
                        help="how many sequences, spread evenly over the part (default: all of it)")
    parser.add_argument("--seq-len", type=int, metavar="T",
                        help="tokens per sequence, each of which begins without a context (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (default: %(default)s)")


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Reads model and text."""
    model, tokenizer = load_model_and_tokenizer(options)
    config, fingerprint = load_config(options.checkpoint)
    seq_len = config.seq_len if options.seq_len is None else options.seq_len
    for name, value in (("--windows", options.windows), ("--seq-len", seq_len), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.split == "test" and config.test_fraction == 0:
        raise CheckpointError(f"{options.checkpoint} was trained without a test part; --split validation has one")
    corpus = data.load_corpus(config.data if options.data is None else options.data, config.max_bytes, tokenizer)
    if corpus.fingerprint != fingerprint:
        raise CheckpointError(f"{options.checkpoint} was trained on other text than {corpus.source}; "
                              f"name the text with --data")
    parts = data.split(corpus.data, config.validation_fraction, seq_len + 1, config.test_fraction)
    part = parts[SPLITS.index(options.split)]

    def run() -> None:
        if options.windows is None:
            windows = (len(part) - 1) // seq_len
            batches = data.all_batches(part, options.batch_size, seq_len)
        else:
            windows = options.windows
            batches = data.fixed_batches(part, windows, options.batch_size, seq_len)
        shown = tqdm(batches, total=math.ceil(windows / options.batch_size), disable=None, leave=False)
        found = score(model, shown, tokenizer, pack_documents=config.pack_documents)
        print(f"{options.split}: {found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.4f} "
              f"({found.tokens:,} tokens, {found.bytes:,} bytes, in {windows:,} windows of {seq_len})")

    return run
