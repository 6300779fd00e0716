"""CONTRIBUTING.md's steps to add a stream, taken on a copy of the repository."""

import os
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from documents import ROOT, Block, blocks

from torus_kernels import building

HEADING = "How to add a stream"
STREAM = "spiral_steep"
# The library of this copy is for one instruction set: compiling for all of them takes several times as long.
PORTABLE = "import platform\n\nplatform.machine = lambda: 'portable'\n"


def steps(language: str) -> list[Block]:
    return [block for block in blocks(ROOT / "CONTRIBUTING.md")
            if block.heading == HEADING and block.language == language]


def has_compiler() -> bool:
    try:
        return bool(building.find_compiler())
    except building.BuildError:
        return False


def copy_repository(copy: Path) -> None:
    for folder in ("torus_kernels", "csrc", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pytest.ini", copy)
    (copy / "portable.py").write_text(PORTABLE)


def run(command: list[str], copy: Path, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": str(copy), "PYTEST_ADDOPTS": "-p portable -p no:cacheprovider",
        "TORUS_CACHE_DIR": str(copy / "cache"),
    }
    for name in ("TORUS_BACKEND", "TORUS_SKIP_BUILD", "TORUS_CPU_ISA", "TRITON_INTERPRET"):
        environment.pop(name, None)
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, **options)


def passed(report: Path) -> set[str]:
    """Names of the tests that passed; raises where one failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert cases
    for case in cases:
        assert case.find("failure") is None and case.find("error") is None, case.get("name")
    return {case.get("name") for case in cases if case.find("skipped") is None}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git to apply patches")
def test_the_steps_add_a_stream(tmp_path):
    copy_repository(tmp_path)
    changes, commands = steps("diff"), [line for block in steps("sh") for line in block.commands()]
    assert len(changes) == 4
    for change in changes:
        applied = run(["git", "apply", "-"], tmp_path, input=change.text)
        assert applied.returncode == 0, f"CONTRIBUTING.md, line {change.line}: {applied.stderr}"
    ran = set()
    for number, command in enumerate(commands):
        interpreter, *arguments = shlex.split(command)
        assert (interpreter, arguments[:2]) == (".venv/bin/python", ["-m", "pytest"])
        report = tmp_path / f"{number}.xml"
        done = run([sys.executable, *arguments, f"--junitxml={report}"], tmp_path)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        ran |= passed(report)
    assert {"test_agrees_with_the_enumeration", "test_every_query_sees_itself_at_no_distance"} <= ran
    for backend in ("reference", "cpu") if has_compiler() else ("reference",):
        for place in ("periodic", "causal", "cylinder"):
            for dtype in ("float64", "float32", "bfloat16"):
                assert f"test_a_stream_far_below_the_others[{backend}-{place}-{STREAM}-{dtype}]" in ran
        assert any(name.startswith(f"test_larger_lattices[{backend}-") for name in ran)

    asked = "from torus_kernels.backends import unavailable; print(unavailable('triton'))"
    assert "8 streams, and there are 9" in run([sys.executable, "-c", asked], tmp_path).stdout
