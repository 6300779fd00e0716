"""The benchmarks: peers compute the operator, wrong results are not timed, results are kept and shown as measured."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command_line
from benchmarks import candidates, cpu, demo, environment, peers, plots
from benchmarks.accuracy import PEER_FACTOR, RESULTS, Gate, WrongResult, checks, evaluate
from benchmarks.candidates import BOTH, DIRECTIONS, FORWARD, OPERATOR, PEERS, Candidate, operator
from benchmarks.memory import peak_memory
from benchmarks.peers.tiling import tile_side
from benchmarks.report import (
    Accuracy,
    Case,
    Check,
    Measurement,
    Memory,
    Report,
    ReportError,
    Skipped,
    markdown_table,
    timing_tables,
)
from benchmarks.suite import Suite
from benchmarks.timing import WARM_UPS, Spread, Timing, time_side_by_side
from benchmarks.workloads import WORKLOADS, Workload, make_inputs, smaller
from torus_kernels import TorusLattice

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = operator("reference").attention

LATTICES = [
    (TorusLattice(16, 16), None),
    (TorusLattice(9, 6, winding=4), None),
    (TorusLattice(26, 13, winding=2), None),  # 13 is no multiple of a tile
    (TorusLattice(5, 15, winding=6, cross_radius=(1, 2)), None),
    (TorusLattice(2, 2), None),
    (TorusLattice(8, 8, "causal"), 200),  # runs of a residue class with a window before them
    (TorusLattice(7, 5, "causal", winding=3), 83),
    (TorusLattice(16, 11, "causal"), 150),
    (TorusLattice(3, 70, "causal", winding=2), 250),
    (TorusLattice(70, 3, "causal"), 250),
    (TorusLattice(12, 13, "causal", cross_radius=(0, 9)), 150),
    (TorusLattice(7, 5, "causal"), 1),
]
TINY = Workload("tiny", TorusLattice(6, 4, winding=2), batch=1, heads=2, head_dim=8)


def describe(value) -> str | None:
    if isinstance(value, TorusLattice):
        return f"{value.topology}-{value.n_major}x{value.n_minor}-w{value.winding}"
    return None


def printed(show, width=120):
    console = Console(width=width, file=io.StringIO())
    show(console)
    return console.file.getvalue()


def inputs_on(lattice, seq_len=None, dtype=torch.float32, batch=2):
    inputs = make_inputs(lattice, batch=batch, heads=3, head_dim=16, dtype=dtype, seq_len=seq_len)
    return dataclasses.replace(inputs, decay=inputs.decay + torch.linspace(0, 1, 24).view(3, 8).to(inputs.decay))


def accuracy(attention, inputs, *, backward=True, factor=2.0):
    truth = evaluate(REFERENCE, inputs.to(torch.float64), backward=backward)
    plain = evaluate(REFERENCE, inputs, backward=backward)
    return checks(evaluate(attention, inputs, backward=backward), truth, plain, factor=factor)


@pytest.mark.parametrize("peer", [peers.compose, peers.compose_matmul, peers.dense])
@pytest.mark.parametrize("lattice, seq_len", LATTICES, ids=describe)
def test_peers_compute_the_operator_and_its_gradients(lattice, seq_len, peer):
    inputs = inputs_on(lattice, seq_len)
    both, forward = accuracy(peer, inputs), accuracy(peer, inputs, backward=False)
    assert [check.result for check in both] == list(RESULTS)
    assert all(check.ok for check in both + forward), both + forward


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lattice, seq_len", LATTICES, ids=describe)
def test_flex_computes_the_operator(lattice, seq_len):
    assert all(check.ok for check in accuracy(peers.flex_eager, inputs_on(lattice, seq_len), backward=False))


@pytest.mark.slow
@pytest.mark.parametrize("lattice", [TorusLattice(16, 16), TorusLattice(16, 16, "causal")], ids=describe)
def test_compiled_flex_computes_the_operator(lattice):
    assert all(check.ok for check in accuracy(peers.flex, inputs_on(lattice), backward=False))


@pytest.mark.parametrize("peer", [peers.compose, peers.compose_matmul])
@pytest.mark.parametrize("lattice", [TorusLattice(16, 16), TorusLattice(16, 16, "causal")], ids=describe)
def test_compositions_in_low_precision(lattice, peer):
    inputs = inputs_on(lattice, dtype=torch.bfloat16)
    gate = Gate(inputs, peers.dense, backward=True)
    gate.check("peer", peer, factor=PEER_FACTOR)


def test_compose_refuses_a_topology_that_it_does_not_know():
    inputs = make_inputs(TorusLattice(4, 4, "cylinder"), batch=1, heads=1, head_dim=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="cylinder"):
        inputs.forward(peers.compose)


@pytest.mark.parametrize(
    "length, side", [(64, 8), (36, 9), (60, 6), (90, 9), (180, 9), (13, 8), (26, 8), (3, 3), (5, 5)]
)
def test_tiles_divide_the_lattice_where_they_can(length, side):
    assert tile_side(length) == side


def drops_a_stream(q, k, v, weights, decay, state, alpha, lattice):
    keep = torch.ones(8)
    keep[5] = 0
    return peers.compose(q, k, v, weights * keep, decay, state, alpha, lattice)


def forgets_the_distance(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k, v, weights, 0 * decay, state, alpha, lattice)


def detaches_the_decay(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k, v, weights, decay.detach() + 0 * decay, state, alpha, lattice)


def gives_alpha_no_gradient(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k, v, weights, decay, state, alpha.detach(), lattice)


def ignores_the_state(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k, v, weights, decay, torch.zeros_like(state), torch.ones_like(alpha), lattice)


def has_one_nan(q, k, v, weights, decay, state, alpha, lattice):
    out = peers.compose(q, k, v, weights, decay, state, alpha, lattice)
    return out.masked_fill(torch.arange(out.numel()).view(out.shape) == 77, torch.nan)


def is_one_site_off(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k.roll(1, 2), v.roll(1, 2), weights, decay, state, alpha, lattice)


def repeats_the_last_row(q, k, v, weights, decay, state, alpha, lattice):
    out = peers.compose(q, k, v, weights, decay, state, alpha, lattice)
    return torch.cat([out[:, :, :-1], out[:, :, -2:-1]], dim=2)


@pytest.mark.parametrize("factor", [2.0, PEER_FACTOR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [drops_a_stream, forgets_the_distance, detaches_the_decay, gives_alpha_no_gradient,
                                   ignores_the_state, has_one_nan, is_one_site_off, repeats_the_last_row])
def test_gate_refuses_what_is_wrong(wrong, dtype, factor):
    gate = Gate(inputs_on(TorusLattice(8, 6, winding=3), dtype=dtype), peers.compose, backward=True)
    with pytest.raises(WrongResult, match=r"wrong\b|shape None"):
        gate.check(wrong.__name__, wrong, factor=factor)


def test_nan_exceeds_every_budget():
    truth = {"out": torch.ones(4, dtype=torch.float64)}
    wrong = {"out": torch.tensor([1.0, 1.0, torch.nan, 1.0])}
    assert not checks(wrong, truth, {"out": torch.ones(4)})[0].ok


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_admits_the_reference(dtype, backward):
    gate = Gate(inputs_on(TorusLattice(8, 6, winding=3), dtype=dtype), peers.compose, backward=backward)
    assert all(check.ok for check in gate.check("reference", REFERENCE))


def test_inputs_are_the_same_numbers_in_every_dtype():
    wide, low = (make_inputs(TINY.lattice, batch=1, heads=2, head_dim=8, dtype=dtype)
                 for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip((*wide.tensors(), wide.d_out), (*low.tensors(), low.d_out), strict=True):
        assert torch.equal(a.to(b.dtype), b)
    assert low.q.dtype == low.state.dtype == low.d_out.dtype == torch.bfloat16
    assert low.weights.dtype == low.decay.dtype == low.alpha.dtype == torch.float32


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


def test_ratios_are_of_the_same_round():
    slow, fast = Timing((2.0, 40.0, 6.0), 0), Timing((1.0, 10.0, 2.0), 0)
    assert slow.ratio_to(fast) == Spread(3.0, 2.5, 3.5)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_wrong_peer_is_skipped_and_a_wrong_operator_stops_the_suite():
    wrong = Candidate("compose", "compose", drops_a_stream)
    suite = Suite("reference", [operator("reference"), wrong, PEERS["flash"], PEERS["flex"]], seconds=0.0)
    with pytest.warns(UserWarning, match="compose is wrong and is not timed"):
        suite.measure(TINY, torch.float32, BOTH)
    case = Case("tiny", "float32", BOTH)
    assert set(suite.report.timings(case)) == {OPERATOR, "flash"}
    assert {s.candidate: s.reason for s in suite.report.skipped}["flex"] == (
        "8 flex_attention has no forward+backward on this device"
    )
    assert [a.candidate for a in suite.report.accuracy] == [OPERATOR]
    suite = Suite("reference", [Candidate(OPERATOR, OPERATOR, drops_a_stream)], seconds=0.0)
    with pytest.raises(WrongResult, match="torus_attention is wrong"):
        suite.measure(TINY, torch.float32, FORWARD)
    assert not suite.report.measurements


def test_a_peer_that_needs_more_memory_than_there_is_is_skipped():
    suite = Suite("reference", [operator("reference"), dataclasses.replace(PEERS["dense"], memory=lambda *_: 2**60)],
                  seconds=0.0)
    suite.measure(TINY, torch.float32, FORWARD)
    assert "GiB of memory" in suite.report.skipped[0].reason


def test_the_suite_measures_all_directions_and_dtypes_of_a_workload():
    workload = dataclasses.replace(TINY, dtypes=(torch.bfloat16,))
    suite = Suite("reference", [operator("reference")], seconds=0.0)
    shown = io.StringIO()
    report = suite.measure_all([TINY, workload], [torch.float32, torch.bfloat16], Console(file=shown))
    assert "Timing tiny, bfloat16, forward+backward" in shown.getvalue()  # no terminal, no bar
    expected = [("float32", FORWARD), ("float32", BOTH), ("bfloat16", FORWARD), ("bfloat16", BOTH)]
    assert [(case.dtype, case.direction) for case in report.cases()] == expected


MACHINE = {
    "cpu": "A CPU", "cores": 2, "threads": 2, "capability": "AVX512", "torch": "2.13.0", "torus_kernels": "0.1.0",
    "revision": "abc1234", "backends": ["reference", "cpu"], "allocator": dict(environment.WARM_MEMORY),
    "load_average": 0.1, "date": "2026-01-02T03:04:05+00:00",
}


def make_report():
    case, other = Case("field-4k", "float32", FORWARD), Case("field-4k", "bfloat16", BOTH)
    return Report(
        MACHINE, "cpu", {"field-4k": "periodic 64x64, B=1 H=8 D=64"},
        [
            Measurement(case, OPERATOR, Timing((0.010, 0.020, 0.010), 0)),
            Measurement(case, "flash", Timing((0.250, 0.240, 0.260), 3.0)),
            Measurement(case, "compose", Timing((0.061, 0.080, 0.060), 0)),
            Measurement(other, OPERATOR, Timing((0.0051, 0.0052, 0.0053), 0)),
        ],
        [Accuracy(case, OPERATOR, Check("out", 1e-6, 5e-6))],
        [Memory(case, OPERATOR, 12 * 2**20)],
        [Skipped(other, "compose", "wrong")],
    )


def test_a_report_survives_the_way_through_a_file(tmp_path):
    report = make_report()
    report.save(tmp_path / "sub" / "report.json")
    assert Report.load(tmp_path / "sub" / "report.json") == report


def test_the_markdown_table_shows_medians_and_ratios_of_rounds():
    table, note = markdown_table(make_report()).split("\n\n")
    assert table.splitlines() == [
        "| workload | dtype | direction | torus_attention (cpu) | compose | one dense SDPA | peak memory |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        "| field-4k | float32 | forward | 10.0 ms | 61.0 ms (6.0x) | 250 ms (25x) | 12 MiB |",
        "| field-4k | bfloat16 | forward+backward | 5.20 ms | - | - | - |",
    ]
    for part in ("`field-4k`: periodic 64x64", "A CPU, 2 cores, 2 threads", "revision abc1234", "8000000000"):
        assert part in note


def test_the_terminal_table_and_the_plot_show_every_candidate(tmp_path):
    text = printed(lambda console: console.print(timing_tables(make_report())), width=80)
    assert re.search(r"compose +61\.0 +60\.5 - 70\.5 +6\.0x +5\.0x - 6\.[01]x", text)
    assert "one dense SDPA" in text and "field-4k, bfloat16, forward+backward" in text
    plots.write_timings(make_report(), tmp_path / "plots" / "timing.png")
    assert (tmp_path / "plots" / "timing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "machine": {}}', "\xff"])
def test_a_file_that_is_no_report_is_refused_by_name(tmp_path, text):
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ReportError, match=r"report\.json"):
        Report.load(tmp_path / "report.json")


def test_command_line_prints_the_table(tmp_path, capsys):
    make_report().save(tmp_path / "report.json")
    command_line.main(["table", str(tmp_path / "report.json")])
    assert capsys.readouterr().out == markdown_table(make_report()) + "\n"


def test_command_line_fails_with_one_line(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(SystemExit) as exit_info:
            command_line.main(["table", str(tmp_path / name)])
        assert exit_info.value.code == 1
        error = capsys.readouterr().err
        assert name in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("argv", [["--workloads", "nothing"], ["--seconds", "-1"], ["--seconds", "nan"],
                                  ["--train-seconds", "soon"], ["cpu", "--peers", "nothing"], ["nonsense"], ["table"]])
def test_command_line_refuses_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(argv)
    assert exit_info.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["cpu", "--help"], ["table", "--help"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(argv)
    assert exit_info.value.code == 0
    assert "usage: python -m benchmarks" in capsys.readouterr().out


def test_module_runs_from_the_root_of_the_checkout():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--train-seconds" in done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's variables")
def test_restarts_once_with_memory_that_stays_warm(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    for name in environment.WARM_MEMORY:
        monkeypatch.delenv(name, raising=False)
    environment.restart_with_warm_memory()
    (program, argv, variables), = started
    assert program == argv[0] == sys.executable and argv[1:] == sys.orig_argv[1:]
    assert environment.WARM_MEMORY.items() <= variables.items()
    assert "Restarting with MALLOC_TRIM_THRESHOLD_=8000000000" in capsys.readouterr().out
    for name, value in environment.WARM_MEMORY.items():
        monkeypatch.setenv(name, value)
    environment.restart_with_warm_memory()
    assert len(started) == 1


def test_main_job_without_training_where_only_the_reference_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(candidates, "available_backends", lambda: ("reference",))
    monkeypatch.setattr(demo, "_SMALL_SIDE", 6)
    settings = demo.Settings(["text-4k"], [torch.float32], 0.0, 0.0, tmp_path / "out")
    text = printed(lambda console: demo.run(settings, console))
    for part in ("Backends", "Only the dense reference runs here", "d_alpha", "text-36, float32, forward+backward",
                 "torus_attention (reference)", "compose", "one dense SDPA"):
        assert part in text
    report = Report.load(tmp_path / "out" / "timing.json")
    assert [case.direction for case in report.cases()] == list(DIRECTIONS)
    assert (tmp_path / "out" / "timing.png").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_counts_what_a_call_allocates():
    case = Case("seed-512", "float32", FORWARD)
    out = 8 * 8 * 512 * 32 * 4  # [B, H, T, D] in float32
    scores = 8 * 8 * 512 * 512 * 4  # [B, H, T, T], which only the reference makes
    assert out <= peak_memory(case, "flash", "reference") < scores
    assert peak_memory(case, OPERATOR, "reference") > scores


REPORTS = sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.name)
def test_committed_results_are_complete(path):
    report = Report.load(path)
    assert report.cases() and {"cpu", "cores", "threads", "torch", "date", "allocator"} <= report.machine.keys()
    assert all(entry.check.ok for entry in report.accuracy if entry.candidate == OPERATOR)
    for case in report.cases():
        assert {OPERATOR, "compose"} <= report.timings(case).keys()
    assert json.loads(path.read_text())["format"] == 1
    assert path.with_suffix(".png").exists()


def test_the_readme_shows_the_table_of_a_committed_result():
    readme = ROOT / "README.md"
    named = re.findall(r"benchmarks/results/(cpu-[\w.-]+?\.json)", readme.read_text()) if readme.exists() else []
    if not named:
        pytest.skip("the README names no result")
    for name in set(named):
        assert markdown_table(Report.load(ROOT / "benchmarks" / "results" / name)) in readme.read_text()
