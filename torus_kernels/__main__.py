"""``python -m torus_kernels``: what a bug report must say about this machine, and whether the backends are right."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, building
from .selfcheck import Check, check_backend

_VARIABLES = ("TORUS_", "TRITON_", "OMP_", "CUDA_", "PYTORCH_", "MKL_")
_VARIABLE_NAMES = ("CXX", "MAX_JOBS")
_ON_CPU_UNDER = {"triton": "TRITON_INTERPRET", "cuda": "TORUS_CUDA_EMULATE"}  # the backends of GPUs
_NOT_LOOKED_AT = "not looked at, as that would initialise CUDA: --cuda does it"


@dataclass
class Report:
    """Everything that is printed; `dataclasses.asdict` of it is the JSON."""

    versions: dict[str, str]
    machine: dict[str, str]
    variables: dict[str, str]
    backends: dict[str, str]
    checks: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def _described(describe: Callable[[], str]) -> str:
    """What ``describe`` says, or in its place why it cannot: one defect must not hide the rest of the report."""
    try:
        return describe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _compiler() -> str:
    """Of the library in use where it says so (one that came in a wheel does not), otherwise the one there is."""
    with contextlib.suppress(building.BuildError, OSError):
        record = building.build_dir_of(building.ensure_library(building.CPU)) / "compiler.txt"
        return record.read_text().splitlines()[0]
    return building.find_compiler().identity.splitlines()[0]


def _instruction_set() -> str:
    if backends.unavailable("cpu") is not None:
        return "none, the cpu backend cannot run"
    from .backends import cpu

    return cpu.instruction_set()


def _gpus(use_cuda: bool) -> str:
    """Through the driver's own tool, unless CUDA may be initialised."""
    if use_cuda:
        if not torch.cuda.is_available():
            return "none that torch can use"
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return "; ".join(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 20} MiB" for gpu in found)
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except FileNotFoundError:
        return "none (no nvidia-smi)"
    return "; ".join(done.stdout.splitlines()) or "none"


def _runs_on_cuda(name: str) -> bool:
    return name in _ON_CPU_UNDER and os.environ.get(_ON_CPU_UNDER[name], "0") in ("", "0")


def _may_look_at(name: str, use_cuda: bool) -> bool:
    """False where asking the backend whether it can run would initialise CUDA against the user's wish."""
    if use_cuda or not _runs_on_cuda(name):
        return True
    return torch.version.cuda is None or torch.cuda.device_count() == 0  # the count comes from the driver's library


def make_report(use_cuda: bool = False) -> Report:
    """Looks at the machine and checks every backend that can run; nothing is raised."""
    report = Report(
        versions={
            "torus_kernels": __version__,
            "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
            "triton": _described(lambda: _installed("triton")),
            "Python": sys.version.replace("\n", ""),
            "compiler": _described(_compiler),
        },
        machine={
            "platform": platform.platform(),
            "CPU": _cpu_model(),
            "CPU capability": f"torch {torch.backends.cpu.get_cpu_capability()}, "
                              f"torus_kernels {_described(_instruction_set)}",
            "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
            "GPU": _described(lambda: _gpus(use_cuda)),
            "library": _described(lambda: str(building.ensure_library(building.CPU))),
        },
        variables={
            name: value for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) or name in _VARIABLE_NAMES
        },
        backends={},
    )
    for name in backends.BACKENDS:
        if not _may_look_at(name, use_cuda):
            report.backends[name] = _NOT_LOOKED_AT
            continue
        try:
            report.backends[name] = backends.unavailable(name) or "available"
            if report.backends[name] == "available":
                _add_checks(report, name)
        except Exception as error:  # a backend that cannot even say whether it can run
            report.backends[name] = f"broken: {type(error).__name__}: {error}"
            report.failures.append(f"{name}: {report.backends[name]}")
    return report


def _add_checks(report: Report, name: str) -> None:
    device = "cuda" if _runs_on_cuda(name) else "cpu"
    checks: list[Check] = list(check_backend(name, device))
    report.checks += [check._asdict() for check in checks]
    report.failures += [
        f"{name}, {check.dtype}, {check.topology}: {check.failure}" for check in checks if check.failure is not None
    ]
    if not checks:
        report.failures.append(f"{name}: it takes none of the cases of the self-check on {device}")


def _print(report: Report) -> None:
    for title in ("versions", "machine", "variables", "backends"):
        entries: dict[str, str] = getattr(report, title)
        print(title)
        for name, text in entries.items():
            print(f"  {name:<14} " + text.replace("\n", "\n" + " " * 17))
    print("self-check: largest error of the output and of every gradient, relative to the largest result")
    for check in report.checks:
        case = f"  {check['backend']:<9} {check['device']:<4} {check['dtype']:<8} {check['topology']:<8} "
        if check["failure"] is None:
            print(f"{case} ok      {check['error']:.1e} ({check['worst']}), {check['allowed']:.1e} allowed")
        else:
            print(f"{case} FAILED  " + check["failure"].replace("\n", "\n    "))
    print(f"{len(report.failures)} failures" if report.failures else "all is well")
    for failure in report.failures:
        print("  " + failure.splitlines()[0])


def main(arguments: list[str] | None = None) -> int:
    """Prints the report and returns the exit status: 1 where a backend that should run is broken or wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m torus_kernels",
        description="Reports versions, machine and backends, and checks every backend that can run against the "
                    "reference, output and all gradients. Meant for bug reports. The first run may compile the C++ "
                    "kernels. Exit status 1 says that a backend is broken or wrong; one that cannot run here is "
                    "neither.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--cuda", action="store_true", help="initialise CUDA and check the GPU's backends too")
    options = parser.parse_args(arguments)
    report = make_report(options.cuda)
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    faulthandler.enable()  # says where, should a kernel crash
    sys.exit(main())
