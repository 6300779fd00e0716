"""Peak memory of one call, measured in a process of its own: ``python -m benchmarks.memory CASE`` (Linux)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .candidates import BOTH, OPERATOR, PEERS, operator
from .environment import WARM_MEMORY
from .report import Case
from .workloads import WORKLOADS, cpu_inputs


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _measure(case: Case, candidate: str, backend: str) -> int:
    """Bytes that the second call of this process adds to it at the peak. The first one builds what is kept."""
    attention = (operator(backend) if candidate == OPERATOR else PEERS[candidate]).attention
    inputs = cpu_inputs(WORKLOADS[case.workload], getattr(torch, case.dtype))
    run = inputs.forward_backward if case.direction == BOTH else inputs.forward
    run(attention)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run(attention)
    return _status("VmHWM") - before


def peak_memory(case: Case, candidate: str, backend: str) -> int:
    """Bytes that one call adds to its process at the peak, outputs and gradients included.

    Raises:
        OSError: this system does not say, or the process failed.
    """
    job = json.dumps([case.workload, case.dtype, case.direction, candidate, backend])
    # Freed memory goes back at once here, so that the first call leaves no room for the second.
    environment = {name: value for name, value in os.environ.items() if name not in WARM_MEMORY}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", job], env=environment, capture_output=True,
                          text=True, cwd=Path(__file__).resolve().parent.parent)
    if done.returncode != 0:
        raise OSError(f"peak memory of {candidate} could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)


if __name__ == "__main__":
    *_case, _candidate, _backend = json.loads(sys.argv[1])
    print(_measure(Case(*_case), _candidate, _backend))
