"""What a build needs of the machine: compilers, ninja, PyTorch's headers, cores and memory."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

_COMPILERS = ("c++", "g++", "clang++")
_CUDA_HOME = "/usr/local/cuda"
_CGROUP_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class BuildError(RuntimeError):
    """A library is not built; the message says why, with the failed command and the compiler's own words."""


class Compiler(NamedTuple):
    command: tuple[str, ...]
    identity: str  # what it says about itself: version and target


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
    identity = "\n".join(_output("C++ compiler", [*command, option]) for option in ("--version", "-dumpmachine"))
    return Compiler(command, identity)


def find_nvcc() -> Compiler:
    """The CUDA compiler: in ``$CUDA_HOME``, then on the PATH, then in /usr/local/cuda. Its host compiler is
    `find_compiler`'s."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [None, f"{_CUDA_HOME}/bin"]
    found = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if found is None:
        where = f"{home}/bin (CUDA_HOME is set)" if home else f"the PATH and {_CUDA_HOME}/bin (CUDA_HOME is not set)"
        raise BuildError(f"no CUDA compiler found: looked for nvcc in {where}")
    host = find_compiler()
    if len(host.command) > 1:
        raise BuildError(f"nvcc takes a host compiler without flags, and the variable CXX has some: "
                         f"{shlex.join(host.command)}")
    identity = f"{_output('CUDA compiler', [found, '--version'])}\n{host.identity}"
    return Compiler((found, "-ccbin", host.command[0]), identity)


def find_ninja() -> str | None:
    """The ninja of this Python environment, then one on the PATH. None where there is neither."""
    own = os.pathsep.join((sysconfig.get_path("scripts"), os.path.dirname(sys.executable)))
    return shutil.which("ninja", path=own) or shutil.which("ninja")


def max_jobs(bytes_per_job: int) -> int:
    """How many compilers to run at once: ``$MAX_JOBS``, or what the usable cores and the free memory allow."""
    if requested := os.environ.get("MAX_JOBS"):
        if not requested.isdecimal() or int(requested) < 1:
            raise BuildError(f"the variable MAX_JOBS must be a positive integer, got {requested!r}")
        return int(requested)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _available_memory()
    return max(1, cores if memory is None else min(cores, memory // bytes_per_job))


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


def _output(what: str, command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"the {what} cannot be run: {shlex.join(command)}: {error}") from error
    if done.returncode:
        raise BuildError(f"the {what} does not work: {shlex.join(command)}\n{done.stderr.strip()}")
    return done.stdout.strip()
