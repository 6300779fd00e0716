"""Compiles and links one library in a folder: by ninja where there is one, otherwise by calling the compiler."""

from __future__ import annotations

import concurrent.futures
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .libraries import Library, extra_flags, unit_flags
from .toolchain import BuildError, Compiler, find_ninja, max_jobs

_MAX_MESSAGE = 6000  # characters of a compiler's output that an error repeats; its log has the rest
_MARKER = "torus_kernels source hash "


def library_is_current(library: Path, expected_hash: str) -> bool:
    """Whether the library exists and was built from the sources and flags with this hash."""
    try:
        return f"{_MARKER}{expected_hash}".encode() in library.read_bytes()
    except OSError:
        return False


class _Step(NamedTuple):
    """One call of the compiler."""

    command: list[str]
    inputs: list[Path]
    output: Path


def compile_library(
    library: Library, build_dir: Path, csrc: Path, torch_root: Path, compiler: Compiler, digest: str
) -> Path:
    """Compiles and links inside ``build_dir``; returns the linked library."""
    stamp = build_dir / "stamp.cpp"
    _write_if_changed(stamp, f'[[gnu::used]] char torus_kernels_source[] = "{_MARKER}{digest}";\n')
    identity = build_dir / "compiler.txt"
    _write_if_changed(identity, compiler.identity)

    pic = "-Xcompiler=-fPIC" if library.uses_nvcc else "-fPIC"
    compiles = [_Step([*compiler.command, pic, "-c", str(stamp)], [stamp], build_dir / "stamp.o")]
    for unit in library.units:
        source = csrc / unit.source
        torch_flags = ["-isystem", str(torch_root / "include")] if unit.needs_torch else []
        flags = [*unit_flags(library, unit, csrc), *torch_flags, *extra_flags(library)]
        command = [*compiler.command, *flags, "-c", str(source)]
        compiles.append(_Step(command, [source], build_dir / f"{unit.name}.o"))
    objects = [step.output for step in compiles]
    command = [*compiler.command, "-shared", *map(str, objects), *_link_flags(library, torch_root),
               *extra_flags(library)]
    link = _Step(command, objects, build_dir / library.file)

    jobs = max_jobs(library.bytes_per_job)
    ninja = find_ninja()
    if ninja:
        _run_ninja(ninja, jobs, build_dir, compiles, link, identity)
    else:
        _run_directly(jobs, compiles, link)
    return link.output


def _link_flags(library: Library, torch_root: Path) -> list[str]:
    # torch is loaded before this library, so that its own libraries are found by name, without an rpath.
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    to_linker = "-Xlinker=" if library.uses_nvcc else "-Wl,"
    return [f"-L{torch_root / 'lib'}", f"{to_linker}--no-as-needed", "-ltorch_cpu", f"{to_linker}--no-undefined"]


def _run_ninja(
    ninja: str, jobs: int, build_dir: Path, compiles: list[_Step], link: _Step, identity: Path
) -> None:
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
    _run([ninja, "-C", str(build_dir), f"-j{jobs}"], build_dir / "build.log")


def _run_directly(jobs: int, compiles: list[_Step], link: _Step) -> None:
    def run(step: _Step) -> None:
        _run([*step.command, "-o", str(step.output)], step.output.with_suffix(".log"))

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
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


def _write_if_changed(path: Path, text: str) -> None:
    """Leaves an equal file alone: its time tells ninja what to build again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _ninja_escape(text: str) -> str:
    return text.replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return _ninja_escape(str(path)).replace(" ", "$ ").replace(":", "$:")
