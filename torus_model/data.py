"""Bytes of real text: the corpus, its split and random windows of it."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DEFAULT_MAX_BYTES = 64 * 2**20

_NOT_TEXT = {"__pycache__", "encodings"}  # encodings: character tables
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class DataError(ValueError):
    """The data asked for is not there or not enough; the message says which."""


@dataclass(frozen=True)
class Corpus:
    """Text as bytes.

    Attributes:
        data: ``[bytes]`` uint8.
        files: how many files it was read from.
        source: where it was read from.
    """

    data: Tensor
    files: int
    source: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the bytes: tells whether a run that continues still reads the same text."""
        return hashlib.sha256(self.data.numpy()).hexdigest()


def load_corpus(path: str | os.PathLike | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> Corpus:
    """Reads a corpus, files in the order of their paths, joined by newlines.

    Args:
        path: a file, or a folder of which every text file is read (hidden files and files with NUL bytes are not).
            None for the sources of the Python standard library, without tests and installed packages.
        max_bytes: the text is cut there.

    Raises:
        DataError: there is no text.
        OSError: a file cannot be read.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        source, candidates = f"the standard library in {root}", _standard_library(root)
    else:
        root = Path(path)
        source = str(root)
        if not root.exists():
            raise DataError(f"no file or folder at {root}")
        candidates = _text_files(root) if root.is_dir() else iter([root])
    text, files = bytearray(), 0
    for file in candidates:
        if len(text) >= max_bytes:
            break
        content = file.read_bytes()
        if root.is_dir() and b"\0" in content:
            continue
        if text:
            text += b"\n"
        text += content
        files += 1
    del text[max_bytes:]
    if not text:
        raise DataError(f"no text in {source}; name a file or folder of text")
    return Corpus(torch.frombuffer(text, dtype=torch.uint8), files, source)


def _walk(root: Path, excluded: set[str]) -> Iterator[Path]:
    """Files below ``root``, in an order that does not depend on the file system."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in excluded and not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


def _text_files(root: Path) -> Iterator[Path]:
    return _walk(root, {"__pycache__"})


def _standard_library(root: Path) -> Iterator[Path]:
    return (file for file in _walk(root, _NOT_TEXT | _NOT_THE_LIBRARY) if file.suffix == ".py")


def split(data: Tensor, validation_fraction: float, window: int) -> tuple[Tensor, Tensor]:
    """``(training, validation)``: the validation part is the contiguous end of the text, disjoint from the rest.

    Raises:
        DataError: a part is shorter than one ``window``.
    """
    training_bytes = len(data) - round(len(data) * validation_fraction)
    training, validation = data[:training_bytes], data[training_bytes:]
    for name, part in (("training", training), ("validation", validation)):
        if len(part) < window:
            raise DataError(f"the {name} part has {len(part)} bytes, fewer than one window of {window}; "
                            f"give more text or a shorter sequence")
    return training, validation


def _windows(data: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    windows = data[starts[:, None] + torch.arange(seq_len + 1)].long()  # [B, T + 1]
    return windows[:, :-1], windows[:, 1:]


def random_batch(data: Tensor, batch_size: int, seq_len: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(tokens, targets)``, each ``[B, T]`` int64, from windows that start anywhere with equal probability."""
    starts = torch.randint(len(data) - seq_len, (batch_size,), generator=generator)
    return _windows(data, starts, seq_len)


def fixed_batches(data: Tensor, windows: int, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``(tokens, targets)`` of ``windows`` windows spread evenly over the data: always the same ones."""
    last = len(data) - seq_len - 1
    starts = torch.linspace(0, last, windows, dtype=torch.float64).round().long()
    for chunk in starts.split(batch_size):
        yield _windows(data, chunk, seq_len)
