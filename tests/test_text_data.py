"""Tokenised corpora: documents, the memory-mapped cache, the three parts and packing."""

import numpy as np
import pytest
import torch

from torus_kernels import available_backends
from torus_model import ModelConfig, TorusLM
from torus_model.data import IGNORED, DataError, all_batches, cache_dir, load_corpus, split, within_documents
from torus_model.evaluation import Score, score
from torus_model.tokenizer import BPETokenizer, ByteTokenizer, TokenizerError

DOCUMENTS = {"a": "first", "b": "", "c": "third\n", "d": "é"}
BYTES = ByteTokenizer(special_tokens=True)
MODEL = ModelConfig(vocab_size=260, width=32, layers=3, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORUS_TEXT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for name, text in DOCUMENTS.items():
        (tmp_path / "text" / name).write_text(text)
    return tmp_path / "text"


def test_documents_stand_between_bos_and_eos(folder):
    corpus = load_corpus(folder, tokenizer=BYTES)
    expected = []
    for text in ("first", "third\n", "é"):
        expected += [BYTES.bos, *text.encode(), BYTES.eos]
    assert corpus.data.tolist() == expected
    assert (corpus.bytes, corpus.files, corpus.data.dtype) == (13, 3, torch.int16)


def test_byte_pairs_of_documents(folder):
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(["first third " * 9], 300)
    load_corpus(folder, tokenizer=BYTES)  # must not be taken for these tokens
    tokens = load_corpus(folder, tokenizer=tokenizer).data.tolist()
    assert b"".join(tokenizer.token_bytes[token] for token in tokens) == "firstthird\né".encode()
    assert tokens.count(tokenizer.bos) == tokens.count(tokenizer.eos) == 3
    assert len(tokens) < 13 + 6


def test_text_is_tokenised_once_and_again_where_text_or_tokenizer_differ(folder, monkeypatch):
    encoded = []
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: encoded.append(text) or encode(self, text))

    def load(tokenizer=BYTES):
        encoded.clear()
        return load_corpus(folder, tokenizer=tokenizer).data.tolist()

    first = load()
    assert encoded
    assert load() == first and not encoded
    load(ByteTokenizer())
    assert encoded
    (folder / "a").write_text("farst")
    assert load() != first and encoded
    assert len(list(cache_dir().iterdir())) == 3


def test_documents_are_part_of_the_fingerprint(folder):
    together = load_corpus(folder, tokenizer=BYTES)
    (folder / "a").write_text("firstth")
    (folder / "c").write_text("ird\n")
    apart = load_corpus(folder, tokenizer=BYTES)
    assert apart.bytes == together.bytes
    assert apart.fingerprint != together.fingerprint


def test_tokens_are_mapped_from_the_file_and_not_read(folder):
    corpus = load_corpus(folder, tokenizer=BYTES)
    [file] = cache_dir().iterdir()
    changed = np.memmap(file, np.int16, mode="r+")
    changed[1] = 7
    changed.flush()
    assert corpus.data[1] == 7, "the tokens are a copy in memory"
    corpus.data[1] = 8
    assert np.fromfile(file, np.int16)[1] == 7, "the tokens of a run can be written to by another"


def test_a_crash_while_tokenising_leaves_no_tokens(folder, monkeypatch):
    def broken(self, text):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(ByteTokenizer, "encode", broken)
        load_corpus(folder, tokenizer=BYTES)
    assert list(cache_dir().iterdir()) == []


def test_three_parts_are_contiguous_and_disjoint():
    data = torch.arange(200, dtype=torch.uint8)
    parts = split(data, 0.2, 10, 0.1)
    assert [len(part) for part in parts] == [140, 40, 20]
    assert torch.equal(torch.cat(parts), data)
    assert [len(part) for part in split(data, 0.2, 10, 0.0)] == [160, 40, 0]
    with pytest.raises(DataError, match="the test part"):
        split(data, 0.2, 10, 0.01)


