"""Results are kept and shown as they were measured."""

import json
import re
from pathlib import Path

import pytest
from benchmarking import make_report, printed

from benchmarks import field_report, plots
from benchmarks.candidates import OPERATOR
from benchmarks.field_report import FieldReport
from benchmarks.report import KINDS, Report, ReportError
from benchmarks.tables import markdown_report, markdown_roofline, markdown_table, roofline_grid, timing_tables

ROOT = Path(__file__).resolve().parent.parent


def test_a_report_survives_the_way_through_a_file(tmp_path):
    report = make_report()
    report.save(tmp_path / "sub" / "report.json")
    assert Report.load(tmp_path / "sub" / "report.json") == report


def test_the_markdown_table_shows_medians_and_ratios_of_rounds():
    table, note = markdown_table(make_report()).split("\n\n")
    assert table.splitlines() == [
        "| workload | dtype | direction | torus_attention (cpu) | compose | one dense SDPA | peak memory |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        "| field-4k | float32 | forward | 10.0 ms | 61.0 ms (6.0x, 5.0-6.0) | 250 ms (25x, 18.5-26) | 12 MiB |",
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


def test_the_roofline_shows_rates_beside_those_of_the_machine(tmp_path):
    # 2 GFLOP and 0.1 GB in 10 ms; 20 FLOP a byte at 20 GB/s allow 400 GFLOP/s.
    assert roofline_grid(make_report()).rows == [
        ["field-4k", "float32", "forward", "200", "20% of 1000", "10.00", "50% of 20.0", "50%"]
    ]
    assert markdown_report(make_report()).endswith(markdown_roofline(make_report()))
    plots.write_roofline(make_report(), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_before_labels_and_rooflines_is_read(tmp_path):
    path = tmp_path / "report.json"
    make_report().save(path)
    fields = json.loads(path.read_text())
    for name in ("roofline", "labels", "kind"):
        del fields[name]
    path.write_text(json.dumps(fields))
    old = Report.load(path)
    assert markdown_table(old) == markdown_table(make_report())
    assert (old.roofline, old.kind) == ([], "cpu")


REPORTS = sorted(path for kind in KINDS for path in (ROOT / "benchmarks" / "results").glob(f"{kind}-*.json"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.name)
def test_committed_results_are_complete(path):
    report = Report.load(path)
    assert report.kind == path.name.partition("-")[0]
    assert report.cases() and {"cpu", "cores", "threads", "torch", "date", "allocator"} <= report.machine.keys()
    assert all(entry.check.ok for entry in report.accuracy if entry.candidate == OPERATOR)
    assert path.with_suffix(".png").exists() or report.kind == "compare"
    assert markdown_report(report)
    for case in report.cases() if report.kind == "cpu" else []:
        assert {OPERATOR, "compose"} <= report.timings(case).keys()


def test_the_readme_shows_the_table_of_a_committed_result():
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    named = re.findall(r"benchmarks/results/((?:cpu(?:-amx|-avx512)?|field)-[\d-]+?\.json)", text)
    if not named:
        pytest.skip("the README names no result")
    for name in set(named):
        path = ROOT / "benchmarks" / "results" / name
        table = field_report.grid(FieldReport.load(path)).markdown() if name.startswith("field") else markdown_table(
            Report.load(path))
        assert table in text
