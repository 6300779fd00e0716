"""The command line of the benchmarks, and the main job."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarking import make_report, printed

from benchmarks import __main__ as command_line
from benchmarks import candidates, cpu, demo, environment
from benchmarks.candidates import DIRECTIONS, FORWARD, OPERATOR, PEERS
from benchmarks.memory import peak_memory
from benchmarks.report import Case, Report
from benchmarks.tables import markdown_report

ROOT = Path(__file__).resolve().parent.parent


def test_command_line_prints_the_table(tmp_path, capsys):
    make_report().save(tmp_path / "report.json")
    command_line.main(["table", str(tmp_path / "report.json")])
    assert capsys.readouterr().out == markdown_report(make_report()) + "\n"


def test_command_line_fails_with_one_line(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(SystemExit) as exit_info:
            command_line.main(["table", str(tmp_path / name)])
        assert exit_info.value.code == 1
        error = capsys.readouterr().err
        assert name in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("argv", [["--workloads", "nothing"], ["--seconds", "-1"], ["--seconds", "nan"],
                                  ["--train-seconds", "soon"], ["cpu", "--peers", "nothing"], ["nonsense"], ["table"],
                                  ["growth", "--dtypes"], ["growth", "--sides", "1"],
                                  ["growth", "--workload", "seed-512"],
                                  ["threads", "--threads", "0"], ["decode", "--workloads", "field-4k"],
                                  ["compare"], ["compare", "HEAD", "--fail-above", "0"],
                                  ["compare", "HEAD", "--directions", "sideways"]])
def test_command_line_refuses_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(argv)
    assert exit_info.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in (
    "cpu", "growth", "threads", "decode", "compare", "table"))])
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
    # The system counts pages in batches of its own, which may be some dozens behind.
    assert 0.9 * out <= peak_memory(case, "flash", "reference") < scores
    assert peak_memory(case, OPERATOR, "reference") > scores


def bench(*options: str) -> str:
    """The output of pytest-benchmark's suite, started without the settings that it needs."""
    variables = {name: value for name, value in os.environ.items() if name not in environment.WARM_MEMORY}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_cpu.py",
                           *options], cwd=ROOT, capture_output=True, text=True, env=variables | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pytest_benchmark_times_every_case_and_peer():
    text = bench("--collect-only", "-m", "slow or not slow")
    cases = set(re.findall(r"test_attention\[(.+)\]", text))
    for workload, dtype, direction, peer in itertools.product(
        cpu.CPU_WORKLOADS, ("float32", "bfloat16", "float16"), DIRECTIONS, (OPERATOR, *PEERS)
    ):
        assert f"{workload}-{dtype}-{direction}-{peer}" in cases


def test_pytest_benchmark_groups_by_case_and_states_the_machine(tmp_path):
    output = tmp_path / "bench.json"
    text = bench("-k", "seed-512 and float32 and forward and not backward and (flash or matmul)", "--benchmark-json",
                 str(output), "--benchmark-max-time", "0.01", "--benchmark-min-rounds", "1", "-v")
    if sys.platform == "linux":
        assert "Restarting with MALLOC_TRIM_THRESHOLD_=8000000000" in text
    assert re.search(r"benchmark 'seed-512, float32, forward': 2 tests", text)
    fields = json.loads(output.read_text())
    assert {"cpu", "threads", "torch", "revision", "allocator"} <= fields["machine_info"]["torus_kernels"].keys()
    checked, = (entry["extra_info"] for entry in fields["benchmarks"] if "budget" in entry["extra_info"])
    assert checked["candidate"] == PEERS["compose_matmul"].label and checked["error"] <= checked["budget"]
