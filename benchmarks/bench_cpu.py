"""The CPU workloads under pytest-benchmark, the operator and its peers side by side in one table per case::

    python -m pytest benchmarks/bench_cpu.py --benchmark-json runs/bench.json
    python -m pytest benchmarks/bench_cpu.py -k "field-4k and bfloat16 and not compiled"
    python -m pytest benchmarks/bench_cpu.py -m "slow or not slow" -k seed-512   # dense and flex too

Candidates run one after the other here; ``python -m benchmarks cpu`` times them in turn, so that ratios are of the same
moment.
"""

from __future__ import annotations

import functools

import pytest

from .accuracy import Gate
from .arguments import DTYPES
from .candidates import DIRECTIONS, OPERATOR, PEERS, Candidate, best_cpu_backend, operator
from .cpu import CPU_WORKLOADS
from .suite import call, make_gate, why_not
from .workloads import WORKLOADS, Inputs, cpu_inputs

_SLOW = ("dense", "flex")
CANDIDATES = [OPERATOR, *(pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else []) for name in PEERS)]


@functools.cache
def _candidate(name: str) -> Candidate:
    return operator(best_cpu_backend()) if name == OPERATOR else PEERS[name]


@functools.lru_cache(maxsize=1)
def _case(workload: str, dtype: str, direction: str) -> tuple[Inputs, Gate]:
    inputs = cpu_inputs(WORKLOADS[workload], DTYPES[dtype])
    return inputs, make_gate(WORKLOADS[workload], inputs, direction)


# The uppermost varies fastest: candidates of a case follow one another.
@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", CPU_WORKLOADS)
def test_attention(benchmark, workload: str, dtype: str, direction: str, candidate: str) -> None:
    """Checks a candidate, and times it if it is right."""
    chosen = _candidate(candidate)
    if reason := why_not(chosen, WORKLOADS[workload], DTYPES[dtype], direction):
        pytest.skip(reason)
    inputs, gate = _case(workload, dtype, direction)
    benchmark.group = f"{workload}, {dtype}, {direction}"
    benchmark.extra_info |= {"candidate": chosen.label, "sizes": WORKLOADS[workload].describe()}
    if chosen.computes_operator:
        found = gate.check(chosen.label, chosen.attention, peer=candidate != OPERATOR)
        worst = max(found, key=lambda check: check.error / check.budget)
        benchmark.extra_info |= {"error": worst.error, "budget": worst.budget, "result": worst.result}
    run = call(chosen, inputs, direction)
    run()
    benchmark(run)
