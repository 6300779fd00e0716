"""The suite: every candidate is checked, then all are timed side by side."""

import dataclasses
import io
import time

import pytest
import torch
from benchmarking import TINY, drops_a_stream
from rich.console import Console

from benchmarks import cpu, roofline, timing
from benchmarks.accuracy import WrongResult
from benchmarks.candidates import BOTH, FORWARD, OPERATOR, PEERS, Candidate, operator
from benchmarks.report import Case, Report
from benchmarks.roofline import useful_bytes, useful_flops
from benchmarks.suite import Suite
from benchmarks.timing import LONG_CALL, WARM_UPS, Spread, Timing, time_side_by_side
from benchmarks.workloads import WORKLOADS, smaller
from torus_kernels import TorusLattice


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(roofline, "GEMM_SIZES", (16, 32))
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**16)


def test_workloads_of_the_suite_exist():
    assert set(cpu.CPU_WORKLOADS) <= set(WORKLOADS)
    assert smaller(WORKLOADS["text-4k"], 24).lattice == TorusLattice(24, 24, "causal")
    assert smaller(WORKLOADS["text-4k"], 24).name == "text-576"


def test_every_round_runs_every_candidate_once():
    calls = []
    timings = time_side_by_side(
        {name: lambda name=name: calls.append(name) for name in "abc"}, seconds=0.0, min_rounds=4
    )
    assert {name: len(timing.seconds) for name, timing in timings.items()} == dict.fromkeys("abc", 4)
    rounds = calls[3 * WARM_UPS:]
    assert len(rounds) == 12
    assert all(sorted(rounds[i : i + 3]) == list("abc") for i in range(0, 12, 3))


def test_rounds_stop_at_the_limit():
    assert len(time_side_by_side({"a": lambda: None}, seconds=60.0, max_rounds=7)["a"].seconds) == 7


def test_rounds_are_counted_and_candidates_prepared_before_each_run():
    calls, rounds = [], []
    time_side_by_side({"a": lambda: calls.append("a")}, seconds=0.0, min_rounds=2, on_round=rounds.append,
                      prepare=lambda name: calls.append(f"prepare {name}"))
    assert calls == ["prepare a"] + ["a"] * WARM_UPS + ["prepare a", "a"] * 2
    assert rounds == [1, 2]


def test_a_long_call_warms_up_once(monkeypatch):
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * (LONG_CALL + 1))
    time_side_by_side({"a": lambda: calls.append("a")}, seconds=0.0, min_rounds=1)
    assert len(calls) == 1 + 1


def test_ratios_are_of_the_same_round():
    slow, fast = Timing((2.0, 40.0, 6.0), 0), Timing((1.0, 10.0, 2.0), 0)
    assert slow.ratio_to(fast) == Spread(3.0, 2.5, 3.5)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_wrong_peer_is_skipped_and_a_wrong_operator_stops_the_suite():
    wrong = Candidate("compose", "compose", drops_a_stream)
    suite = Suite("reference", [operator("reference"), wrong, PEERS["flash"], PEERS["flex"]], seconds=0.0,
                  with_roofline=True)
    with pytest.warns(UserWarning, match="compose is wrong and is not timed"):
        suite.measure(TINY, torch.float32, BOTH)
    case = Case("tiny", "float32", BOTH)
    assert set(suite.report.timings(case)) == {OPERATOR, "flash"}
    assert {s.candidate: s.reason for s in suite.report.skipped}["flex"] == (
        "8 flex_attention has no forward+backward on this device"
    )
    assert [a.candidate for a in suite.report.accuracy] == [OPERATOR]
    line, = suite.report.roofline
    assert line.case == case
    assert (line.flops, line.bytes) == (useful_flops(TINY, BOTH), useful_bytes(TINY, torch.float32, BOTH))
    assert line.gemm > 0 and line.copy > 0
    suite = Suite("reference", [Candidate(OPERATOR, OPERATOR, drops_a_stream)], seconds=0.0)
    with pytest.raises(WrongResult, match="torus_attention is wrong"):
        suite.measure(TINY, torch.float32, FORWARD)
    assert not suite.report.measurements


def test_a_peer_that_cannot_run_is_skipped():
    def fails(*args):
        raise RuntimeError("no compiler\nand a long explanation")

    suite = Suite("reference", [operator("reference"), Candidate("compose", "compose", fails)], seconds=0.0)
    with pytest.warns(UserWarning, match="compose fails: no compiler$"):
        suite.measure(TINY, torch.float32, FORWARD)
    assert [skipped.reason for skipped in suite.report.skipped] == ["compose fails: no compiler"]
    with pytest.raises(RuntimeError, match="no compiler"):
        Suite("reference", [Candidate(OPERATOR, "operator", fails)], seconds=0.0).measure(TINY, torch.float32, FORWARD)


def test_what_was_measured_outlives_an_interruption(monkeypatch, tmp_path):
    def interrupted(suite, *args):
        suite.measure(TINY, torch.float32, FORWARD)
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "best_cpu_backend", lambda: "reference")
    monkeypatch.setattr(Suite, "measure_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cpu.run(["seed-512"], [torch.float32], [], seconds=0.0, longest_call=1.0, memory=False,
                output=tmp_path / "report.json", console=Console(file=io.StringIO()))
    assert [case.workload for case in Report.load(tmp_path / "report.json").cases()] == ["tiny"]


def test_a_peer_that_needs_more_memory_than_there_is_is_skipped():
    suite = Suite("reference", [operator("reference"), dataclasses.replace(PEERS["dense"], memory=lambda *_: 2**60)],
                  seconds=0.0)
    suite.measure(TINY, torch.float32, FORWARD)
    assert "GiB of memory" in suite.report.skipped[0].reason


def test_a_peer_whose_calls_are_too_long_is_skipped_and_the_operator_never():
    def slowly(*arguments):
        time.sleep(0.06)
        return operator("reference").attention(*arguments)

    candidates = [Candidate(OPERATOR, OPERATOR, slowly), Candidate("compose", "compose", slowly)]
    case = Case("tiny", "float32", FORWARD)
    for longest_call, timed, reasons in ((0.05, {OPERATOR}, 1), (60.0, {OPERATOR, "compose"}, 0)):
        suite = Suite("reference", candidates, seconds=0.0, min_rounds=1, longest_call=longest_call)
        suite.measure(TINY, torch.float32, FORWARD)
        assert set(suite.report.timings(case)) == timed
        assert [s.candidate for s in suite.report.skipped if "one call takes 0.0" in s.reason] == ["compose"] * reasons


def test_the_suite_measures_all_directions_and_dtypes_of_a_workload():
    workload = dataclasses.replace(TINY, dtypes=(torch.bfloat16,))
    suite = Suite("reference", [operator("reference")], seconds=0.0)
    shown = io.StringIO()
    report = suite.measure_all([TINY, workload], [torch.float32, torch.bfloat16], Console(file=shown))
    assert "Timing tiny, bfloat16, forward+backward" in shown.getvalue()  # no terminal, no bar
    expected = [("float32", FORWARD), ("float32", BOTH), ("bfloat16", FORWARD), ("bfloat16", BOTH)]
    assert [(case.dtype, case.direction) for case in report.cases()] == expected
