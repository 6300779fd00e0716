"""The libraries as data: their sources, and how each is compiled."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from .toolchain import BuildError

PACKAGE = Path(__file__).resolve().parent.parent

_X86 = platform.machine().lower() in ("x86_64", "amd64")
# One binary for this torch and every newer one: major in the top byte, minor in the next.
_TORCH_TARGET = ("-DTORCH_TARGET_VERSION=0x020b000000000000",)
_HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
_CXX_FLAGS = (
    "-std=c++20",
    "-O3",
    *_HOST_FLAGS,
    f"-DTORUS_X86={int(_X86)}",
    # These two let loops vectorise and keep IEEE values; -ffast-math would lose NaN and infinity.
    "-fno-math-errno",
    "-fno-trapping-math",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_AMX = ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")
_SOURCE_SUFFIXES = (".cpp", ".h", ".cu")
_DEFAULT_ARCHS = "80 90a"
_CUDA_SOURCES = ("*.*", "cuda/**/*.*", "cpu/kernels.h")


class Unit(NamedTuple):
    """One object file of a library."""

    name: str
    source: str  # relative to csrc
    flags: tuple[str, ...]
    isa: str | None  # defined as TORUS_ISA where one source is compiled for several instruction sets
    needs_torch: bool = False


class Library(NamedTuple):
    """One shared library.

    Attributes:
        name: of its file, `file`, and of its folder where it is built ahead of time.
        contents: what it is called in messages.
        flags: of all units.
        units: in the order in which they are linked.
        sources: patterns of files below csrc that it is made from.
        uses_nvcc: whether nvcc compiles and links it, rather than the C++ compiler.
        flags_variable: the variable with flags that come after all others.
        forbidden_by: variables that forbid to compile it.
        bytes_per_job: memory that a compiler needs.
    """

    name: str
    contents: str
    flags: tuple[str, ...]
    units: tuple[Unit, ...]
    sources: tuple[str, ...]
    uses_nvcc: bool
    flags_variable: str
    forbidden_by: tuple[str, ...] = ("TORUS_SKIP_BUILD",)
    bytes_per_job: int = 1 << 30

    @property
    def file(self) -> str:
        return f"_{self.name}.so"


def _cpu_units() -> tuple[Unit, ...]:
    # Linked in this order, oldest instruction set first: of several weak definitions of a function the linker keeps
    # the first, so that no machine runs code newer than itself through a shared inline function.
    isas = {"baseline": (), "avx2": _AVX2, "avx512": _AVX2 + _AVX512} if _X86 else {"baseline": ()}
    kernels = [Unit(f"kernels_{isa}", "cpu/kernels.cpp", flags, isa) for isa, flags in isas.items()]
    if _X86:
        kernels.append(Unit("kernels_amx", "cpu/kernels_amx.cpp", _AVX2 + _AVX512 + _AMX, "amx"))
    bindings = Unit("bindings", "cpu/bindings.cpp", _TORCH_TARGET, isa=None, needs_torch=True)
    return (bindings, *kernels)


CPU = Library(
    "cpu", "CPU kernels", _CXX_FLAGS, _cpu_units(), ("lattice.h", "arguments.h", "cpu/**/*.*"),
    uses_nvcc=False, flags_variable="TORUS_CPU_CXXFLAGS",
)


def cuda_archs() -> tuple[str, ...]:
    """The GPU architectures of ``$TORUS_CUDA_ARCHS``, such as ``("80", "90a")``."""
    wanted = os.environ.get("TORUS_CUDA_ARCHS", "").replace(",", " ").replace(";", " ") or _DEFAULT_ARCHS
    archs = tuple(wanted.split())
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise BuildError(
            f"the variable TORUS_CUDA_ARCHS must be architectures as in {_DEFAULT_ARCHS!r}, got {wanted!r}")
    return archs


def cuda() -> Library:
    """The CUDA kernels for the GPUs of ``$TORUS_CUDA_ARCHS``, compiled by nvcc."""
    archs = cuda_archs()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # Of the newest architecture whose code every later GPU can take, in a form that the driver compiles for those.
    if portable := [int(arch) for arch in archs if arch.isdecimal()]:
        targets.append(f"-gencode=arch=compute_{max(portable)},code=compute_{max(portable)}")
    flags = ("-std=c++20", "-O3", f"-Xcompiler={','.join(_HOST_FLAGS)}", *targets)
    return Library(
        "cuda", "CUDA kernels", flags, _cuda_units(()), _CUDA_SOURCES, uses_nvcc=True,
        flags_variable="TORUS_CUDA_NVCCFLAGS", forbidden_by=("TORUS_SKIP_BUILD", "TORUS_SKIP_CUDA"),
        bytes_per_job=2 << 30,
    )


def cuda_emulation() -> Library:
    """The same kernels compiled by the C++ compiler, to run on the CPU."""
    flags = (*_CXX_FLAGS, "-DTORUS_CUDA_EMULATE=1")
    return Library(
        "cuda_host", "emulation of the CUDA kernels", flags, _cuda_units(("-x", "c++")), _CUDA_SOURCES, uses_nvcc=False,
        flags_variable="TORUS_CPU_CXXFLAGS",
    )


def _cuda_units(kernel_flags: tuple[str, ...]) -> tuple[Unit, ...]:
    bindings = Unit("bindings", "cuda/bindings.cpp", _TORCH_TARGET, isa=None, needs_torch=True)
    names = ("attention_forward", "attention_backward", "compounding", "decode")
    kernels = [Unit(name, f"cuda/{name}.cu", kernel_flags, isa=None) for name in names]
    return (bindings, *kernels)


def find_csrc() -> Path:
    """The C++ sources: inside the package where it was installed from a wheel, beside it in a checkout."""
    candidates = (PACKAGE / "csrc", PACKAGE.parent / "csrc")
    for candidate in candidates:
        if (candidate / "cpu" / "bindings.cpp").is_file():
            return candidate
    raise BuildError(f"the C++ sources are missing: looked in {' and '.join(map(str, candidates))}")


def extra_flags(library: Library) -> tuple[str, ...]:
    """What the library's variable adds to every call of the compiler."""
    flags = os.environ.get(library.flags_variable, "")
    try:
        return tuple(shlex.split(flags))
    except ValueError as error:
        raise BuildError(f"{library.flags_variable} must be flags as in a shell, got {flags!r}: {error}") from error


def unit_flags(library: Library, unit: Unit, csrc: Path) -> list[str]:
    """What the compiler is told of one object, but for PyTorch's headers and `extra_flags`."""
    isa = [f"-DTORUS_ISA={unit.isa}"] if unit.isa else []
    return [*library.flags, *unit.flags, f"-I{csrc}", *isa]


def source_hash(library: Library, csrc: Path) -> str:
    """Identifies what the library is built from: the sources, the flags and the architecture."""
    built_as = (library.flags + extra_flags(library), library.units, sys.platform, platform.machine())
    digest = hashlib.sha256(repr(built_as).encode())
    files = {path for pattern in library.sources for path in csrc.glob(pattern)}
    for path in sorted(path for path in files if path.suffix in _SOURCE_SUFFIXES):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(csrc).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
