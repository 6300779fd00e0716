"""The corpus, its split and its windows."""

import sysconfig
from pathlib import Path

import pytest
import torch

from torus_model.data import DataError, fixed_batches, load_corpus, random_batch, split


def as_bytes(data):
    return bytes(data.numpy())


def test_default_text_is_the_standard_library():
    stdlib = Path(sysconfig.get_path("stdlib"))
    corpus = load_corpus(max_bytes=2**20)
    first = sorted(path.name for path in stdlib.glob("*.py") if not path.name.startswith("."))[0]
    assert as_bytes(corpus.data).startswith((stdlib / first).read_bytes())
    assert len(corpus.data) == 2**20
    assert str(stdlib) in corpus.source


def test_tests_and_installed_packages_are_not_read(tmp_path, monkeypatch):
    for folder in ("", "email", "test", "json/tests", "site-packages/other", "encodings", "__pycache__", ".git"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "a.py").write_text(f"in {folder}.")
    (tmp_path / "README.txt").write_text("not source")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    assert as_bytes(load_corpus().data) == b"in .\nin email."


def test_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/z.txt", "b/a.md", "c.txt", "a.rst"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("hidden")
    corpus = load_corpus(tmp_path)
    assert as_bytes(corpus.data) == b"a.rst\nc.txt\nb/a.md\nb/z.txt"
    assert corpus.files == 4


def test_one_file_is_read_as_it_is(tmp_path):
    content = bytes(range(256))
    (tmp_path / "data.bin").write_bytes(content)
    corpus = load_corpus(tmp_path / "data.bin")
    assert as_bytes(corpus.data) == content
    assert corpus.data.dtype == torch.uint8


def test_text_is_cut_at_max_bytes(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name * 10)
    corpus = load_corpus(tmp_path, max_bytes=15)
    assert as_bytes(corpus.data) == b"aaaaaaaaaa\nbbbb"
    assert corpus.files == 2


def test_fingerprint_tells_texts_apart(tmp_path):
    (tmp_path / "a").write_text("some text")
    before = load_corpus(tmp_path).fingerprint
    assert load_corpus(tmp_path).fingerprint == before
    (tmp_path / "a").write_text("some tezt")
    assert load_corpus(tmp_path).fingerprint != before


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no text"):
        load_corpus(tmp_path)


def test_split_is_contiguous_and_disjoint():
    data = torch.arange(250, dtype=torch.uint8)
    training, validation = split(data, 0.2, window=10)
    assert len(validation) == 50
    assert torch.equal(torch.cat((training, validation)), data)


@pytest.mark.parametrize(("fraction", "part"), [(0.001, "validation"), (0.999, "training")])
def test_part_shorter_than_a_window_is_an_error(fraction, part):
    with pytest.raises(DataError, match=f"the {part} part"):
        split(torch.zeros(100, dtype=torch.uint8), fraction, window=10)


def test_random_batches_stay_within_their_part_and_reach_both_ends():
    training, _ = split(torch.arange(40, dtype=torch.uint8), 0.25, window=8)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = random_batch(training, 500, 7, generator)
    assert tokens.shape == targets.shape == (500, 7)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens + 1, targets)
    assert tokens.min() == 0
    assert targets.max() == len(training) - 1


def test_random_batches_follow_their_generator():
    data = torch.arange(200, dtype=torch.uint8)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([random_batch(data, 4, 8, generator)[0] for _ in range(2)])

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert not torch.equal(*draw(0))


def test_fixed_batches_spread_over_the_data():
    data = torch.arange(100, dtype=torch.uint8)
    batches = list(fixed_batches(data, windows=5, batch_size=2, seq_len=9))
    assert [len(tokens) for tokens, _ in batches] == [2, 2, 1]
    tokens, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(tokens + 1, targets)
    assert tokens[0, 0] == 0
    assert targets[-1, -1] == 99
