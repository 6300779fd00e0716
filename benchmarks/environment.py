"""The machine that a result was measured on, and the state it has to be in."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import torus_kernels

WARM_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_MMAP_THRESHOLD_": "8000000000"}
"""Makes glibc keep freed memory, so that large temporaries are not paged in anew at every call. The peers make many
of those: without this they take up to twice the time."""


def missing_settings() -> dict[str, str]:
    """What of `WARM_MEMORY` has to be added to the environment; settings of the user's own are left alone."""
    if sys.platform != "linux":
        return {}
    return {name: value for name, value in WARM_MEMORY.items() if name not in os.environ}


def restart_with_warm_memory() -> None:
    """Replaces this process by one with `WARM_MEMORY` in its environment, which malloc reads only at the start."""
    if missing := missing_settings():
        settings = " ".join(f"{name}={value}" for name, value in missing.items())
        print(f"Restarting with {settings}, so that freed memory stays warm.", flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "Model name")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _revision() -> str | None:
    """The commit measured, with ``+`` where the working tree differs from it; None outside a git checkout."""
    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """What a reader needs to judge a timing: hardware, threads, versions, allocator settings, other load, date."""
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "torus_kernels": torus_kernels.__version__,
        "revision": _revision(),
        "backends": list(torus_kernels.available_backends()),
        "allocator": {name: os.environ.get(name) for name in WARM_MEMORY},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def describe(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    warm = all(machine["allocator"].values())
    parts = [
        machine["cpu"], f"{machine['cores']} cores", f"{machine['threads']} threads", machine["capability"],
        f"torch {machine['torch']}", f"revision {machine['revision']}" if machine["revision"] else None,
        "warm memory (" + ", ".join(f"{name}={value}" for name, value in machine["allocator"].items()) + ")" if warm
        else "default allocator",
        None if machine["load_average"] is None else f"load average {machine['load_average']:.1f} at the start",
        machine["date"][:10],
    ]
    return ", ".join(part for part in parts if part)