def test_windows_that_follow_each_other_predict_every_token_once():
    batches = list(all_batches(torch.arange(41, dtype=torch.uint8), batch_size=3, seq_len=8))
    assert [len(tokens) for tokens, _ in batches] == [3, 2]
    assert torch.cat([targets for _, targets in batches]).flatten().tolist() == list(range(1, 41))


def test_packing_says_where_each_document_begins():
    bos = BYTES.bos
    tokens = torch.tensor([[5, 6, bos, 7, 8, bos, 9], [bos, 2, 3, 4, 5, 6, 7]])
    targets = torch.tensor([[6, bos, 7, 8, bos, 9, 3], [2, 3, 4, 5, 6, 7, bos]])
    first_key, kept = within_documents(tokens, targets, BYTES)
    assert first_key.tolist() == [[0, 0, 2, 2, 2, 5, 5], [0] * 7]
    assert kept.tolist() == [[6, IGNORED, 7, 8, IGNORED, 9, 3], [2, 3, 4, 5, 6, 7, IGNORED]]
    with pytest.raises(TokenizerError, match="special tokens"):
        within_documents(tokens, targets, ByteTokenizer())


def make_model(backend="reference"):
    torch.manual_seed(0)
    model = TorusLM(MODEL, backend=backend).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # so that tokens differ by more than rounding
    return model


def document(length, seed):
    body = torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed))
    return torch.cat((torch.tensor([BYTES.bos]), body, torch.tensor([BYTES.eos])))


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in available_backends()])
def test_logits_of_a_document_do_not_depend_on_its_neighbours(backend):
    model = make_model(backend)
    mine = document(30, seed=0)
    for before in (3, 17, 40):
        window = torch.cat((document(before, seed=1), mine, document(9, seed=2)))[None]
        place = slice(before + 2, before + 2 + len(mine))
        first_key, _ = within_documents(window, window, BYTES)
        with torch.no_grad():
            alone, packed, leaking = model(mine[None]), model(window, first_key=first_key), model(window)
        size = alone.abs().max().item()
        torch.testing.assert_close(packed[:, place], alone, rtol=0, atol=1e-11 * size)
        assert (leaking[:, place] - alone).abs().max() > 1e-3 * size, "the test would not see a leak"


def test_a_score_counts_bytes_and_not_tokens():
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(["to be or not to be " * 9], 300)
    tokens = torch.from_numpy(tokenizer.encode(b"to be or not to be to be")).long()[None]
    model = TorusLM(ModelConfig.from_dict(MODEL.to_dict() | {"vocab_size": tokenizer.vocab_size}), backend="reference")
    found = score(model, [(tokens[:, :-1], tokens[:, 1:])], tokenizer)
    with torch.no_grad():
        per_token = model.eval().loss(tokens[:, :-1], tokens[:, 1:]).item()
    predicted = tokens.shape[1] - 1
    first = len(tokenizer.token_bytes[tokens[0, 0]])
    assert (found.tokens, found.bytes) == (predicted, len(b"to be or not to be to be") - first)
    assert found.bytes > found.tokens
    assert found.bits_per_byte == pytest.approx(per_token / np.log(2) * found.tokens / found.bytes)
    assert found.perplexity == pytest.approx(np.exp(per_token))


def test_perplexity_beyond_floating_point_is_infinite():
    assert Score(709.0 * 8, 8, 8).perplexity == pytest.approx(np.exp(709.0))
    assert Score(710.0 * 8, 8, 8).perplexity == np.inf


def test_a_score_with_packing_adds_up_that_of_the_documents():
    model = make_model()
    documents = [document(length, seed=length) for length in (12, 25)]
    window = torch.cat(documents)[None]
    packed = score(model, [(window[:, :-1], window[:, 1:])], BYTES, pack_documents=True)
    alone = [score(model, [(d[None, :-1], d[None, 1:])], BYTES) for d in documents]
    assert packed.nats == pytest.approx(sum(s.nats for s in alone), rel=1e-10)
    assert (packed.tokens, packed.bytes) == (sum(s.tokens for s in alone), 12 + 25)
