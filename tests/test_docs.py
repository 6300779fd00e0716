"""The documentation: its code blocks run, and its pages of results show what the reports hold."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from documents import ROOT, blocks

from benchmarks import __main__ as benchmarks_cli
from benchmarks.report import KINDS, Report
from benchmarks.tables import milliseconds
from torus_kernels.backends import unavailable

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
RUNNING = [page for page in PAGES if any(block.language in ("python", "sh") for block in blocks(page))]

RUN_ELSEWHERE = ("./run setup", "./run test", "./run demo", ".venv/bin/ruff check", ".venv/bin/mypy",
                 ".venv/bin/sphinx-build", ".venv/bin/python -m pytest")
"""Beginnings of commands that other tests, or continuous integration, run."""

TINY_MODEL = "--width 32 --layers 2 --heads 2 --n-major 8 --n-minor 8 "
TINY = {
    "train": TINY_MODEL + "--seq-len 64 --batch-size 2 --max-bytes 100000 --validations 1 --validation-windows 2",
    "tokenizer train": "--vocab-size 270",
    "evaluate": "--windows 2",
    "compress": "--windows 2",
    "generate": "--bytes 8",
    "field generate": "--trajectories 6 --resolution 16 --solve-resolution 16 --frames 5",
    "field train": "--epochs 1 --width 32 --layers 2 --heads 2 --history 2 --batch-size 4",
    "field evaluate": "",
    "field rollout": "",
}
"""Options that make a command of ``torus_model`` quick; of an option given twice the last one counts."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tiny(command: str) -> list[str]:
    """A command of ``torus_model`` with tiny settings, its seconds and steps cut to a hundredth."""
    interpreter, *arguments = shlex.split(command)
    assert (interpreter, arguments[:2]) == (".venv/bin/python", ["-m", "torus_model"]), f"no test runs {command!r}"
    subcommand = " ".join(arguments[2 : 4 if arguments[2] in ("field", "tokenizer") else 3])
    for flag in {"--seconds", "--steps"} & set(arguments):
        value = arguments.index(flag) + 1
        arguments[value] = str(max(1, int(arguments[value]) // 100))
    tiny = "" if "--resume" in arguments else TINY[subcommand]  # a run that resumes keeps its settings
    if "--from" in arguments:  # this one its model
        tiny = tiny.removeprefix(TINY_MODEL)
    return [sys.executable, *arguments, *shlex.split(tiny)]


def run_command(command: str, folder: Path) -> None:
    if command.startswith(RUN_ELSEWHERE):
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(tiny(command), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """Those of a page in order, as a reader goes through it: in one folder, and in one namespace."""
    if reason := unavailable("cpu"):
        pytest.skip(f"the examples are sized for the C++ kernels: {reason.splitlines()[0]}")
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            lines_above = "\n" * (block.line - 1)  # a traceback then names the line of the page
            exec(compile(lines_above + block.text, page, "exec"), namespace)
        elif block.language == "sh":
            for command in block.commands():
                run_command(command, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language(page):
    for block in blocks(page):
        directive = block.language.startswith("{")  # Sphinx's own
        assert directive or block.language in ("python", "sh", "text", "diff"), f"{name_of(page)}, line {block.line}"


def test_benchmarks_that_pages_name_exist():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:python -m |\| `)benchmarks ([a-z]+)", text))
    commands = next(action.choices for action in benchmarks_cli._parser()._actions if action.dest == "command")
    assert "cpu" in named
    assert named <= set(commands)


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """docs/results.py, which is no module of a package."""
    specification = importlib.util.spec_from_file_location("docs_results", DOCS / "results.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class TestResults:
    @pytest.mark.parametrize("kind", ["cpu", "growth", "threads", "decode"])
    def test_a_report_becomes_its_table_and_plots(self, results, kind):
        assert kind in KINDS
        name = results.newest(kind, results.FOLDER)
        shown = results.markdown(kind, "../benchmarks/results")
        assert results.markdown_of(results.FOLDER / f"{name}.json") in shown
        assert f"![{name}](../benchmarks/results/{name}.png)" in shown
        assert f"<../benchmarks/results/{name}.json>" in shown

    def test_figures_are_those_of_the_report(self, results):
        report = Report.load(results.FOLDER / f"{results.newest('cpu', results.FOLDER)}.json")
        shown = results.markdown("cpu", "..")
        for case in report.cases():
            median = milliseconds(report.timings(case)["torus_attention"].spread.median)
            assert f"| {case.workload} | {case.dtype} | {case.direction} | {median} ms |" in shown

    def test_the_newest_of_a_kind(self, results, tmp_path):
        for name in ("field-2026-01-02.json", "field-2026-02-01.json", "field-2026-02-01-seam.png",
                     "field-wide-2026-03-01.json", "notes.json"):
            (tmp_path / name).write_text("{}")
        assert results.newest("field", tmp_path) == "field-2026-02-01"
        shown = results.markdown("field", "up", tmp_path)
        assert "up/field-2026-02-01-seam.png" in shown
        assert "2026-01" not in shown and "wide" not in shown

    def test_plots_without_a_report(self, results, tmp_path):
        (tmp_path / "precision-2026-02-01.png").touch()
        assert results.markdown("precision", "up", tmp_path) == (
            "![precision-2026-02-01](up/precision-2026-02-01.png)")

    def test_nothing_recorded(self, results, tmp_path):
        page = "before\n\n<!-- results: gpu -->\n\nafter\n"
        filled = results.fill_in(page, "up", tmp_path)
        assert filled.startswith("before\n\n*No results") and filled.endswith("\n\nafter\n")

    def test_every_report_has_a_page(self, results):
        """Of the kinds that are recorded."""
        pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
        recorded = {results._DATED.match(path.stem)["kind"] for path in results.FOLDER.glob("*.json")}
        assert recorded <= set(results._MARKER.findall(pages))


def test_pictures_exist_under_the_names_that_the_script_writes(tmp_path):
    shutil.copy(DOCS / "streams.py", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, tmp_path / "streams.py"], env=environment, check=True)
    drawn = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")}
    assert drawn == {path.relative_to(DOCS) for path in DOCS.rglob("*.png")}
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"({path.as_posix()})" in pages for path in drawn)
    assert sum((DOCS / path).stat().st_size for path in drawn) < 1_500_000
