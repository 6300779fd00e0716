"""The part of a run's text that a command scores models on."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from .. import data
from ..checkpoint import CheckpointError
from ..evaluation import Score, score
from ..lm import TorusLM
from ..tokenizer import Tokenizer
from ..train import load_config

SPLITS = ("training", "validation", "test")


def add_part_options(parser: argparse.ArgumentParser, split: str) -> None:
    """Which part, by default ``split``, and how it is cut into sequences."""
    parser.add_argument("--split", choices=SPLITS, default=split, help="part of the text (default: %(default)s)")
    parser.add_argument("--data", metavar="PATH", help="where the text of the run is now (default: where it was)")
    parser.add_argument("--windows", type=int, metavar="N",
                        help="how many sequences, spread evenly over the part (default: all of it)")
    parser.add_argument("--seq-len", type=int, metavar="T",
                        help="tokens per sequence, each of which begins without a context (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (default: %(default)s)")


@dataclass(frozen=True)
class Part:
    """Tokens of a part of a text, and how models are scored on them.

    Attributes:
        tokens: ``[tokens]``.
        tokenizer: that of the tokens.
        windows: how many sequences; None for all that there are, one after the other.
        seq_len, batch_size: tokens of each, and how many at a time.
        pack_documents: as in `score`.
    """

    tokens: Tensor
    tokenizer: Tokenizer
    windows: int | None
    seq_len: int
    batch_size: int
    pack_documents: bool

    @property
    def number_of_windows(self) -> int:
        """Also where all are meant."""
        return (len(self.tokens) - 1) // self.seq_len if self.windows is None else self.windows

    def score(self, model: TorusLM) -> Score:
        """With a progress bar on a terminal."""
        if self.windows is None:
            batches = data.all_batches(self.tokens, self.batch_size, self.seq_len)
        else:
            batches = data.fixed_batches(self.tokens, self.windows, self.batch_size, self.seq_len)
        total = math.ceil(self.number_of_windows / self.batch_size)
        shown = tqdm(batches, total=total, disable=None, leave=False)
        return score(model, shown, self.tokenizer, pack_documents=self.pack_documents)


def load_part(options: argparse.Namespace, tokenizer: Tokenizer) -> Part:
    """The part that `add_part_options` names, of the text of the run of ``--checkpoint``.

    Raises:
        ValueError: an option is out of range.
        CheckpointError, DataError: the run has no such part, or its text is not there.
    """
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
    return Part(parts[SPLITS.index(options.split)], tokenizer, options.windows, seq_len, options.batch_size,
                config.pack_documents)
