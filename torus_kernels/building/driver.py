"""When a library is built, and where: ahead of time, or on first use into a cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .compiling import compile_library, library_is_current
from .libraries import PACKAGE, Library, find_csrc, source_hash
from .toolchain import BuildError, Compiler, find_compiler, find_nvcc, find_torch

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


def _compiler_of(library: Library) -> Compiler:
    return find_nvcc() if library.uses_nvcc else find_compiler()


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def build_library(
    library: Library,
    output_dir: Path,
    torch_root: Path,
    *,
    build_dir: Path,
    csrc: Path | None = None,
    compiler: Compiler | None = None,
    notice: str | None = None,
    force: bool = False,
) -> Path:
    """Compiles a library into ``output_dir`` unless a current one is there, and returns its path.

    The library appears there in one step, complete. Objects, ``build.ninja`` and ``build.log`` stay in ``build_dir``,
    which makes the next build incremental. Processes that build in the same ``build_dir`` take turns.

    Args:
        torch_root: the torch package's directory, with its ``include`` and ``lib``.
        csrc: the sources (default: `find_csrc`).
        compiler: default: `find_compiler` or `find_nvcc`.
        notice: printed to stderr when something is compiled, followed by how long it took.
        force: link and install again even where the library is current.

    Raises:
        BuildError: there is no compiler, it fails, or a directory cannot be written.
    """
    csrc = csrc or find_csrc()
    output = output_dir / library.file
    digest = source_hash(library, csrc)
    try:
        build_dir.mkdir(parents=True, exist_ok=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        with _locked(build_dir / "lock"):
            if force or not library_is_current(output, digest):
                for variable in filter(_is_set, library.forbidden_by):
                    raise BuildError(
                        f"the library of the {library.contents} is not built, and the variable {variable} forbids it")
                compiler = compiler or _compiler_of(library)
                with _announced(notice):
                    linked = compile_library(library, build_dir, csrc, torch_root, compiler, digest)
                if source_hash(library, csrc) != digest:
                    raise BuildError(f"the sources in {csrc} changed while they were being compiled; build again")
                _install(linked, output)
    except OSError as error:
        raise BuildError(f"cannot build in {build_dir}: {error}") from error
    return output


def check_ahead_of_time(library: Library, torch_root: Path) -> None:
    """Raises `BuildError` where an installation should not compile the library: this torch could not use it, unless
    ``$TORUS_CUDA_ARCHS`` asks for it."""
    has_cuda = (torch_root / "lib" / "libtorch_cuda.so").is_file()
    if library.uses_nvcc and not has_cuda and not os.environ.get("TORUS_CUDA_ARCHS"):
        raise BuildError("the torch package has no CUDA, and the variable TORUS_CUDA_ARCHS is not set")


_thread_lock = threading.Lock()
_outcomes: dict[Library, Path | str] = {}


def ensure_library(library: Library) -> Path:
    """The library's path: the one built ahead of time where it matches the sources, otherwise one from the cache,
    compiled now if need be (a notice on stderr says so).

    The answer is kept for the life of the process, a failure too: later calls raise it again without compiling.

    Raises:
        BuildError: there is no library and none can be built; the message says why.
    """
    with _thread_lock:
        if library not in _outcomes:
            try:
                _outcomes[library] = _find_or_build(library)
            except (BuildError, OSError) as error:
                _outcomes[library] = str(error)
        outcome = _outcomes[library]
    if isinstance(outcome, str):
        raise BuildError(outcome)
    return outcome


def _find_or_build(library: Library) -> Path:
    prebuilt = PACKAGE / library.file
    try:
        csrc = find_csrc()
    except BuildError:
        if prebuilt.is_file():
            return prebuilt
        raise
    digest = source_hash(library, csrc)
    if library_is_current(prebuilt, digest):
        return prebuilt
    compiler = _compiler_of(library)
    key = hashlib.sha256(repr((digest, compiler)).encode()).hexdigest()[:20]
    directory = cache_dir() / key
    if library_is_current(directory / library.file, digest):
        return directory / library.file
    notice = f"torus_kernels: compiling the {library.contents} once, a minute or two (kept in {directory})"
    return build_library(
        library, directory, find_torch(), build_dir=directory / "build", csrc=csrc, compiler=compiler, notice=notice
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
    if library.parent == PACKAGE:
        return PACKAGE.parent / "build" / library.stem.removeprefix("_")
    return library.parent / "build"


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
