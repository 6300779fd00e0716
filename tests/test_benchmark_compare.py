"""Comparison with another git revision: both sides are checked, run what they claim to, and are judged by the ratio."""

import io
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from benchmarking import TINY, make_report
from rich.console import Console

from benchmarks import __main__ as command_line
from benchmarks import compare
from benchmarks.accuracy import WrongResult
from benchmarks.candidates import FORWARD, OPERATOR
from benchmarks.compare import REVISION, ROOT, ComparisonError, Side, checked_out, commit_of
from benchmarks.report import Case, Measurement, Report
from benchmarks.tables import compare_grid
from benchmarks.timing import Timing

is_checkout = shutil.which("git") is not None and subprocess.run(
    ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True
).returncode == 0
needs_git = pytest.mark.skipif(not is_checkout, reason="needs a git checkout")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the library that a test may break."""
    for part in ("torus_kernels", "csrc"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tmp_path


@pytest.fixture
def side(tree, request):
    started = []

    def start(name="a copy"):
        started.append(Side(name, tree, "reference"))
        return started[-1]

    yield start
    for each in started:
        each.close()


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_side_runs_the_library_of_its_own_tree(tree, side):
    change(tree / "torus_kernels" / "__init__.py", "__version__", "raise RuntimeError('the copy is used')\n__version__")
    with pytest.raises(ComparisonError, match="a copy: RuntimeError: the copy is used"):
        side()


def test_a_side_that_finds_another_library_is_refused(tmp_path):
    with pytest.raises(ComparisonError, match=r"an empty tree was to run in .*, but Python finds torus_kernels at"):
        Side("an empty tree", tmp_path, "reference")


def test_a_side_reports_its_errors_in_one_line(side):
    running = side()
    with pytest.raises(ComparisonError, match=r"a copy: ValueError: n_major must be at least 2, got 1$"):
        running.ask("prepare", lattice={"n_major": 1, "n_minor": 2}, sizes={}, dtype="float32", direction=FORWARD)
    with pytest.raises(ComparisonError, match="has no attribute 'dance'"):
        running.ask("dance")
    running._process.kill()
    with pytest.raises(ComparisonError, match="a copy: its process ended with status -9"):
        running.ask("hello")


def measure(sides: dict[str, Side]) -> Report:
    report = make_report()
    report.measurements, report.accuracy, report.labels = [], [], {OPERATOR: "this tree", REVISION: "revision abc"}
    compare._measure(sides, report, TINY, torch.float32, FORWARD, 0.0, lambda text: None)
    return report


def test_both_sides_are_timed_in_the_same_rounds(side, monkeypatch):
    monkeypatch.setattr(compare, "_SLICE", 0.0)
    report = measure({OPERATOR: side("this tree"), REVISION: side("revision abc")})
    timings = report.timings(Case("tiny", "float32", FORWARD))
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {OPERATOR: 5, REVISION: 5}
    assert [entry.check.ok for entry in report.accuracy] == [True, True]


def test_a_wrong_side_is_not_timed(tree, side):
    change(tree / "torus_kernels" / "lattice.py", "return k <= length // 2", "return k < length // 2")
    with pytest.raises(WrongResult, match="a copy is wrong and is not timed"):
        measure({OPERATOR: side()})


def slower_report(ratio: float) -> Report:
    report = make_report()
    report.labels = {OPERATOR: "this tree", REVISION: "revision abc"}
    report.measurements = [
        Measurement(Case("field-4k", "float32", FORWARD), name, Timing(tuple(x * factor for x in (1.0, 2.0, 3.0)), 0.0))
        for name, factor in ((OPERATOR, ratio), (REVISION, 1.0))
    ]
    return report


def test_a_ratio_above_the_limit_fails():
    assert compare_grid(slower_report(1.25), REVISION).rows[0][-1] == "1.25 (1.25 - 1.25)"
    compare._fail_if_slower(slower_report(1.25), 1.25)
    with pytest.raises(ComparisonError, match=r"slower than 1.2 times revision abc: field-4k float32 forward 1.250"):
        compare._fail_if_slower(slower_report(1.25), 1.2)


@needs_git
def test_a_revision_is_taken_out_of_git_and_the_checkout_left_alone():
    def state():
        return subprocess.run(["git", "-C", ROOT, "worktree", "list"], capture_output=True, check=True).stdout

    before, commit = state(), commit_of("HEAD")
    with checked_out(commit) as directory:
        assert (directory / "torus_kernels" / "lattice.py").is_file() and (directory / "csrc").is_dir()
        assert sorted(path.name for path in directory.iterdir()) == ["csrc", "torus_kernels"]
        assert state() == before
    assert not directory.exists()


@needs_git
@pytest.mark.parametrize("revision", ["no-such-revision", "--help", ""])
def test_an_unknown_revision_is_refused_in_one_line(revision, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(["compare", *(["--"] if revision.startswith("-") else []), revision])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert f"git knows no revision {revision!r}" in error and len(error.splitlines()) == 1


def test_outside_of_a_checkout_git_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ComparisonError, match=r"not a git repository|git cannot be run"):
        commit_of("HEAD")


@needs_git
@pytest.mark.slow
def test_the_whole_command_on_the_last_commit(tmp_path):
    shown = io.StringIO()
    compare.run("HEAD", [TINY], [torch.float32], [FORWARD], seconds=0.0, fail_above=100.0,
                output=tmp_path / "compare.json", console=Console(file=shown, width=120), backend="reference")
    assert "this tree and revision" in shown.getvalue()
    assert Report.load(tmp_path / "compare.json").kind == "compare"
