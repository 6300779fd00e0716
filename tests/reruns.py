"""Parts of the suite run again in processes of their own, on a backend that a variable turns on."""

import concurrent.futures
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent
TIMEOUT = 1800


def _run(file: str, expression: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), "-k", expression]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


class Reruns:
    """As many files at once as there are cores.

    Args:
        backend: whose tests run.
        selected: what of each file, as an expression of pytest's ``-k``.
        variables: that turn the backend on.
    """

    def __init__(self, backend: str, selected: Mapping[str, str], **variables: str) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._runs = {file: self._pool.submit(_run, file, f"{backend} and ({expression})", variables)
                      for file, expression in selected.items()}

    def __enter__(self) -> "Reruns":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def check(self, file: str) -> None:
        """The tests of the file passed, and there were some."""
        result = self._runs[file].result()
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
        assert " passed" in result.stdout.splitlines()[-1], result.stdout
