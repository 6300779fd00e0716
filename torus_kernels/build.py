"""Compiles the CPU backend's C++ into one shared library and finds the library again.

Both ways of building go through here: ahead of time, where setup.py loads this file by its path, and on first use
(`ensure_extension`). So this module needs the standard library only; it imports neither torch nor the package.

The library uses PyTorch's stable ABI (``torch/csrc/stable``) and no Python C-API: one binary serves every
torch >= 2.11 and every Python. Building it is plain: one compiler call per object, one link, run by ninja where there
is one. The library carries a hash of the sources and flags it came from, so that an outdated one is never loaded.

Environment variables:
    CXX: the compiler, flags allowed (default: the first of c++, g++ and clang++).
    MAX_JOBS: compilers at once (default: from the cores and the memory that is free).
    TORUS_CPU_CXXFLAGS: flags after all others, for every object and the link (sanitizers, another -O).
    TORUS_CACHE_DIR: where first use keeps what it builds (default: torus_kernels in ~/.cache).
    TORUS_SKIP_BUILD: when set, never compile; a library that is already built is still used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

PACKAGE = Path(__file__).resolve().parent
LIBRARY = "_cpu.so"

_X86 = platform.machine().lower() in ("x86_64", "amd64")
# One binary for this torch and every newer one: major in the top byte, minor in the next.
_TORCH_TARGET_VERSION = "0x020b000000000000"
_COMMON_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    f"-DTORUS_X86={int(_X86)}",
    # These two let loops vectorise and keep IEEE values; -ffast-math would lose NaN and infinity.
    "-fno-math-errno",
    "-fno-trapping-math",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_AMX = ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")
_SOURCE_SUFFIXES = (".cpp", ".h")
_COMPILERS = ("c++", "g++", "clang++")
_BYTES_PER_JOB = 1 << 30
_CGROUP_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_MAX_MESSAGE = 6000  # characters of a compiler's output that an error repeats; its log has the rest
_MARKER = "torus_kernels source hash "


class BuildError(RuntimeError):
    """The extension is not built; the message says why, with the failed command and the compiler's own words."""


class Unit(NamedTuple):
    """One object file of the library."""

    name: str
    source: str  # relative to csrc
    flags: tuple[str, ...]
    isa: str | None  # defined as TORUS_ISA where one source is compiled for several instruction sets
    needs_torch: bool = False


def _units() -> tuple[Unit, ...]:
    # Linked in this order, oldest instruction set first: of several weak definitions of a function the linker keeps
    # the first, so that no machine runs code newer than itself through a shared inline function.
    isas = {"baseline": (), "avx2": _AVX2, "avx512": _AVX2 + _AVX512} if _X86 else {"baseline": ()}
    kernels = [Unit(f"kernels_{isa}", "cpu/kernels.cpp", flags, isa) for isa, flags in isas.items()]
    if _X86:
        kernels.append(Unit("kernels_amx", "cpu/kernels_amx.cpp", _AVX2 + _AVX512 + _AMX, "amx"))
    target = (f"-DTORCH_TARGET_VERSION={_TORCH_TARGET_VERSION}",)
    bindings = Unit("bindings", "cpu/bindings.cpp", target, isa=None, needs_torch=True)
    return (bindings, *kernels)


UNITS = _units()


class Compiler(NamedTuple):
    command: tuple[str, ...]
    identity: str  # what it says about itself: version and target


def find_csrc() -> Path:
    """The C++ sources: inside the package where it was installed from a wheel, beside it in a checkout."""
    candidates = (PACKAGE / "csrc", PACKAGE.parent / "csrc")
    for candidate in candidates:
        if (candidate / "cpu" / "bindings.cpp").is_file():
            return candidate
    raise BuildError(f"the C++ sources are missing: looked in {' and '.join(map(str, candidates))}")


