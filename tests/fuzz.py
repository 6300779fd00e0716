"""Random calls of the public API, valid and not: each must give the right answer or the documented error.

    python tests/fuzz.py --cases 20000
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections import Counter
from pathlib import Path

import torch
from fuzz_attention import attention_calls, cache_calls, decode_calls
from fuzz_companions import compounding_calls, lattice_calls, rope_calls
from fuzzing import Call, judge
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from support import Backend
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is run by its path

from benchmarks import fuzz_report
from torus_kernels.backends import BACKENDS, unavailable

MEMORY = 2**33  # bytes of addresses beyond those at the start: what wrongly takes a huge call ends there
BATCH = 500  # cases between two signs of life; every batch has a seed of its own


def calls(backend: Backend) -> SearchStrategy[Call]:
    """Calls of every public function that computes something, attention most often."""
    attention, compounding = attention_calls(backend), compounding_calls(backend)
    rope = [] if backend.name == "cuda" else [rope_calls(backend)]
    return st.sampled_from([
        *[attention] * 5, decode_calls(backend), cache_calls(backend), *[compounding] * 2, *rope,
        lattice_calls(backend),
    ]).flatmap(lambda strategy: strategy)


def run(backend: Backend, cases: int, number: int | None) -> Counter[tuple[str, str]]:
    """Makes so many calls and counts them by function and outcome. ``number`` seeds them; None: always the same.

    Raises AssertionError for the first call that is answered wrongly, after making it as small as hypothesis can.
    """
    counts: Counter[tuple[str, str]] = Counter()

    @settings(max_examples=cases, deadline=None, database=None, derandomize=number is None,
              phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    @given(call=calls(backend))
    def each(call: Call) -> None:
        counts[call.function, judge(backend, call)] += 1

    (each if number is None else seed(number)(each))()
    return counts


def table(counts: Counter[tuple[str, str]]) -> str:
    """Counts as text: a line for each function, a column for each outcome."""
    functions, outcomes = sorted({f for f, _ in counts}), sorted({o for _, o in counts}, reverse=True)
    lines = [["", *outcomes, "all"]]
    for name in [*functions, "all"]:
        row = [sum(n for (f, o), n in counts.items() if o == outcome and name in (f, "all")) for outcome in outcomes]
        lines.append([name, *map(str, row), str(sum(row))])
    return "\n".join(f"{line[0]:28}" + "".join(f"{cell:>14}" for cell in line[1:]) for line in lines)


def limit_memory() -> None:
    """Lets the process have `MEMORY` more addresses than now, so that it ends before the machine's memory does."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit, (_, hard) = pages * resource.getpagesize() + MEMORY, resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20000, help="how many calls (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch; the next ones count on (default: 0)")
    parser.add_argument("--backend", choices=BACKENDS, default="cpu", help="what computes (default: cpu)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the counts as JSON")
    arguments = parser.parse_args()
    if arguments.cases < 1:
        parser.error(f"--cases must be at least 1, got {arguments.cases}")
    if reason := unavailable(arguments.backend):
        parser.error(f"backend {arguments.backend}: {reason.splitlines()[0]}")
    torch.set_num_threads(1)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # it reserves more addresses than there are
        limit_memory()
    total: Counter[tuple[str, str]] = Counter()
    with tqdm(total=arguments.cases, unit="calls") as progress:
        for batch, start in enumerate(range(0, arguments.cases, BATCH)):
            count = min(BATCH, arguments.cases - start)
            try:
                total += run(Backend(arguments.backend), count, arguments.seed + batch)
            except KeyboardInterrupt:
                break
            except Exception:
                print(f"failed in batch {batch}: --seed {arguments.seed + batch} --cases {count}", file=sys.stderr)
                raise
            progress.update(count)
    print(table(total))
    if arguments.output is not None:
        fuzz_report.save(arguments.output, total, cases=sum(total.values()), seed=arguments.seed,
                         backend=arguments.backend)
    return 0 if sum(total.values()) == arguments.cases else 130


if __name__ == "__main__":
    sys.exit(main())
