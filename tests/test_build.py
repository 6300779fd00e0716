"""The build driver on a tiny source tree, setup.py on the same, and the objects of the real extension."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import torus_kernels
from torus_kernels import building

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "cpu/bindings.cpp": """
        extern "C" __attribute__((visibility("default"))) int answer() { return 41 + 1; }
    """,
    "cpu/kernels.h": "inline constexpr int kValue = 1;\n",
    "cpu/kernels.cpp": """
        #include "kernels.h"
        #define CONCAT_(a, b) a##b
        #define CONCAT(a, b) CONCAT_(a, b)
        int CONCAT(kernel_, TORUS_ISA)() { return kValue; }
    """,
    "cpu/kernels_amx.cpp": """
        #include "kernels.h"
        int kernel_amx() { return kValue; }
    """,
}


def _has_compiler() -> bool:
    try:
        return bool(building.find_compiler())
    except building.BuildError:
        return False


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler")


class Checkout:
    """A checkout with three small sources, whose compiler keeps a record of what it was asked."""

    def __init__(self, root: Path):
        self.root = root / "check out $HOME"  # what a shell or ninja would trip over
        self.record = root / "record"
        self.cache = root / "cache"
        self.compiler = root / "recording-c++"
        self.compiler.write_text(f'#!/bin/sh\necho "$@" >> {self.record}\nexec {shutil.which("c++")} "$@"\n')
        self.compiler.chmod(0o755)
        for path, text in SOURCES.items():
            self.write(path, text)
        shutil.copytree(ROOT / "torus_kernels" / "building", self.root / "torus_kernels" / "building",
                        ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "torus_kernels" / "__init__.py").write_text('__version__ = "1.2.3"\n')
        shutil.copy(ROOT / "setup.py", self.root / "setup.py")

    def write(self, source: str, text: str) -> None:
        path = self.root / "csrc" / source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    @property
    def library(self) -> Path:
        return self.root / "torus_kernels" / building.CPU.file

    def driver(self) -> ModuleType:
        """A fresh copy of the package, as a new process would have."""
        for name in [name for name in sys.modules if name.partition(".")[0] == "fresh_building"]:
            del sys.modules[name]
        folder = self.root / "torus_kernels" / "building"
        spec = importlib.util.spec_from_file_location("fresh_building", folder / "__init__.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def process(self) -> subprocess.Popen:
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import building; "
                "print(building.ensure_library(building.CPU))")
        command = [sys.executable, "-c", code, str(self.root / "torus_kernels")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def setup(self, *arguments: str, torch: bool = True) -> subprocess.CompletedProcess:
        hide = "" if torch else "sys.modules['torch'] = None; "
        code = f"import runpy, sys; {hide}sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True)

    def compiled(self) -> list[str]:
        """The sources compiled since the last call."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        names = [Path(line.split(".cpp")[0]).name for line in lines if " -c " in line]
        return sorted(names)


def first_use(checkout: Checkout) -> Path:
    """What a new process gets that wants the library."""
    driver = checkout.driver()
    return driver.ensure_library(driver.CPU)


