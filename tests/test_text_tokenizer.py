"""Tokenizers: bytes, and byte-pair encoding."""

import json
import sys

import numpy as np
import pytest

from torus_model.data import Text
from torus_model.tokenizer import (
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)

SENTENCE = "the torus closes in both directions, the lattice too; "
HARD = "  Zürich \u2603 \U0001f40d\r\n\n\ttabs,  spaces   and \x00\x7f <|bos|><|eos|> end\n"


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return BPETokenizer.train([SENTENCE * 20, HARD], vocab_size=320)


def text_of(tokenizer, tokens):
    return b"".join(tokenizer.token_bytes[token] for token in tokens)


@pytest.mark.parametrize("special_tokens", [False, True])
def test_every_byte_is_its_own_token(special_tokens):
    tokenizer = ByteTokenizer(special_tokens)
    text = bytes(range(256))
    assert tokenizer.encode(text).tolist() == list(range(256))
    assert text_of(tokenizer, tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == (260 if special_tokens else 256)
    assert (tokenizer.bos, tokenizer.eos) == ((256, 257) if special_tokens else (None, None))
    assert tokenizer.encode(text).dtype == (np.int16 if special_tokens else np.uint8)


def test_pairs_are_merged_and_lose_nothing(bpe):
    for text in (SENTENCE.encode(), HARD.encode(), bytes(range(128)), b""):
        tokens = bpe.encode(text)
        assert text_of(bpe, tokens) == text
        assert tokens.dtype == np.int16
    assert len(bpe.encode(SENTENCE.encode())) < len(SENTENCE) / 3
    assert 260 < bpe.vocab_size <= 320
    assert text_of(bpe, bpe.encode(b"a\xffb")) == "a\ufffdb".encode()


def test_lengths_of_the_tokens_add_up_to_the_bytes(bpe):
    text = HARD.encode()
    assert int(bpe.token_lengths[bpe.encode(text).tolist()].sum()) == len(text)
    assert all(int(bpe.token_lengths[token]) == 0 for token in bpe.special_tokens.values())


def test_text_that_spells_a_special_token_does_not_become_one(bpe):
    tokens = set(bpe.encode("".join(SPECIAL_TOKENS).encode()).tolist())
    assert not tokens & set(bpe.special_tokens.values())
    assert sorted(bpe.special_tokens) == sorted(SPECIAL_TOKENS)
    assert len({bpe.bos, bpe.eos, *bpe.special_tokens.values()}) == 4


def test_a_tokenizer_survives_its_file_and_its_metadata(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    tokens = bpe.encode(HARD.encode()).tolist()
    metadata = json.loads(json.dumps(bpe.to_dict()))
    for other in (load_tokenizer(tmp_path / "tokenizer.json"), Tokenizer.from_dict(metadata)):
        assert other.encode(HARD.encode()).tolist() == tokens
        assert other.fingerprint == bpe.fingerprint
    for special_tokens in (False, True):
        small = load_tokenizer(None, special_tokens=special_tokens)
        assert Tokenizer.from_dict(small.to_dict()).vocab_size == small.vocab_size
    fingerprints = {bpe.fingerprint, ByteTokenizer().fingerprint, ByteTokenizer(True).fingerprint}
    assert len(fingerprints) == 3


def test_a_wrong_file_is_a_clear_error(bpe, tmp_path):
    with pytest.raises(TokenizerError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "text.json").write_text("not a tokenizer")
    with pytest.raises(TokenizerError, match=r"text\.json"):
        load_tokenizer(tmp_path / "text.json")
    content = bpe.to_dict()["json"].replace(SPECIAL_TOKENS[0], "<other>")
    with pytest.raises(TokenizerError, match="bos"):
        BPETokenizer(content)
    with pytest.raises(TokenizerError, match="type"):
        Tokenizer.from_dict({"type": "abacus"})
    with pytest.raises(ValueError, match="vocab_size"):
        BPETokenizer.train([SENTENCE], vocab_size=259)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"torus-kernels\[text\]"):
        BPETokenizer.train([SENTENCE], vocab_size=300)
    assert load_tokenizer(None).vocab_size == 256


def test_chunks_are_cut_after_newlines_or_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr("torus_model.data._CHUNK", 10)
    content = "short\nlines\n" + "é" * 12 + "\nend"
    (tmp_path / "a").write_text(content)
    [chunks] = [list(document) for document in Text(tmp_path / "a", 1000, joined=True).documents()]
    assert b"".join(chunks) == content.encode()
    assert max(map(len, chunks)) <= 10 and len(chunks) > 3
    assert [chunk.decode() for chunk in chunks][:2] == ["short\n", "lines\n"]
