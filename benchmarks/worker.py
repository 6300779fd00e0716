"""One side of a comparison, in a process of its own: ``python -m benchmarks.worker BACKEND``.

Runs the ``torus_kernels`` of the directory that it is started in. Requests and replies are lines of JSON on stdin and
stdout; a reply ``{"error": ...}`` says what went wrong. It imports what it has to and nothing else: the other revision
may be old.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any


class _Worker:
    def __init__(self, backend: str) -> None:
        self._backend = backend

    def hello(self) -> dict[str, Any]:
        """Where the library comes from. The kernels are built now if they have to be."""
        import torch

        import torus_kernels

        x = torch.zeros(1, 1, 4, 8)
        torus_kernels.torus_attention(x, x, x, torus_kernels.TorusLattice(2, 2), backend=self._backend)
        return {"file": torus_kernels.__file__}

    def prepare(self, lattice: dict[str, Any], sizes: dict[str, int], dtype: str, direction: str) -> dict[str, Any]:
        """Makes the inputs of a case from the arguments of its lattice and of `benchmarks.workloads.make_inputs`."""
        import torch

        from torus_kernels import TorusLattice

        from .workloads import make_inputs, operator_on

        inputs = make_inputs(TorusLattice(**lattice), dtype=getattr(torch, dtype), **sizes)
        attention = operator_on(self._backend)
        run = inputs.forward if direction == "forward" else inputs.forward_backward
        self._run = lambda: run(attention)
        return {}

    def results(self, path: str) -> dict[str, Any]:
        """Writes ``out`` and, in that direction, the gradients as a list of tensors."""
        import torch

        found = self._run()
        torch.save([found] if isinstance(found, torch.Tensor) else list(found), path)
        return {}

    def time(self, seconds: float) -> dict[str, Any]:
        """The median time of calls that go on for ``seconds``, after one that does not count."""
        self._run()
        taken: list[float] = []
        while not taken or sum(taken) < seconds:
            before = time.perf_counter()
            self._run()
            taken.append(time.perf_counter() - before)
        return {"seconds": statistics.median(taken)}


def main() -> None:
    """Answers requests until stdin ends."""
    worker = _Worker(sys.argv[1])
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not be taken for a reply
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