EVERYTHING = sorted(["stamp", *(Path(unit.source).stem for unit in building.CPU.units)])


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Checkout:
    checkout = Checkout(tmp_path)
    monkeypatch.setenv("CXX", str(checkout.compiler))
    monkeypatch.setenv("TORUS_CACHE_DIR", str(checkout.cache))
    for name in ("MAX_JOBS", "TORUS_SKIP_BUILD", "TORUS_CPU_CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return checkout


@needs_compiler
@pytest.mark.parametrize("ninja", [True, False])
def test_first_use_compiles_once_and_says_so(checkout, monkeypatch, capsys, ninja):
    driver = checkout.driver()
    if not ninja:
        monkeypatch.setattr(driver.compiling, "find_ninja", lambda: None)
    library = driver.ensure_library(driver.CPU)
    assert checkout.compiled() == EVERYTHING
    assert library.is_relative_to(checkout.cache)
    assert ctypes.CDLL(str(library)).answer() == 42
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "compiling the CPU kernels once" in notice and "done in" in notice

    assert driver.ensure_library(driver.CPU) == library
    assert first_use(checkout) == library
    assert checkout.compiled() == []
    assert capsys.readouterr().err == ""


@needs_compiler
@pytest.mark.parametrize("source", ["cpu/kernels.cpp", "cpu/kernels.h", "lattice.h"])
def test_changed_source_is_compiled_again(checkout, source):
    first = first_use(checkout)
    checkout.write(source, SOURCES.get(source, "") + "// changed\n")
    assert first_use(checkout) != first


@needs_compiler
def test_changed_compiler_is_another_library(checkout, monkeypatch):
    first = first_use(checkout)
    monkeypatch.setenv("CXX", f"{checkout.compiler} -DOTHER")
    assert first_use(checkout) != first


@needs_compiler
def test_ahead_of_time_library_is_used_while_it_matches(checkout, monkeypatch):
    checkout.setup("build_ext", "--inplace")
    assert checkout.compiled() == EVERYTHING
    with monkeypatch.context() as without_compiler:
        without_compiler.setenv("CXX", "/nonexistent")
        assert first_use(checkout) == checkout.library
    checkout.write("cpu/kernels.h", "inline constexpr int kValue = 2;\n")
    assert first_use(checkout).is_relative_to(checkout.cache)


@needs_compiler
@pytest.mark.skipif(building.find_ninja() is None, reason="no ninja")
def test_build_in_place_is_incremental(checkout):
    checkout.setup("build_ext", "--inplace")
    checkout.compiled()
    checkout.setup("build_ext", "--inplace")
    assert checkout.compiled() == []
    checkout.write("cpu/kernels.h", "inline constexpr int kValue = 2;\n")
    checkout.setup("build_ext", "--inplace")
    assert checkout.compiled() == [name for name in EVERYTHING if name != "bindings"]


@pytest.mark.parametrize("compiler", [None, "/nonexistent"])
def test_missing_compiler_is_named(checkout, monkeypatch, compiler):
    monkeypatch.setenv("PATH", str(checkout.root))
    if compiler:
        monkeypatch.setenv("CXX", compiler)
        expected = "no C++ compiler found: the variable CXX names '/nonexistent'"
    else:
        monkeypatch.delenv("CXX")
        expected = "no C++ compiler found: looked for c++, g++, clang++"
    driver = checkout.driver()
    with pytest.raises(driver.BuildError, match=re.escape(expected)):
        driver.ensure_library(driver.CPU)


@needs_compiler
@pytest.mark.parametrize("ninja", [True, False])
def test_compile_error_is_shown_and_not_tried_again(checkout, monkeypatch, ninja):
    checkout.write("cpu/bindings.cpp", 'int broken = "text";\n')
    driver = checkout.driver()
    if not ninja:
        monkeypatch.setattr(driver.compiling, "find_ninja", lambda: None)
    with pytest.raises(driver.BuildError) as first:
        driver.ensure_library(driver.CPU)
    message = str(first.value)
    assert str(checkout.compiler) in message and "-std=c++20" in message  # the command
    assert "bindings.cpp:1:" in message and "error:" in message  # the compiler's own words
    assert "bindings" in checkout.compiled()
    with pytest.raises(driver.BuildError) as second:
        driver.ensure_library(driver.CPU)
    assert str(second.value) == message
    assert checkout.compiled() == []
    assert not list(checkout.cache.glob(f"*/{driver.CPU.file}"))


@needs_compiler
def test_undefined_symbol_is_a_build_error(checkout):
    checkout.write("cpu/bindings.cpp", "int missing(); int call() { return missing(); }\n")
    driver = checkout.driver()
    with pytest.raises(driver.BuildError, match="undefined reference"):
        driver.ensure_library(driver.CPU)


@needs_compiler
def test_processes_take_turns(checkout):
    processes = [checkout.process() for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert len(set(outputs)) == 1 and outputs[0].strip().endswith(building.CPU.file)
    assert checkout.compiled() == EVERYTHING


@needs_compiler
def test_killed_builder_leaves_no_lock(checkout):
    compiler = checkout.compiler.read_text()
    checkout.compiler.write_text(compiler.replace("exec", 'case "$*" in *" -c "*) sleep 10; exit 1;; esac; exec'))
    builder = checkout.process()
    while not checkout.record.exists() or " -c " not in checkout.record.read_text():
        assert builder.poll() is None, builder.communicate()
        time.sleep(0.01)
    builder.kill()
    builder.communicate()
    checkout.compiler.write_text(compiler)
    assert first_use(checkout).is_file()


@needs_compiler
def test_skip_build_forbids_compiling_only(checkout, monkeypatch):
    monkeypatch.setenv("TORUS_SKIP_BUILD", "1")
    driver = checkout.driver()
    with pytest.raises(driver.BuildError, match="TORUS_SKIP_BUILD"):
        driver.ensure_library(driver.CPU)
    monkeypatch.setenv("TORUS_SKIP_BUILD", "0")
    library = first_use(checkout)
    monkeypatch.setenv("TORUS_SKIP_BUILD", "1")
    assert first_use(checkout) == library


@needs_compiler
def test_unwritable_cache_is_named(checkout, monkeypatch):
    (checkout.root / "file").touch()
    monkeypatch.setenv("TORUS_CACHE_DIR", str(checkout.root / "file"))
    driver = checkout.driver()
    with pytest.raises(driver.BuildError, match=r"cannot build in .*file"):
        driver.ensure_library(driver.CPU)


@needs_compiler
def test_extra_flags_come_last_and_are_part_of_the_key(checkout, monkeypatch):
    plain = first_use(checkout)
    checkout.record.unlink()
    monkeypatch.setenv("TORUS_CPU_CXXFLAGS", "-O1 -DEXTRA='two words'")
    assert first_use(checkout) != plain
    calls = [line for line in checkout.record.read_text().splitlines() if " -o " in line]
    assert len(calls) == len(EVERYTHING) + 1  # and the link
    for call in calls:
        if "stamp.cpp" not in call:
            assert call.find("-O1 -DEXTRA=two words") > call.find("-O3")
    monkeypatch.delenv("TORUS_CPU_CXXFLAGS")
    checkout.record.unlink()
    assert first_use(checkout) == plain
    assert not checkout.compiled()


def test_flags_that_cannot_be_split_are_refused(monkeypatch):
    monkeypatch.setenv("TORUS_CPU_CXXFLAGS", "-DEXTRA='two words")
    with pytest.raises(building.BuildError, match=r"TORUS_CPU_CXXFLAGS must be flags as in a shell, .*quotation"):
        building.extra_flags(building.CPU)


def test_setup_needs_neither_torch_nor_compiler(checkout, monkeypatch):
    assert checkout.setup("--version", torch=False).stdout.strip() == "1.2.3"
    done = checkout.setup("build_ext", "--inplace", torch=False)
    assert "compiled on first use, because torch is not importable" in done.stderr
    monkeypatch.setenv("CXX", "/nonexistent")
    done = checkout.setup("build_ext", "--inplace")
    assert "compiled on first use, because no C++ compiler found" in done.stderr
    assert not checkout.library.exists()


@pytest.mark.parametrize("built", [pytest.param(True, marks=needs_compiler), False])
def test_wheel_has_the_sources_and_a_tag_that_fits(checkout, built):
    checkout.setup("bdist_wheel", torch=built)
    (wheel,) = (checkout.root / "dist").glob("*.whl")
    names = subprocess.check_output([sys.executable, "-m", "zipfile", "-l", wheel], text=True)
    assert all(f"torus_kernels/csrc/{source} " in names for source in SOURCES)
    assert (f"torus_kernels/{building.CPU.file} " in names) == built
    assert "-py3-none-" in wheel.name and wheel.name.endswith("-any.whl") == (not built)


def test_setup_version_is_the_package_version():
    command = [sys.executable, "setup.py", "--version"]
    assert subprocess.check_output(command, cwd=ROOT, text=True).strip() == torus_kernels.__version__


def isa_leaks(objects: Path, units: tuple[building.Unit, ...]) -> list[str]:
    """Code in the objects for newer instruction sets that an older machine could come to run.

    The linker keeps one of several weak definitions of a function (inline functions, template instances): the one
    kept may be the AVX-512 one. So a weak function there must have the instruction set's namespace in its name, and
    nothing there may run while the library loads.
    """
    leaks = []
    for unit in units:
        if unit.isa in (None, "baseline"):
            continue
        output = subprocess.check_output(["nm", str(objects / f"{unit.name}.o")], text=True)
        for line in output.splitlines():
            kind, symbol = line.split()[-2:]
            in_own_namespace = f"{len(unit.isa)}{unit.isa}" in symbol  # as mangled: 4avx2
            if (kind == "W" and not in_own_namespace) or symbol.startswith("_GLOBAL__sub_I_"):
                leaks.append(f"{unit.name}: {symbol}")
    return leaks


needs_nm = pytest.mark.skipif(
    shutil.which("nm") is None or not sys.platform.startswith("linux"), reason="no nm for ELF objects"
)
HOT_LOOPS = {  # what a source compiled per instruction set may hold, and whether that leaks
    "inline function": (
        "inline NOINLINE int f(int x) { return x * x; }  namespace torus::TORUS_ISA { int g(int x) { return f(x); } }",
        True,
    ),
    "template": (
        "template <class T> NOINLINE T f(T x) { return x; }  namespace torus::TORUS_ISA { int g() { return f(1); } }",
        True,
    ),
    "initialiser": ("namespace torus::TORUS_ISA { volatile int one = 1; int two = one + 1; }", True),
    "own namespace": (
        "namespace torus::TORUS_ISA { inline NOINLINE int f(int x) { return x * x; } int g(int x) { return f(x); } }",
        False,
    ),
}


@needs_compiler
@needs_nm
@pytest.mark.skipif(len(building.CPU.units) < 4, reason="one instruction set only")
@pytest.mark.parametrize("name", HOT_LOOPS)
def test_leak_check_tells_leaks(checkout, name):
    code, leaks = HOT_LOOPS[name]
    checkout.write("cpu/kernels.cpp", f"#define NOINLINE __attribute__((noinline))\n{code}\n")
    driver = checkout.driver()
    found = isa_leaks(driver.build_dir_of(driver.ensure_library(driver.CPU)), driver.CPU.units)
    assert len(found) == (2 if leaks else 0), found  # one for avx2, one for avx512


@needs_compiler
def test_the_real_extension_builds():
    assert building.ensure_library(building.CPU).is_file()


@needs_compiler
@needs_nm
def test_newer_instruction_sets_stay_in_their_objects():
    objects = building.build_dir_of(building.ensure_library(building.CPU))
    if not (objects / "kernels_baseline.o").is_file():
        pytest.skip("the library came without its objects")
    assert isa_leaks(objects, building.CPU.units) == []
