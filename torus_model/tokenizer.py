"""From text to tokens and back: bytes, and byte-pair encoding through the package ``tokenizers``."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>")
"""Beginning and end of a document, padding, and what the vocabulary cannot express; text never becomes one of them."""

_BOS, _EOS = SPECIAL_TOKENS[:2]
_BYTES = 256


class TokenizerError(ValueError):
    """A tokenizer cannot be made, read or used; the message says why."""


class Tokenizer(ABC):
    """Text as bytes to tokens and back, without loss: the bytes of the tokens, one after the other, are the text.

    Attributes:
        token_bytes: the bytes of each token, by its number; none of a special one.
        special_tokens: numbers of the `SPECIAL_TOKENS` by name; empty where there are none.
    """

    token_bytes: tuple[bytes, ...]
    special_tokens: Mapping[str, int]

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self.token_bytes)

    @property
    def bos(self) -> int | None:
        """The token that begins a document, or None."""
        return self.special_tokens.get(_BOS)

    @property
    def eos(self) -> int | None:
        """The token that ends a document, or None."""
        return self.special_tokens.get(_EOS)

    @property
    def dtype(self) -> np.dtype:
        """The smallest one that PyTorch can index with and that holds every token."""
        return np.dtype(next(t for t in (np.uint8, np.int16, np.int32) if self.vocab_size - 1 <= np.iinfo(t).max))

    @functools.cached_property
    def token_lengths(self) -> Tensor:
        """Bytes of each token, ``[vocab_size]`` int64: what makes losses of different tokenizers comparable."""
        return torch.tensor([len(token) for token in self.token_bytes])

    @abstractmethod
    def encode(self, text: bytes) -> np.ndarray:
        """Tokens ``[T]`` of a piece of text, none of them special, in `dtype`."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold, for `from_dict`."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 that tells tokenizers apart."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of `to_dict`.

        Raises:
            KeyError, TokenizerError: it is not one.
        """
        if fields["type"] == ByteTokenizer.TYPE:
            return ByteTokenizer(fields["special_tokens"])
        if fields["type"] == BPETokenizer.TYPE:
            return BPETokenizer(fields["json"])
        raise TokenizerError(f"there is no tokenizer of type {fields['type']!r}")


class ByteTokenizer(Tokenizer):
    """Every byte is the token of its number.

    Args:
        special_tokens: whether the `SPECIAL_TOKENS` follow the 256 bytes.
    """

    TYPE = "bytes"

    def __init__(self, special_tokens: bool = False) -> None:
        names = SPECIAL_TOKENS if special_tokens else ()
        self.special_tokens = {name: _BYTES + i for i, name in enumerate(names)}
        self.token_bytes = (*(bytes([byte]) for byte in range(_BYTES)), *(b"" for _ in names))

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(self.dtype)

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.TYPE, "special_tokens": bool(self.special_tokens)}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding over bytes (GPT-2, Radford et al. 2019, section 2.2): every text has tokens.

    Text that is not UTF-8 gets the replacement character for its invalid bytes.

    Args:
        content: the tokenizer as JSON of the package ``tokenizers``.

    Raises:
        TokenizerError: the package is missing, or ``content`` is not what `train` writes.
    """

    TYPE = "bpe"
    SMALLEST = _BYTES + len(SPECIAL_TOKENS)

    def __init__(self, content: str) -> None:
        package = _import_tokenizers()
        try:
            self._tokenizer: tokenizers.Tokenizer = package.Tokenizer.from_str(content)
        except Exception as error:  # the package raises nothing narrower
            raise TokenizerError(f"not a tokenizer: {error}") from error
        # Otherwise a document that spells out a special token would contain it.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        if missing := [name for name in SPECIAL_TOKENS if name not in vocabulary]:
            raise TokenizerError(f"a tokenizer needs the special tokens {', '.join(SPECIAL_TOKENS)}, but this one has "
                                 f"no {', '.join(missing)}; python -m torus_model tokenizer train makes one that does")
        self.special_tokens = {name: vocabulary[name] for name in SPECIAL_TOKENS}
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[piece] for piece in pieces] != list(range(len(pieces))):
            raise TokenizerError("a tokenizer must number its tokens from 0 without gaps")
        byte_of = _byte_of_character()
        try:
            self.token_bytes = tuple(
                b"" if piece in self.special_tokens else bytes(byte_of[character] for character in piece)
                for piece in pieces
            )
        except KeyError as error:
            raise TokenizerError(f"a tokenizer must work on bytes, but this one has a token with {error}") from error

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learns the vocabulary from documents.

        Args:
            documents: text, in pieces of any length.
            vocab_size: how many tokens there may be, bytes and special ones included; text with few different words
                gives fewer.

        Raises:
            TokenizerError: the package is missing.
            ValueError: the vocabulary does not hold all bytes and special tokens.
        """
        if vocab_size < cls.SMALLEST:
            raise ValueError(f"vocab_size must be at least {cls.SMALLEST}, the bytes and the special tokens, "
                             f"got {vocab_size}")
        package = _import_tokenizers()
        tokenizer = package.Tokenizer(package.models.BPE(unk_token=SPECIAL_TOKENS[3]))
        tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
            initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(documents, trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: bytes) -> np.ndarray:
        encoding = self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.array(encoding.ids, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.TYPE, "json": self._tokenizer.to_str()}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON of the package ``tokenizers``."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")


def load_tokenizer(path: str | os.PathLike | None, *, special_tokens: bool = False) -> Tokenizer:
    """The tokenizer in a file, or None for that of bytes, with or without ``special_tokens``.

    Raises:
        TokenizerError: the file is not there, or not a tokenizer.
    """
    if path is None:
        return ByteTokenizer(special_tokens)
    try:
        return BPETokenizer(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TokenizerError) as error:
        raise TokenizerError(f"{path} cannot be used as a tokenizer: {error}") from error


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(
            "byte-pair encoding needs the package tokenizers: pip install 'torus-kernels[text]'"
        ) from error
    return tokenizers


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Inverse of the alphabet in which the byte-level pieces are spelled: printable Latin-1 for itself, the other bytes
    in order from U+0100 on (``bytes_to_unicode`` of GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
