"""The study of transfer: what it measures, its report, and its plots."""

import dataclasses

import pytest
from benchmarking import printed

from benchmarks import __main__ as command_line
from benchmarks import transfer
from benchmarks.report import ReportError
from benchmarks.transfer_report import COMPRESSION, DISTILLATION, EXPERTS, TUNING, TransferReport, markdown
from torus_model import ModelConfig

TINY = transfer.Settings(
    model=ModelConfig(width=32, layers=2, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2)), steps=8, tune_steps=8,
    seeds=2, seq_len=24, windows=2, max_bytes=100_000, backend="reference",
)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[TransferReport, str, object]:
    """The report of a tiny study, what was printed, and the file."""
    pytest.importorskip("torchao")
    path = tmp_path_factory.mktemp("study") / "out" / "transfer.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORUS_BACKEND", "reference")
        made = []
        text = printed(lambda console: made.append(transfer.run(TINY, path, console)), width=240)
    return made[0], text, path


def by_variant(report, feature):
    return {x.variant: x for x in report.outcomes if x.feature == feature}


def test_every_feature_has_loss_and_size_before_and_after(study):
    report, text, path = study
    assert [*dict.fromkeys(x.feature for x in report.outcomes)] == [TUNING, DISTILLATION, COMPRESSION, EXPERTS]
    assert all(0 < bits < 10 for x in report.outcomes for bits in (x.before, *x.after))
    assert path.with_suffix(".png").stat().st_size > 10_000 and str(path) in text
    half = by_variant(report, TUNING)["embedding and blocks.0-0 frozen: prose"]
    assert half.learning < 0.6 * by_variant(report, TUNING)["all layers: prose"].learning
    assert half.before == by_variant(report, TUNING)["all layers: prose"].before
    for student in by_variant(report, DISTILLATION).values():
        assert len(student.after) == 2 and student.bytes_after < 0.5 * student.bytes_before
    assert len({x.after for x in by_variant(report, DISTILLATION).values()}) == 2, "a teacher makes a difference"


def test_sizes_are_those_of_the_files(study):
    small = by_variant(study[0], COMPRESSION)
    assert small["int8"].bytes_after < 0.3 * small["int8"].bytes_before
    pruned = [small[f"pruned {amount:.0%}"] for amount in transfer.SPARSITIES]
    assert [x.bytes_after for x in pruned] == sorted((x.bytes_after for x in pruned), reverse=True)
    for amount in transfer.TUNED_SPARSITIES:
        trained_on = small[f"pruned {amount:.0%}, trained on"]
        assert trained_on.bytes_after == small[f"pruned {amount:.0%}"].bytes_after, "zeros are kept"
        assert trained_on.steps == TINY.tune_steps and trained_on.learning > 0


def test_experts_are_followed_over_training(study):
    mixtures = [curve for curve in study[0].curves if curve.feature == EXPERTS]
    assert [curve.variant for curve in mixtures] == ["balance weight 0.01", "balance weight 0"]
    for curve in mixtures:
        assert len(curve.load) == len(curve.steps) == len(curve.bits) == transfer.POINTS
        assert all(1 / transfer.NUMBER_OF_EXPERTS <= load <= 1 for load in curve.load)
    assert all(not curve.load for curve in study[0].curves if curve.feature != EXPERTS)


def test_report_survives_its_file_and_is_shown(study, tmp_path, capsys):
    report, _, path = study
    again = TransferReport.load(path)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    command_line.main(["table", str(path)])
    assert capsys.readouterr().out == markdown(again) + "\n"
    assert all(f"| {x.variant} |" in markdown(report) for x in report.outcomes)


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "transfer", "format": 2}',
                                  '{"kind": "transfer", "format": 1, "outcomes": [{}]}'])
def test_damaged_reports_are_refused(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ReportError, match=r"broken\.json"):
        TransferReport.load(tmp_path / "broken.json")


def test_command_line(monkeypatch, tmp_path, capsys):
    given = []
    monkeypatch.setattr(transfer, "run", lambda settings, output, console: given.append((settings, output)))
    command_line.main(["transfer", "--steps", "9", "--tune-steps", "8", "--seeds", "3", "--output",
                       str(tmp_path / "x.json")])
    assert given == [(dataclasses.replace(transfer.Settings(), steps=9, tune_steps=8, seeds=3), tmp_path / "x.json")]
    for wrong in (["--steps", "1"], ["--seeds", "0"]):
        with pytest.raises(SystemExit) as stop:
            command_line.main(["transfer", *wrong])
        assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
