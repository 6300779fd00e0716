"""Every instruction set of the CPU kernels computes the same operator.

Parts of the suite run again, in a process of their own with TORUS_CPU_ISA set.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_backend

from torus_kernels import building
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


# Registers and instructions by which code shows what it needs: tiles; masks, 512 bits and registers from 16 on; VEX.
NEEDS = {
    "amx": re.compile(r"%tmm|\ttile|\t[sl]dtilecfg"),
    "avx512": re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(?:1[6-9]|2\d|3[01])\b"),
    "avx2": re.compile(r"%ymm|\tv\w+ "),
}


def needed_by_functions(disassembly: str) -> dict[str, str]:
    """The widest instruction set that each function has an instruction of; functions that run anywhere are left out."""
    needed: dict[str, str] = {}
    function = ""
    for line in disassembly.splitlines():
        if label := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = label[1]
        elif isa := next((isa for isa, pattern in NEEDS.items() if pattern.search(line)), None):
            needed[function] = max(isa, needed.get(function, isa), key=cpu.INSTRUCTION_SETS.index)
    return needed


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there are no such instruction sets")
def test_wide_instructions_stay_in_the_kernels_that_are_chosen_for_them():
    """A function that the linker keeps one copy of, or one that is asked before the choice is made, would be an illegal
    instruction on a lesser machine."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not there")
    library = building.ensure_library(building.CPU)
    listing = subprocess.run([objdump, "-d", "-C", "--no-show-raw-insn", str(library)], capture_output=True, text=True,
                             check=True)
    needed = needed_by_functions(listing.stdout)
    assert set(needed.values()) == set(NEEDS)
    for function, isa in needed.items():
        home = re.search(r"\btorus::(\w+)::|^torus::kernels_(\w+)\(\)$", function)
        limit = next(filter(None, home.groups()), "") if home else ""
        allowed = cpu.INSTRUCTION_SETS.index(limit) if limit in cpu.INSTRUCTION_SETS else 0
        assert cpu.INSTRUCTION_SETS.index(isa) <= allowed, f"{function} has instructions of {isa}"