def find_torch() -> Path:
    """The directory of the installed torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    for location in (spec.submodule_search_locations if spec else None) or ():
        root = Path(location)
        if (root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return root
    if spec is None:
        raise BuildError("torch is not importable, and the extension needs its headers")
    raise BuildError(f"the torch package at {spec.origin} has no include/torch/csrc/stable (torch >= 2.11 is needed)")


def find_compiler() -> Compiler:
    """The C++ compiler: ``$CXX`` where it is set, otherwise the first of c++, g++ and clang++ on the PATH."""
    if requested := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(requested[0]) is None:
            raise BuildError(f"no C++ compiler found: the variable CXX names {requested[0]!r}, which cannot be run")
        command = tuple(requested)
    else:
        found = next(filter(None, map(shutil.which, _COMPILERS)), None)
        if found is None:
            raise BuildError(f"no C++ compiler found: looked for {', '.join(_COMPILERS)} on the PATH (CXX is not set)")
        command = (found,)
    identity = "\n".join(_output([*command, option]) for option in ("--version", "-dumpmachine"))
    return Compiler(command, identity)


def find_ninja() -> str | None:
    """The ninja of this Python environment, then one on the PATH. None where there is neither."""
    own = os.pathsep.join((sysconfig.get_path("scripts"), os.path.dirname(sys.executable)))
    return shutil.which("ninja", path=own) or shutil.which("ninja")


def max_jobs() -> int:
    """How many compilers to run at once: ``$MAX_JOBS``, or what the usable cores and the free memory (1 GiB each)
    allow."""
    if requested := os.environ.get("MAX_JOBS"):
        if not requested.isdecimal() or int(requested) < 1:
            raise BuildError(f"the variable MAX_JOBS must be a positive integer, got {requested!r}")
        return int(requested)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _available_memory()
    return max(1, cores if memory is None else min(cores, memory // _BYTES_PER_JOB))


def _available_memory() -> int | None:
    """Bytes that this machine and this process's container still have, or None where neither says."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, used in _CGROUP_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # no such control group, or the limit is the word "max"
            limits.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return min(limits, default=None)


def extra_flags() -> tuple[str, ...]:
    """What ``$TORUS_CPU_CXXFLAGS`` adds to every call of the compiler."""
    flags = os.environ.get("TORUS_CPU_CXXFLAGS", "")
    try:
        return tuple(shlex.split(flags))
    except ValueError as error:
        raise BuildError(f"TORUS_CPU_CXXFLAGS must be flags as in a shell, got {flags!r}: {error}") from error


def source_hash(csrc: Path) -> str:
    """Identifies what the library is built from: the sources, the flags and the architecture."""
    digest = hashlib.sha256(repr((_COMMON_FLAGS + extra_flags(), UNITS, sys.platform, platform.machine())).encode())
    files = [*csrc.glob("*.*"), *(csrc / "cpu").rglob("*.*")]
    for path in sorted(path for path in files if path.suffix in _SOURCE_SUFFIXES):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(csrc).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def library_is_current(library: Path, expected_hash: str) -> bool:
    """Whether the library exists and was built from the sources and flags with this hash."""
    try:
        return f"{_MARKER}{expected_hash}".encode() in library.read_bytes()
    except OSError:
        return False


