"""The study of precision: what its inputs are, what it measures, and its report."""

import re

import pytest
import torch
from benchmarking import printed

from benchmarks import __main__ as command_line
from benchmarks import peers, precision
from benchmarks.precision import HEAD_DIM, LOW_STREAM, Study, points
from benchmarks.precision_report import GROUPS, PLAIN, SWEEPS, PrecisionReport, grid, markdown
from benchmarks.progress import silent
from benchmarks.report import ReportError
from benchmarks.workloads import operator_on
from torus_kernels import TorusLattice

POINTS = {(point.sweep, point.value): point for point in points(4, 16)}


def scores(inputs) -> torch.Tensor:
    return inputs.q.double() @ inputs.k.double().mT * HEAD_DIM**-0.5


def measured(point, dtype=torch.float32, seeds=2) -> PrecisionReport:
    study = Study(["reference"], seeds, 4)
    study.measure(point, dtype, silent)
    return study.report


def test_sizes_stay_within_the_limit():
    assert {point.value for point in points(4, 300) if point.sweep == "sites"} == {16, 64, 256}
    assert {point.value for point in points(4, 300) if point.sweep == "length"} == {16, 64, 256}
    for point in POINTS.values():
        assert point.make(0).q.shape == (1, 2, 16, HEAD_DIM)
        assert point.sweep in SWEEPS


@pytest.mark.parametrize("largest", precision.SCORES)
def test_the_largest_score_is_what_it_says(largest):
    assert scores(POINTS["score", largest].make(3)).abs().max().item() == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("depth", precision.DEPTHS[2:])
def test_one_stream_lies_below_all_others(depth):
    point = POINTS["depth", depth]
    inputs = point.make(1)
    lattice = TorusLattice(4, 4)
    low = lattice.stream_geometry(LOW_STREAM, 16)[0][point.query]
    row = scores(inputs)[0, :, point.query]
    between = row[:, ~low].min() - row[:, low].max()
    assert between == pytest.approx(depth, abs=20)
    assert all((lattice.stream_geometry(s, 16)[0][point.query] & ~low).any() for s in lattice.streams - {LOW_STREAM})


def test_decay_is_that_of_every_stream():
    assert (POINTS["decay", 1e3].make(0).decay == 1e3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [("sites", 16), ("length", 16), ("score", 1e4), ("decay", 1e4), ("depth", 1e4)])
def test_the_reference_keeps_its_budget(name, dtype):
    report = measured(POINTS[name], dtype)
    assert report.exceedances() == []
    assert {(e.candidate, e.group) for e in report.errors} == {(c, g) for c in (PLAIN, "reference") for g in GROUPS}
    assert all(len(e.rms) == len(e.largest) == len(e.share) == 2 for e in report.errors)
    assert any(max(e.largest) > 0 for e in report.errors)


@pytest.mark.parametrize("group, factors", [("output", (1.01, 1.0)), ("token gradients", (1.0, 1.01))])
def test_an_error_is_measured_and_reported(monkeypatch, group, factors):
    """One percent off, in one of the outputs or in the gradients alone."""

    def attention(*inputs):
        out = operator_on("reference")(*inputs)
        forward, backward = factors
        return backward * out + (forward - backward) * out.detach()

    monkeypatch.setattr(precision, "operator_on", lambda name: attention)
    report = measured(POINTS["sites", 16])
    wrong, = (e for e in report.errors if (e.candidate, e.group) == ("reference", group))
    if group == "output":
        assert wrong.largest == pytest.approx((0.01, 0.01), rel=1e-2)
        assert wrong.rms == pytest.approx((0.01, 0.01), rel=1e-2)
    assert min(wrong.share) > 100
    assert any(f"over budget: reference, float32, {group}, sites of a periodic lattice 16" in line
               for line in report.exceedances())


def test_a_lost_stream_shows_in_the_row_that_is_looked_at(monkeypatch):
    """What a maximum shared by all streams would do: the low stream's weights vanish."""
    point = POINTS["depth", 1e3]

    def attention(q, k, v, weights, decay, state, alpha, lattice):
        kept = weights.clone()
        kept[:, LOW_STREAM] = 0
        out = peers.dense(q, k, v, weights, decay, state, alpha, lattice)
        lost = peers.dense(q, k, v, kept, decay, state, alpha, lattice)
        rows = torch.arange(q.shape[2]) == point.query
        return torch.where(rows[:, None], lost, out)

    monkeypatch.setattr(precision, "operator_on", lambda name: attention)
    wrong, = (e for e in measured(point).errors if (e.candidate, e.group) == ("reference", "output"))
    assert min(wrong.rms) > 0.01


def test_report_survives_its_file_and_is_shown(tmp_path, capsys):
    path = tmp_path / "out" / "report.json"
    chosen = [POINTS["decay", 0.0], POINTS["decay", 1.0], POINTS["score", 10.0]]
    text = printed(lambda console: precision.run(chosen, ["reference"], [torch.float32, torch.float16], seeds=2,
                                                 side=4, output=path, console=console), width=200)
    assert "float32, decay 0" in text and "Written:" in text
    for plot in (path.with_suffix(".png"), path.with_name("report-largest.png")):
        assert str(plot) in text and plot.stat().st_size > 10_000
    report = PrecisionReport.load(path)
    report.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert len(grid(report).rows) == 2 * 2 * len(GROUPS)
    assert re.fullmatch(r"\d\.\de-\d\d / \d\.\de-\d\d \([0-9.e-]+x\)", grid(report).rows[0][-1])
    command_line.main(["table", str(path)])
    assert capsys.readouterr().out == markdown(report) + "\n"
    assert "No point exceeds the error budget" in markdown(report)


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "precision", "format": 2}',
                                  '{"kind": "precision", "format": 1, "errors": [{}]}'])
def test_damaged_reports_are_refused(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ReportError, match=r"broken\.json"):
        PrecisionReport.load(tmp_path / "broken.json")


def test_a_backend_that_cannot_run_here_fails_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(precision, "can_run", lambda name, problem: "because")
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(["precision", "--backends", "triton", "--output", str(tmp_path / "x.json")])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert "'triton' cannot run on the CPU here: because" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["--seeds", "0"], 2), (["--backends", "none"], 2),
                                        (["--dtypes", "float64"], 2), (["--side", "1"], 2)])
def test_command_line(argv, code, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(["precision", *argv])
    assert exit_info.value.code == code
    assert "Traceback" not in capsys.readouterr().err
