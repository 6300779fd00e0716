"""The fuzzer's sample, and that it tells right from wrong. All of it: ``python tests/fuzz.py``."""

import pytest
from fuzz import run
from fuzzing import Call, Fault, judge

from benchmarks import fuzz_report
from benchmarks.report import ReportError
from benchmarks.show import markdown_of
from torus_kernels import BackendError

FUNCTIONS = {"torus_attention", "torus_attention_with_stats", "torus_attention_decode", "TorusKVCache.append",
             "ema_compound", "ema_compound_multiscale", "lattice_rope", "TorusLattice"}


def test_random_calls(backend):
    cases = 20 if backend.is_slow else 200 if backend.name == "reference" else 2000
    counts = run(backend, cases, None)
    assert sum(counts.values()) == cases
    if cases == 2000:  # neither a refusal nor an answer is rare
        for function in FUNCTIONS:
            refused = counts[function, "ValueError"] + counts[function, "TypeError"]
            assert min(refused, counts[function, "right"]) >= 10, function


def raising(error: Exception):
    def call(_):
        raise error

    return call


@pytest.mark.parametrize("answer, fault, outcome", [
    (lambda _: None, None, "right"),
    (lambda _: None, "q", "took what it must refuse: q"),
    (raising(ValueError("q must be")), "q", "ValueError"),
    (raising(TypeError("q must be")), "q", "TypeError"),
    (raising(ValueError("k must be")), "q", "wrong was: q"),
    (raising(ValueError("q must be")), None, "wrong was: nothing"),
    (raising(BackendError("q")), "q", "wrong was: q"),
    (raising(RuntimeError("q")), "q", "^q$"),
    (raising(AssertionError("wrong numbers")), None, "wrong numbers"),
], ids=str)
def test_judgement(answer, fault, outcome):
    call = Call("f", answer, [] if fault is None else [Fault(fault, frozenset({fault}))])
    if outcome in ("right", "ValueError", "TypeError"):
        assert judge(None, call) == outcome
    else:
        with pytest.raises((AssertionError, RuntimeError), match=outcome):
            judge(None, call)


def test_counts_become_a_table(tmp_path):
    path = tmp_path / "deep" / "fuzz.json"
    counts = {("f", "right"): 3, ("f", "TypeError"): 2, ("g", "BackendError"): 1}
    fuzz_report.save(path, counts, cases=6, seed=5, backend="cpu")
    head, _, f, g, everything, _, note = markdown_of(path).splitlines()
    assert head == "| function | right | ValueError | TypeError | BackendError | calls |"
    assert f == "| f | 3 | 0 | 2 | 0 | 5 |" and g == "| g | 0 | 0 | 0 | 1 | 1 |"
    assert everything == "| all | 3 | 0 | 2 | 1 | 6 |"
    assert "--cases 6 --seed 5 --backend cpu" in note
    path.write_text('{"kind": "fuzz", "format": 9}')
    with pytest.raises(ReportError, match=r"fuzz\.json"):
        markdown_of(path)
