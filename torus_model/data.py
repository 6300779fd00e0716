"""Real text as tokens: the corpus in a memory-mapped file, its split, and windows of it."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .files import replacing
from .tokenizer import ByteTokenizer, Tokenizer, TokenizerError

DEFAULT_MAX_BYTES = 64 * 2**20

IGNORED = -100
"""Target of a position without a loss; what PyTorch's cross-entropy ignores."""

_CHUNK = 2**20
_NOT_TEXT = {"__pycache__", "encodings"}  # encodings: character tables
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class DataError(ValueError):
    """The data asked for is not there or not enough; the message says which."""


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    Attributes:
        data: ``[tokens]`` uint8, int16 or int32, mapped from a file: what is not looked at takes no memory.
        files: how many files it was read from.
        source: where it was read from.
        bytes: length of the text.
        fingerprint: SHA-256 of the text: tells whether a run that continues still reads the same.
    """

    data: Tensor
    files: int
    source: str
    bytes: int
    fingerprint: str


def cache_dir() -> Path:
    """Where tokenised text is kept: ``TORUS_TEXT_CACHE_DIR``, or torus_model in the user's folder of caches."""
    if chosen := os.environ.get("TORUS_TEXT_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home directory
        base = tempfile.gettempdir()
    return Path(base) / "torus_model"


def load_corpus(
    path: str | os.PathLike | None = None, max_bytes: int = DEFAULT_MAX_BYTES, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Reads a corpus, files in the order of their paths, and tokenises what is not in `cache_dir` yet.

    Each file is a document. A tokenizer with special tokens puts each between BOS and EOS and leaves empty ones out;
    otherwise newlines join them.

    Args:
        path: a file, or a folder of which every text file is read (hidden files and files with NUL bytes are not).
            None for the sources of the Python standard library, without tests and installed packages.
        max_bytes: the text is cut there.
        tokenizer: bytes by default.

    Raises:
        DataError: there is no text.
        OSError: a file cannot be read, or the tokens cannot be kept.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    text = Text(path, max_bytes, joined=tokenizer.bos is None)
    digest, size, files = hashlib.sha256(), 0, 0
    for document in text.documents():
        of_document = digest if text.joined else hashlib.sha256()
        for chunk in document:
            of_document.update(chunk)
            size += len(chunk)
        if not text.joined:
            digest.update(of_document.digest())
        files += 1
    if not size:
        raise DataError(f"no text in {text.source}; name a file or folder of text")
    fingerprint = digest.hexdigest()
    key = hashlib.sha256(f"{fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()
    file = cache_dir() / f"{key[:32]}.tokens"
    if not file.exists():
        _tokenise(text, tokenizer, size, file)
    # Copy-on-write: PyTorch has no tensors that must not be written to.
    data = torch.from_numpy(np.memmap(file, tokenizer.dtype, mode="c"))
    return Corpus(data, files, text.source, size, fingerprint)


def _tokenise(text: Text, tokenizer: Tokenizer, size: int, file: Path) -> None:
    """Writes the tokens of a text; a crash leaves no file under this name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=size, disable=None, unit="B", unit_scale=True, desc="tokenising", leave=False, file=sys.stderr)
    with replacing(file) as temporary, open(temporary, "wb") as output, bar:
        for document in text.documents():
            if tokenizer.bos is not None:
                np.array([tokenizer.bos], tokenizer.dtype).tofile(output)
            for chunk in document:
                tokenizer.encode(chunk).tofile(output)
                bar.update(len(chunk))
            if tokenizer.eos is not None:
                np.array([tokenizer.eos], tokenizer.dtype).tofile(output)


class Text:
    """Text to read from files, without holding it in memory.

    Args:
        path, max_bytes: as in `load_corpus`.
        joined: whether newlines join the documents; otherwise empty ones are left out.

    Attributes:
        source: where the text comes from, in words.

    Raises:
        DataError: there is nothing at ``path``.
    """

    def __init__(self, path: str | os.PathLike | None, max_bytes: int, *, joined: bool) -> None:
        self.joined = joined
        self._max_bytes = max_bytes
        self._root = Path(sysconfig.get_path("stdlib")) if path is None else Path(path)
        self._is_library = path is None
        self.source = f"the standard library in {self._root}" if path is None else str(path)
        if not self._root.is_dir() and not self._root.is_file():  # a pipe could not be read twice
            raise DataError(f"no file or folder at {self._root}")

    def _files(self) -> Iterator[Path]:
        if self._is_library:
            return _standard_library(self._root)
        return _text_files(self._root) if self._root.is_dir() else iter([self._root])

    def documents(self) -> Iterator[Iterator[bytes]]:
        """The documents in order, each as chunks that follow each other; take one's chunks before the next one."""
        used = 0
        for file in self._files():
            if used >= self._max_bytes:
                return
            with _mapped(file) as content:
                if self._root.is_dir() and content.find(b"\0") >= 0:
                    continue
                separator = b"\n" if self.joined and used else b""
                size = min(len(content), self._max_bytes - used - len(separator))
                if size or self.joined:
                    yield _chunks(content, size, separator)
                    used += size + len(separator)


@contextlib.contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap | bytes]:
    """The content of a file, read as it is looked at."""
    with open(file, "rb") as opened:
        try:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # empty
            yield b""
            return
        with content:
            yield content


def _chunks(content: mmap.mmap | bytes, size: int, separator: bytes) -> Iterator[bytes]:
    """``separator`` and the first ``size`` bytes, cut after newlines or, in long lines, between characters: byte-pair
    encoding does not merge across the cuts."""
    if separator:
        yield separator
    start = 0
    while start < size:
        end = min(start + _CHUNK, size)
        if end < size:
            if (newline := content.rfind(b"\n", start, end)) >= 0:
                end = newline + 1
            else:
                end = next((e for e in range(end, end - 4, -1) if content[e] & 0xC0 != 0x80), end)
        yield content[start:end]
        start = end


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


def split(
    data: Tensor, validation_fraction: float, window: int, test_fraction: float | None = None
) -> tuple[Tensor, ...]:
    """``(training, validation)`` or, with a ``test_fraction``, ``(training, validation, test)``: contiguous, disjoint
    and in this order. A fraction of 0 makes an empty test part.

    Raises:
        DataError: a part is shorter than one ``window``.
    """
    test_tokens = round(len(data) * (test_fraction or 0.0))
    validation_tokens = round(len(data) * validation_fraction)
    training, validation, test = data.split(
        [len(data) - validation_tokens - test_tokens, validation_tokens, test_tokens]
    )
    parts = {"training": training, "validation": validation} | ({"test": test} if test_fraction else {})
    for name, part in parts.items():
        if len(part) < window:
            raise DataError(f"the {name} part has {len(part)} tokens, fewer than one window of {window}; "
                            f"give more text or a shorter sequence")
    return (training, validation) if test_fraction is None else (training, validation, test)


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


def all_batches(data: Tensor, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``(tokens, targets)`` of windows that follow each other: every token but the first is a target once, but those
    of an incomplete window at the end."""
    for chunk in torch.arange(0, len(data) - seq_len, seq_len).split(batch_size):
        yield _windows(data, chunk, seq_len)


def within_documents(tokens: Tensor, targets: Tensor, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Keeps the documents of windows apart.

    Args:
        tokens: ``[B, T]`` int64.
        targets: ``[B, T]`` int64, the next tokens.
        tokenizer: that of the tokens, with special ones.

    Returns:
        ``first_key`` ``[B, T]`` int64, where the document of each token begins, 0 for one that begins before the
        window; and the targets, `IGNORED` where the next token begins another document.

    Raises:
        TokenizerError: no token begins a document.
    """
    bos = tokenizer.bos
    if bos is None:
        raise TokenizerError("documents can be kept apart only with special tokens, which this tokenizer does not have")
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    first_key = torch.where(tokens == bos, positions, 0).cummax(1).values
    return first_key, targets.masked_fill(targets == bos, IGNORED)
