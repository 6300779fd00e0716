"""How the CUDA library and its emulation are built, on a tiny source tree with a stand-in for nvcc."""

import ctypes
import re
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from test_build import Checkout, checkout, needs_compiler  # noqa: F401  (a fixture)

from torus_kernels import building

# Hands everything over to the C++ compiler but what only nvcc understands.
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "nvcc: a stand-in" && exit 0
echo "$@" >> {record}
shift; host=$1; shift
for argument do
    shift
    case $argument in
        -gencode=*) ;;
        -Xcompiler=* | -Xlinker=*) ;;
        *.cu) set -- "$@" -x c++ "$argument" ;;
        *) set -- "$@" "$argument" ;;
    esac
done
exec "$host" -fPIC "$@"
"""
KERNEL = """
#ifdef TORUS_CUDA_EMULATE
int {0}() {{ return 1; }}
#else
int {0}() {{ return 0; }}
#endif
"""
BINDINGS = 'int {0}(); extern "C" __attribute__((visibility("default"))) int emulated() {{ return {0}(); }}\n'


def members(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture
def toolkit(checkout, monkeypatch) -> Checkout:  # noqa: F811
    """The checkout with CUDA sources and a CUDA toolkit."""
    names = [unit.name for unit in building.cuda().units if unit.source.endswith(".cu")]
    for name in names:
        checkout.write(f"cuda/{name}.cu", KERNEL.format(f"kernel_{name}"))
    others = {unit.source for unit in (*building.cuda().units, *building.cuda_emulation().units)}
    for source in others - {f"cuda/{name}.cu" for name in names} - {"cuda/bindings.cpp"}:
        checkout.write(source, "")
    checkout.write("cuda/bindings.cpp", BINDINGS.format(f"kernel_{names[0]}"))
    nvcc = checkout.root / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(record=checkout.record))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    for name in ("TORUS_CUDA_ARCHS", "TORUS_CUDA_NVCCFLAGS", "TORUS_SKIP_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return checkout


def calls(checkout: Checkout) -> list[str]:  # noqa: F811
    """What the compilers were asked since the last call."""
    lines = checkout.record.read_text().splitlines() if checkout.record.exists() else []
    checkout.record.unlink(missing_ok=True)
    return [line for line in lines if " -o " in line]


@needs_compiler
def test_kernels_are_compiled_by_nvcc_for_the_default_gpus(toolkit, capsys):
    driver = toolkit.driver()
    library = driver.ensure_library(driver.cuda())
    assert library.name == "_cuda.so"
    assert ctypes.CDLL(str(library)).emulated() == 0
    assert "compiling the CUDA kernels once" in capsys.readouterr().err
    by_nvcc = [call for call in calls(toolkit) if call.startswith("-ccbin")]
    compiled = [call for call in by_nvcc if ".cu " in call]
    assert len(compiled) == sum(unit.source.endswith(".cu") for unit in driver.cuda().units)
    for call in compiled:
        assert re.findall(r"-gencode=(\S+)", call) == [
            "arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"]
    assert driver.ensure_library(driver.cuda()) == library
    assert calls(toolkit) == []


@needs_compiler
def test_emulation_is_the_same_sources_by_the_host_compiler(toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setenv("TORUS_SKIP_CUDA", "1")  # it is no CUDA
    driver = toolkit.driver()
    library = driver.ensure_library(driver.cuda_emulation())
    assert library.name == "_cuda_host.so"
    assert ctypes.CDLL(str(library)).emulated() == 1
    assert not any(call.startswith("-ccbin") for call in calls(toolkit))


@pytest.mark.parametrize("wanted, codes", [
    ("90a", ["arch=compute_90a,code=sm_90a"]),
    ("80, 86;120", ["arch=compute_80,code=sm_80", "arch=compute_86,code=sm_86", "arch=compute_120,code=sm_120",
                    "arch=compute_120,code=compute_120"]),
])
def test_architectures_can_be_named(monkeypatch, wanted, codes):
    monkeypatch.setenv("TORUS_CUDA_ARCHS", wanted)
    flags = building.cuda().flags
    assert [flag.removeprefix("-gencode=") for flag in flags if flag.startswith("-gencode")] == codes


@pytest.mark.parametrize("wanted", ["8.0", "sm_80", "80 x", " , "])
def test_other_architectures_are_refused(monkeypatch, wanted):
    monkeypatch.setenv("TORUS_CUDA_ARCHS", wanted)
    with pytest.raises(building.BuildError, match="TORUS_CUDA_ARCHS must be architectures as in '80 90a'"):
        building.cuda()


def test_missing_nvcc_is_named(toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    driver = toolkit.driver()
    with pytest.raises(driver.BuildError, match=r"no CUDA compiler found: looked for nvcc in /nonexistent/bin"):
        driver.ensure_library(driver.cuda())


@needs_compiler
@pytest.mark.parametrize("variable", ["TORUS_SKIP_CUDA", "TORUS_SKIP_BUILD"])
def test_variables_forbid_compiling_only(toolkit, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    driver = toolkit.driver()
    with pytest.raises(driver.BuildError, match=f"the variable {variable} forbids it"):
        driver.ensure_library(driver.cuda())
    monkeypatch.delenv(variable)
    driver = toolkit.driver()
    library = driver.ensure_library(driver.cuda())
    monkeypatch.setenv(variable, "1")
    assert toolkit.driver().ensure_library(driver.cuda()) == library


without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="with this torch CUDA needs no asking for")


@needs_compiler
class TestInstallation:
    @without_cuda
    def test_without_cuda_in_torch_nothing_is_compiled_by_nvcc(self, toolkit):
        done = toolkit.setup("build_ext", "--inplace")
        assert "_cuda.so will be compiled on first use, because the torch package has no CUDA" in done.stderr
        assert not any(call.startswith("-ccbin") for call in calls(toolkit))
        assert toolkit.library.is_file()

    def test_named_architectures_ask_for_it(self, toolkit, monkeypatch):
        monkeypatch.setenv("TORUS_CUDA_ARCHS", "90a")
        toolkit.setup("bdist_wheel")
        (wheel,) = (toolkit.root / "dist").glob("*.whl")
        names = members(wheel)
        assert {"torus_kernels/_cpu.so", "torus_kernels/_cuda.so", "torus_kernels/csrc/cuda/bindings.cpp",
                *(f"torus_kernels/csrc/{unit.source}" for unit in building.cuda().units)} <= names
        toolkit.setup("build_ext", "--inplace")
        driver = toolkit.driver()
        assert driver.ensure_library(driver.cuda()) == toolkit.root / "torus_kernels" / "_cuda.so"

    @pytest.mark.parametrize("trouble", ["source", "no nvcc", "TORUS_SKIP_CUDA", "TORUS_CUDA_ARCHS"])
    def test_it_never_fails_for_cuda(self, toolkit, monkeypatch, trouble):
        monkeypatch.setenv("TORUS_CUDA_ARCHS", "80" if trouble != "TORUS_CUDA_ARCHS" else "eighty")
        if trouble == "source":
            toolkit.write("cuda/bindings.cpp", 'int broken = "text";\n')
        elif trouble == "no nvcc":
            monkeypatch.setenv("CUDA_HOME", "/nonexistent")
        elif trouble == "TORUS_SKIP_CUDA":
            monkeypatch.setenv(trouble, "1")
        done = toolkit.setup("build_ext", "--inplace")
        reason = {"source": "compiling .* failed", "no nvcc": "no CUDA compiler found"}.get(trouble, trouble)
        assert re.search(f"_cuda.so will be compiled on first use, because .*{reason}", done.stderr)
        assert toolkit.library.is_file()
        assert not (toolkit.root / "torus_kernels" / "_cuda.so").exists()

    @without_cuda
    def test_a_wheel_has_no_library_of_an_earlier_build(self, toolkit, monkeypatch):
        monkeypatch.setenv("TORUS_CUDA_ARCHS", "80")
        toolkit.setup("bdist_wheel")
        monkeypatch.delenv("TORUS_CUDA_ARCHS")
        toolkit.setup("bdist_wheel")
        (wheel,) = (toolkit.root / "dist").glob("*.whl")
        assert "torus_kernels/_cuda.so" not in members(wheel)
