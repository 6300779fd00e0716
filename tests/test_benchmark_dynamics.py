"""The study of dynamic training: what its runs are, what it measures, and its report."""

import pytest
import torch
from benchmarking import printed

from benchmarks import __main__ as command_line
from benchmarks import dynamics
from benchmarks.dynamics_report import DynamicsReport, grid, markdown
from benchmarks.report import ReportError

LENGTH = 10


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A study of tiny runs."""
    path = tmp_path_factory.mktemp("study") / "report.json"
    model = {"n_major": 4, "n_minor": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamics, "MODEL", dynamics.ModelConfig(width=32, heads=2, layers=2, **model))
        patch.setattr(dynamics, "SMALL", dynamics.ModelConfig(width=16, heads=1, layers=2, **model))
        patch.setattr(dynamics, "SEQ_LEN", 32)
        patch.setattr(dynamics, "CURRICULUM", {"curriculum": (8,), "curriculum_loss": (1e9,), "curriculum_patience": 3})
        text = printed(lambda console: dynamics.run(LENGTH, 1, path, console), width=200)
    assert "seed 0, growth" in text and "Written:" in text
    return path


def test_every_feature_is_compared_with_a_run_without_it(output):
    report = DynamicsReport.load(output)
    assert report.features() == list(dynamics._SHOWN)
    assert all(len(report.of(feature)) >= 2 for feature in report.features())
    assert len(grid(report).rows) == len(report.runs)
    for run in report.runs:
        steps, tokens, operations, bits = zip(*run.points, strict=True)
        assert steps[0] == tokens[0] == operations[0] == 0 and sorted(tokens) == list(tokens)
        assert 0 < bits[-1] < 9


def test_runs_are_compared_at_equal_cost(output):
    report = DynamicsReport.load(output)

    def ends(feature, quantity):
        return [runs[0].points[-1][quantity] for runs in report.of(feature).values()]

    a_step = 32 * dynamics.LARGEST_BATCH
    assert max(ends("curriculum", 1)) - min(ends("curriculum", 1)) <= 32 * dynamics.BATCH
    assert max(ends("batch size", 1)) - min(ends("batch size", 1)) <= a_step
    # A step of the large model is the resolution.
    large = report.of("growth")["large from the start"][0].points[-1]
    assert max(ends("growth", 2)) - min(ends("growth", 2)) <= large[2] / large[0]
    assert ends("schedules", 0) == [LENGTH] * 3


def test_what_changes_is_recorded(output):
    report = DynamicsReport.load(output)
    first = {name: runs[0] for feature in report.features() for name, runs in report.of(feature).items()}
    assert first["curriculum"].series["tokens per sequence"] == (8.0,) * 3 + (32.0,) * 12
    assert len(set(first["grown"].series["parameters"])) == 2
    assert first["factor 0.2 to 1"].series["alpha"][0] < 0.5 < first["factor 0.2 to 1"].series["alpha"][-1]
    assert len(first["growing"].series["noise scale"]) == LENGTH
    assert [rate for rate, _ in report.layers["decay 0.5"]] == [0.25, 0.5, 1.0]
    assert [rate for rate, _ in report.layers["one rate"]] == [1.0, 1.0, 1.0]
    assert report.layers["decay 0.5"][0][1] < report.layers["one rate"][0][1]
    # Sums of a few thousand products, in another order.
    assert report.growth["float64"] < 1e-12 < report.growth["float32"] < 1e-4


def test_report_is_shown_and_plotted(output, tmp_path, capsys):
    report = DynamicsReport.load(output)
    report.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == output.read_text()
    command_line.main(["table", str(output)])
    assert capsys.readouterr().out == markdown(report) + "\n"
    for name in ("report.png", "report-curves.png"):
        assert (output.parent / name).stat().st_size > 10_000


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "dynamics", "format": 2}',
                                  '{"kind": "dynamics", "format": 1, "runs": [{}]}'])
def test_damaged_reports_are_refused(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ReportError, match=r"broken\.json"):
        DynamicsReport.load(tmp_path / "broken.json")


def test_the_random_state_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(dynamics.Study, "parts", lambda self: {"nothing": lambda seed: torch.rand(3)})
    monkeypatch.setattr(dynamics, "write_plots", lambda *args: None)
    before = torch.get_rng_state()
    printed(lambda console: dynamics.run(LENGTH, 1, tmp_path / "report.json", console), width=80)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["--seeds", "0"], 2), (["--steps", "1"], 2)])
def test_command_line(argv, code, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(["dynamics", *argv])
    assert exit_info.value.code == code
    assert "Traceback" not in capsys.readouterr().err
