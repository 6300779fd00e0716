"""Tokenizers of byte-pair encoding: learn one from text, and look at what it does."""

from __future__ import annotations

import argparse
import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from ..data import DEFAULT_MAX_BYTES, DataError, Text
from ..tokenizer import BPETokenizer, load_tokenizer

HELP = "train a tokenizer"

DEFAULT_FILE = "runs/tokenizer.json"
DEFAULT_VOCAB_SIZE = 4096
DEFAULT_HELD_OUT = 0.15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of tokenizers."""
    commands = parser.add_subparsers(dest="tokenizer_command", required=True, metavar="{train,encode}")
    training = commands.add_parser("train", help="learn a vocabulary",
                                   description="Learns byte-pair encoding from text, for 'train --tokenizer'.")
    training.add_argument("--data",
                          help="file, or folder of text files (default: the Python standard library's sources)")
    training.add_argument("--max-bytes", type=int, default=DEFAULT_MAX_BYTES,
                          help="cut the text there (default: %(default)s)")
    training.add_argument("--held-out", type=float, default=DEFAULT_HELD_OUT, metavar="FRACTION",
                          help="part of the text, at its end, not to learn from: what models are validated and tested "
                               "on (default: %(default)s)")
    training.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE,
                          help="tokens at most, with 256 bytes and 4 special ones (default: %(default)s)")
    training.add_argument("--output", default=DEFAULT_FILE, metavar="FILE", help="(default: %(default)s)")
    training.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    encoding = commands.add_parser("encode", help="show the tokens of a text",
                                   description="Shows the tokens of a text, one a line: number and bytes.")
    encoding.add_argument("--tokenizer", default=DEFAULT_FILE, metavar="FILE", help="(default: %(default)s)")
    encoding.add_argument("--text", required=True, help="text to encode")


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Checks the options."""
    return _prepare_train(options) if options.tokenizer_command == "train" else _prepare_encode(options)


def _prepare_train(options: argparse.Namespace) -> Callable[[], None]:
    file = Path(options.output)
    if not 0 <= options.held_out < 1:
        raise ValueError(f"--held-out must be at least 0 and below 1, got {options.held_out}")
    if options.vocab_size < BPETokenizer.SMALLEST:
        raise ValueError(f"--vocab-size must be at least {BPETokenizer.SMALLEST}, got {options.vocab_size}")
    if options.max_bytes < 1:
        raise ValueError(f"--max-bytes must be at least 1, got {options.max_bytes}")
    if file.exists() and not options.overwrite:
        raise ValueError(f"{file} exists: --overwrite replaces it")
    size = _size(Text(options.data, options.max_bytes, joined=False))
    learned = round(size * (1 - options.held_out))
    if not learned:
        raise DataError("no text to learn from; name a file or folder of text")
    text = Text(options.data, learned, joined=False)

    def run() -> None:
        with tqdm(total=learned, disable=None, unit="B", unit_scale=True, desc="reading", leave=False) as bar:
            tokenizer = BPETokenizer.train(_texts(text, bar), options.vocab_size)
        file.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(file)
        print(f"{tokenizer.vocab_size} tokens from {learned:,} bytes of {text.source}; wrote {file}")

    return run


def _size(text: Text) -> int:
    return sum(len(chunk) for document in text.documents() for chunk in document)


def _texts(text: Text, bar: tqdm) -> Iterator[str]:
    for document in text.documents():
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for chunk in document:
            yield decoder.decode(chunk)
            bar.update(len(chunk))


def _prepare_encode(options: argparse.Namespace) -> Callable[[], None]:
    tokenizer = load_tokenizer(options.tokenizer)
    tokens = tokenizer.encode(options.text.encode(errors="surrogateescape")).tolist()
    return lambda: print("\n".join(f"{token}\t{tokenizer.token_bytes[token]!r}" for token in tokens))
