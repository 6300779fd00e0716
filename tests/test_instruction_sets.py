"""Every instruction set of the CPU kernels computes the same operator.

Parts of the suite run again, in a process of their own with TORUS_CPU_ISA set.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_backend

from torus_kernels.backends import cpu

TESTS = Path(__file__).parent
SELECTED = ("test_golden.py", "test_causal.py", "test_symmetries.py", "test_compounding.py", "test_decode.py")


@pytest.fixture(autouse=True)
def cpu_kernels():
    require_backend("cpu")


def in_subprocess(isa: str, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TORUS_CPU_ISA": isa, "PYTHONPATH": str(TESTS.parent)}
    return subprocess.run([sys.executable, *command], cwd=TESTS.parent, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", cpu.INSTRUCTION_SETS)
def test_same_operator(isa):
    best = cpu.instruction_set()
    if cpu.INSTRUCTION_SETS.index(isa) > cpu.INSTRUCTION_SETS.index(best):
        pytest.skip(f"this machine runs up to {best}")
    if isa == best:
        pytest.skip(f"{isa} is what the whole suite runs on here")
    files = [str(TESTS / name) for name in SELECTED]
    result = in_subprocess(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", *files)
    assert result.returncode == 0, result.stdout[-3000:]
    shown = in_subprocess(isa, "-c", "from torus_kernels.backends import cpu; cpu.unavailable(); "
                                     "print(cpu.instruction_set())")
    assert shown.stdout.split() == [isa]


def test_unknown_name_is_a_reason():
    result = in_subprocess("sse9", "-c", "import torus_kernels as t; print(t.backend_report()['cpu'])")
    assert result.returncode == 0, result.stderr
    assert "TORUS_CPU_ISA is 'sse9'" in result.stdout
