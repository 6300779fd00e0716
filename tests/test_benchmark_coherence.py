"""The comparison of the language model's options: what it trains, and its report."""

import dataclasses

import pytest
from benchmarking import MACHINE, printed

from benchmarks import __main__ as command_line
from benchmarks import coherence
from benchmarks.coherence_report import BASELINE, OPTIONS, CoherenceReport, Trained, grid, markdown, write_plot
from benchmarks.report import ReportError
from torus_model import ModelConfig, TorusLM
from torus_model.coherence import MEASURES
from torus_model.config import TrainConfig
from torus_model.dense import number_of_parameters

MODEL = ModelConfig(width=16, layers=2, heads=2, n_major=4, n_minor=6)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("to be or not to be, that is the question; " * 50)
    return TrainConfig(model=MODEL, steps=2, data=str(text), seq_len=24, validations=1, validation_windows=2,
                       coherence_every=1, backend="reference")


def made(option, seed, bits, value):
    point = {"step": 1, **{name: [value, value] for name in MEASURES}, "alpha_factor": []}
    return Trained(option, seed, 1000, (0, 1), (8.0, bits), (point,))


def report_of(config, *trained):
    return CoherenceReport(MACHINE, config.to_dict(), list(trained))


def test_options_are_fields_of_the_model_and_change_it():
    assert OPTIONS[BASELINE] == {}
    for option, fields in OPTIONS.items():
        if option != BASELINE:
            assert dataclasses.replace(MODEL, **fields) != MODEL


def test_differences_are_those_of_the_same_seed(config):
    report = report_of(config, made(BASELINE, 0, 4.0, 0.2), made("momentum", 1, 5.5, 0.5), made(BASELINE, 1, 5.0, 0.4),
                       made("momentum", 0, 4.25, 0.7), made("sinusoids", 7, 1.0, 1.0))
    baseline, momentum, sinusoids = grid(report).rows
    assert baseline[:4] == [BASELINE, "1,000", "4.500", "-"] and baseline[4:] == ["0.30"] * len(MEASURES)
    assert momentum[:4] == ["momentum", "1,000", "4.875", "+0.375 (+0.250 to +0.500)"]
    assert sinusoids[3] == "-", "no baseline with this seed"
    assert "range over 1.000 bits per byte" in markdown(report)


def test_runs_make_a_report_that_survives_its_file(config, tmp_path, capsys):
    path = tmp_path / "out" / "report.json"
    options = [BASELINE, "sinusoids"]
    text = printed(lambda console: coherence.run(config, options, seeds=2, output=path, console=console), width=200)
    assert "sinusoids, seed 1" in text and f"Written: {path}" in text
    for plot in (path.with_suffix(".png"), path.with_name("report-layers.png")):
        assert plot.stat().st_size > 10_000
    report = CoherenceReport.load(path)
    assert [(run.option, run.seed) for run in report.trained] == [(o, s) for s in (0, 1) for o in options]
    for run in report.trained:
        model = TorusLM(dataclasses.replace(MODEL, **OPTIONS[run.option]), backend="reference")
        assert run.parameters == number_of_parameters(model)
        assert run.steps == (0, 2) and [point.step for point in run.points()] == [1, 2]
        assert all(0 <= value <= 1 for point in run.points() for name in MEASURES for value in getattr(point, name))
    assert len({run.bits_per_byte for run in report.trained}) == 4
    report.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    command_line.main(["table", str(path)])
    assert capsys.readouterr().out == markdown(report) + "\n"


def test_a_plot_of_one_run_is_drawn(config, tmp_path):
    write_plot(report_of(config, made(BASELINE, 0, 4.0, 0.2)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "coherence", "format": 2}',
                                  '{"kind": "coherence", "format": 1, "trained": [{}]}'])
def test_damaged_reports_are_refused(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ReportError, match=r"broken\.json"):
        CoherenceReport.load(tmp_path / "broken.json")


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["--steps", "0"], 2), (["--options", "none"], 2)])
def test_command_line(argv, code, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(["coherence", *argv])
    assert exit_info.value.code == code
    assert "Traceback" not in capsys.readouterr().err