def build_extension(
    output_dir: Path,
    torch_root: Path,
    *,
    build_dir: Path,
    csrc: Path | None = None,
    compiler: Compiler | None = None,
    notice: str | None = None,
    force: bool = False,
) -> Path:
    """Compiles the library into ``output_dir`` unless a current one is there, and returns its path.

    The library appears there in one step, complete. Objects, ``build.ninja`` and ``build.log`` stay in ``build_dir``,
    which makes the next build incremental. Processes that build in the same ``build_dir`` take turns.

    Args:
        torch_root: the torch package's directory, with its ``include`` and ``lib``.
        csrc: the sources (default: `find_csrc`).
        compiler: default: `find_compiler`.
        notice: printed to stderr when something is compiled, followed by how long it took.
        force: link and install again even where the library is current.

    Raises:
        BuildError: there is no compiler, it fails, or a directory cannot be written.
    """
    csrc = csrc or find_csrc()
    library = output_dir / LIBRARY
    digest = source_hash(csrc)
    try:
        build_dir.mkdir(parents=True, exist_ok=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        with _locked(build_dir / "lock"):
            if force or not library_is_current(library, digest):
                if os.environ.get("TORUS_SKIP_BUILD", "0") not in ("", "0"):
                    raise BuildError("the C++ extension is not built, and the variable TORUS_SKIP_BUILD forbids it")
                compiler = compiler or find_compiler()
                with _announced(notice):
                    linked = _compile(build_dir, csrc, torch_root, compiler, digest)
                if source_hash(csrc) != digest:
                    raise BuildError(f"the sources in {csrc} changed while they were being compiled; build again")
                _install(linked, library)
    except OSError as error:
        raise BuildError(f"cannot build in {build_dir}: {error}") from error
    return library


_thread_lock = threading.Lock()
_outcome: Path | str | None = None


def ensure_extension() -> Path:
    """The library's path: the one built ahead of time where it matches the sources, otherwise one from the cache,
    compiled now if need be (a notice on stderr says so).

    The answer is kept for the life of the process, a failure too: later calls raise it again without compiling.

    Raises:
        BuildError: there is no library and none can be built; the message says why.
    """
    global _outcome
    with _thread_lock:
        if _outcome is None:
            try:
                _outcome = _find_or_build()
            except (BuildError, OSError) as error:
                _outcome = str(error)
    if isinstance(_outcome, str):
        raise BuildError(_outcome)
    return _outcome


def _find_or_build() -> Path:
    prebuilt = PACKAGE / LIBRARY
    try:
        csrc = find_csrc()
    except BuildError:
        if prebuilt.is_file():
            return prebuilt
        raise
    digest = source_hash(csrc)
    if library_is_current(prebuilt, digest):
        return prebuilt
    compiler = find_compiler()
    key = hashlib.sha256(repr((digest, compiler)).encode()).hexdigest()[:20]
    directory = cache_dir() / key
    if library_is_current(directory / LIBRARY, digest):
        return directory / LIBRARY
    notice = f"torus_kernels: compiling the CPU kernels once, a minute or two (kept in {directory})"
    return build_extension(
        directory, find_torch(), build_dir=directory / "build", csrc=csrc, compiler=compiler, notice=notice
    )


def cache_dir() -> Path:
    """Where first use keeps the libraries it builds."""
    if chosen := os.environ.get("TORUS_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home directory
        base = tempfile.gettempdir()
    return Path(base) / "torus_kernels"


def build_dir_of(library: Path) -> Path:
    """Where building this library leaves its objects and its log."""
    return PACKAGE.parent / "build" / "cpu" if library.parent == PACKAGE else library.parent / "build"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock. The kernel releases it when the process ends, however it ends."""
    if fcntl is None:
        raise BuildError("building the C++ extension needs Linux or macOS")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"torus_kernels: waiting for another process that builds in {path.parent}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _announced(notice: str | None) -> Iterator[None]:
    if notice is None:
        yield
        return
    print(notice, end=" ... ", file=sys.stderr, flush=True)
    start, result = time.perf_counter(), "failed after"
    try:
        yield
        result = "done in"
    finally:
        print(f"{result} {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _install(linked: Path, library: Path) -> None:
    temporary = library.with_name(f"{library.name}.{os.getpid()}.tmp")
    try:
        shutil.copy2(linked, temporary)
        os.replace(temporary, library)  # a process that has the old library loaded keeps its old file
    finally:
        temporary.unlink(missing_ok=True)


class _Step(NamedTuple):
    """One call of the compiler."""

    command: list[str]
    inputs: list[Path]
    output: Path


def unit_flags(unit: Unit, csrc: Path) -> list[str]:
    """What the compiler is told of one object, but for PyTorch's headers and `extra_flags`."""
    isa = [f"-DTORUS_ISA={unit.isa}"] if unit.isa else []
    return [*_COMMON_FLAGS, *unit.flags, f"-I{csrc}", *isa]


def _compile(build_dir: Path, csrc: Path, torch_root: Path, compiler: Compiler, digest: str) -> Path:
    """Compiles and links inside ``build_dir``; returns the linked library."""
    stamp = build_dir / "stamp.cpp"
    _write_if_changed(stamp, f'[[gnu::used]] char torus_kernels_source[] = "{_MARKER}{digest}";\n')
    identity = build_dir / "compiler.txt"
    _write_if_changed(identity, compiler.identity)

    compiles = [_Step([*compiler.command, "-fPIC", "-c", str(stamp)], [stamp], build_dir / "stamp.o")]
    for unit in UNITS:
        source = csrc / unit.source
        torch_flags = ["-isystem", str(torch_root / "include")] if unit.needs_torch else []
        command = [*compiler.command, *unit_flags(unit, csrc), *torch_flags, *extra_flags(), "-c", str(source)]
        compiles.append(_Step(command, [source], build_dir / f"{unit.name}.o"))
    objects = [step.output for step in compiles]
    # torch is loaded before this library, so that its own libraries are found by name, without an rpath.
    if sys.platform == "darwin":
        torch_flags = ["-undefined", "dynamic_lookup"]
    else:
        torch_flags = [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--no-undefined"]
    command = [*compiler.command, "-shared", *map(str, objects), *torch_flags, *extra_flags()]
    link = _Step(command, objects, build_dir / LIBRARY)

    ninja = find_ninja()
    if ninja:
        _run_ninja(ninja, build_dir, compiles, link, identity)
    else:
        _run_directly(build_dir, compiles, link)
    return link.output


def _run_ninja(ninja: str, build_dir: Path, compiles: list[_Step], link: _Step, identity: Path) -> None:
    lines = ["ninja_required_version = 1.5"]
    for number, step in enumerate([*compiles, link]):
        inputs = " ".join(map(_ninja_path, step.inputs))
        command = [*step.command, "-o", str(step.output)]
        depfile = []
        if step is not link:
            headers = f"{step.output}.d"
            command += ["-MMD", "-MF", headers]
            depfile = [f"  depfile = {_ninja_escape(headers)}", "  deps = gcc"]
        lines += [f"rule step{number}", f"  command = {_ninja_escape(shlex.join(command))}", *depfile]
        lines.append(f"  description = {step.output.name}")
        lines.append(f"build {_ninja_path(step.output)}: step{number} {inputs} | {_ninja_path(identity)}")
    _write_if_changed(build_dir / "build.ninja", "\n".join(lines) + "\n")
    _run([ninja, "-C", str(build_dir), f"-j{max_jobs()}"], build_dir / "build.log")


def _run_directly(build_dir: Path, compiles: list[_Step], link: _Step) -> None:
    def run(step: _Step) -> None:
        _run([*step.command, "-o", str(step.output)], step.output.with_suffix(".log"))

    with concurrent.futures.ThreadPoolExecutor(max_jobs()) as pool:
        futures = [pool.submit(run, step) for step in compiles]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    run(link)


def _run(command: list[str], log: Path) -> None:
    """Runs a command, keeps its output in ``log`` and raises with it where the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    log.write_text(f"{shlex.join(command)}\n{done.stdout}")
    if done.returncode:
        message = done.stdout.strip()
        message = message[max(0, message.find("FAILED:")) :]  # without ninja's lines about what succeeded before
        if len(message) > _MAX_MESSAGE:
            message = f"{message[:_MAX_MESSAGE]}\n... (all of it in {log})"
        raise BuildError(f"compiling the C++ extension failed\ncommand: {shlex.join(command)}\n{message}")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"the C++ compiler cannot be run: {shlex.join(command)}: {error}") from error
    if done.returncode:
        raise BuildError(f"the C++ compiler does not work: {shlex.join(command)}\n{done.stderr.strip()}")
    return done.stdout.strip()


def _write_if_changed(path: Path, text: str) -> None:
    """Leaves an equal file alone: its time tells ninja what to build again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _ninja_escape(text: str) -> str:
    return text.replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return _ninja_escape(str(path)).replace(" ", "$ ").replace(":", "$:")
