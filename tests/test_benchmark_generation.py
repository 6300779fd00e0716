"""The time of generated tokens: what is timed, and its report."""

import pytest
import torch
from rich.console import Console

from benchmarks import __main__, generation
from benchmarks.generation import LENGTHS, Generation, GenerationReport
from benchmarks.report import ReportError
from benchmarks.show import markdown_of
from torus_model.lm import ModelConfig

TINY = ModelConfig(width=16, heads=2, layers=2, n_major=2, n_minor=4)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    path = tmp_path_factory.mktemp("generation") / "generation.json"
    generation.run(TINY, seconds=0.0, output=path, console=Console(quiet=True))
    return path


def test_report_comes_back_from_its_file(output, tmp_path):
    report = GenerationReport.load(output)
    report.save(tmp_path / "again.json")
    assert GenerationReport.load(tmp_path / "again.json") == report
    assert report.lengths("cached") == [round(length * 8) for length in LENGTHS]
    assert report.lengths("recomputed") == [2, 4, 8, 16, 32]
    assert output.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert "| 128 | 16 N |" in markdown_of(output)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "field", "format": 1}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"other\.json"):
        GenerationReport.load(path)


def test_texts_are_as_long_as_they_say(monkeypatch):
    """The cache holds all but the newest token, and the model reads one token at a time; else it reads the text."""
    made = Generation(TINY)
    read = []
    forward = made.model.forward

    def recorded(tokens, **options):
        read.append((tokens.shape[1], None if options.get("cache") is None else len(options["cache"])))
        return forward(tokens, **options)

    monkeypatch.setattr(made.model, "forward", recorded)
    cached, recomputed = made.written("cached", 20), made.written("recomputed", 20)
    read.clear()
    next(cached)
    next(recomputed)
    assert read == [(1, 19), (20, None)]


def test_both_ways_write_the_same_text(monkeypatch):
    """From the same prompt: what is compared is the time alone."""
    made = Generation(TINY)
    texts = [made.written(way, 2) for way in ("cached", "recomputed")]
    with torch.inference_mode():
        assert [next(texts[0]) for _ in range(20)] == [next(texts[1]) for _ in range(20)]


def test_command_refuses_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["generation", "--width", "20"])
    assert stopped.value.code == 1
    assert "width / heads" in capsys.readouterr().err
