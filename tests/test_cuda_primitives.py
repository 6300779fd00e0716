"""Primitives and schedule of the CUDA kernels, as programs: on the CPU, and on a GPU where there is one."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from torus_kernels import building

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"


def run_program(command: list[str], source: str, directory: Path) -> str:
    """Compiles a program of tests/native and runs it: what it prints."""
    program = directory / "program"
    compiled = subprocess.run(
        [*command, "-std=c++20", "-O1", f"-I{CSRC}", str(TESTS / "native" / source), "-o", str(program)],
        capture_output=True, text=True,
    )
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout


@pytest.fixture
def cxx() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
    if not command[0]:
        pytest.skip("there is no C++ compiler")
    return [*command, "-Wall", "-Wextra", "-Werror"]


def test_schedule_meets_every_visible_pair_once(cxx, tmp_path):
    assert int(run_program(cxx, "cuda_schedule.cpp", tmp_path)) > 100_000


def test_primitives_on_the_cpu(cxx, tmp_path):
    shown = run_program([*cxx, "-x", "c++"], "cuda_primitives.cu", tmp_path)
    assert "FAILS" not in shown
    assert shown.count("a fault is reported") == 12


def test_a_launch_that_cuda_refuses_names_the_kernel_and_its_configuration(tmp_path):
    try:
        nvcc = building.find_nvcc()
    except building.BuildError as error:
        pytest.skip(str(error).splitlines()[0])
    shown = run_program([*nvcc.command, "-arch=sm_80"], "cuda_refusal.cu", tmp_path)
    what = "kernel idle (grid 3 x 2 x 1, 2 warps a block, 1048576 bytes of shared memory): "
    assert shown.startswith(what)
    assert len(shown.strip()) > len(what.strip())  # and why


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_primitives_on_a_gpu(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    shown = run_program([nvcc, "-arch=native"], "cuda_primitives.cu", tmp_path)
    assert shown.count("fragments of a tile") == 7
