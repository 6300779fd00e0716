"""The comparison on text: its bookkeeping, its table and its command, in a tiny setting."""

import dataclasses
import json
import shutil

import pytest
from rich.console import Console

from benchmarks import __main__, language, language_runs
from benchmarks.language import Comparison, Planned, Settings, settings_of
from benchmarks.language_report import ABLATIONS, LABELS, OURS, LanguageReport, verdicts
from benchmarks.language_runs import DENSE, FIRST, Trained, Training
from benchmarks.report import ReportError
from benchmarks.show import markdown_of
from benchmarks.timing import Timing
from torus_model.config import recommended_model
from torus_model.lm import ModelConfig

TRAINING = Training(validations=2, validation_tokens=64, test_tokens=128, max_bytes=20_000)
TINY = Settings(ModelConfig(width=16, heads=2, layers=2), contexts=(16, 32), tokens=16 * 8, training=TRAINING,
                seeds=(0, 1), networks=(OURS, DENSE, "loops"))


def compare(folder, settings=TINY, *, complete_only=False):
    comparison = Comparison(settings, folder / "runs")
    return language.run(comparison, seconds=0.0, retime=False, complete_only=complete_only,
                        output=folder / "language.json", console=Console(quiet=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("language")
    compare(made)
    return made


@pytest.fixture(scope="module")
def report(folder):
    return LanguageReport.load(folder / "language.json")


def test_report_comes_back_from_its_file(report, tmp_path):
    report.save(tmp_path / "deep" / "again.json")
    assert LanguageReport.load(tmp_path / "deep" / "again.json") == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "field", "format": 1}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"other\.json"):
        LanguageReport.load(path)


def test_every_run_is_made_once(report):
    made = [(t.network, t.context, t.budget, t.seed) for t in report.trained]
    assert len(set(made)) == len(made)
    assert set(made) == {
        (network, context, budget, seed)
        for seed in (0, 1) for context in (16, 32)
        for network, budget in ((OURS, "tokens"), (DENSE, "tokens"), (DENSE, "seconds"), ("loops", "tokens"))
        if context == 16 or network != "loops"
    }
    assert len({t.bits_per_byte for t in report.trained if t.budget == "tokens"}) == 10


def test_tokens_are_equal_and_parameters_within_one_percent(report):
    for context in (16, 32):
        ours, *_ = report.runs(OURS, context)
        for network in report.models:
            for trained in report.runs(network["network"], context):
                assert trained.steps * context == TINY.tokens
        dense, *_ = report.runs(DENSE, context)
        assert abs(dense.parameters - ours.parameters) <= 0.01 * ours.parameters


def test_validations_end_with_the_last_step(report):
    for trained in report.trained:
        assert trained.curve[-1][0] == trained.steps


def test_seconds_become_steps_by_the_times_of_a_step(tmp_path):
    comparison = Comparison(TINY, tmp_path)
    comparison.report.timings = {"torus@16": Timing((1.0, 2.0, 3.0), 0), "dense@16": Timing((4.0, 4.0, 9.0), 0)}
    assert comparison.steps(Planned(DENSE, 16, "tokens", 0)) == 8
    assert comparison.steps(Planned(DENSE, 16, "seconds", 0)) == 4
    assert comparison.steps(Planned(OURS, 16, "tokens", 0)) == 8


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_the_same_seed_sees_the_same_windows_whatever_the_network(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(language_runs, "training_step",
                        lambda model, optimizer, tokens, targets, clip: seen.append(tokens) or 1.0)
    comparison = Comparison(TINY, tmp_path)
    for network in (OURS, DENSE):
        list(comparison.runs.steps_of(network, comparison.models[network, 16], 16, seed=3, steps=4))
    assert all((one == other).all() for one, other in zip(seen[:4], seen[4:], strict=True))
    assert not (seen[0] == seen[1]).all()


def test_complete_runs_and_times_are_used_again(folder, report, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(language_runs, "training_step", refuse)
    again = compare(folder)
    assert again.trained == report.trained and again.timings == report.timings


def test_times_are_measured_anew_on_request_and_runs_of_about_as_many_steps_kept(folder, report, tmp_path):
    shutil.copytree(folder / "runs", tmp_path / "runs")
    comparison = Comparison(TINY, tmp_path / "runs")
    comparison.time_steps(0.0, language.silent, retime=True)
    assert comparison.report.timings != report.timings
    kept, *_ = report.runs(DENSE, 16, "seconds")
    runs, run = comparison.runs, (DENSE, comparison.models[DENSE, 16], 16, "seconds", kept.seed)
    assert runs.find(*run, kept.steps) == kept
    assert runs.find(*run, 2 * kept.steps) is None
    for change, same in (({"learning_rate": 1.0}, True), ({"other_learning_rates": {DENSE: 1.0}}, False)):
        runs.settings = dataclasses.replace(TRAINING, **change)
        assert (runs.find(*run, kept.steps) == kept) is same


def test_complete_runs_alone_on_request(folder, report, tmp_path, monkeypatch):
    monkeypatch.setattr(language_runs, "training_step", None)
    shutil.copytree(folder / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "torus-32-tokens-1")
    found = compare(tmp_path, complete_only=True).trained
    assert found == [t for t in report.trained if (t.network, t.context, t.seed) != (OURS, 32, 1)]
    with pytest.raises(ReportError, match="no complete run"):
        compare(tmp_path, dataclasses.replace(TINY, tokens=16 * 20), complete_only=True)


def test_another_setting_is_another_run(folder, report, tmp_path):
    shutil.copytree(folder / "runs", tmp_path / "runs")
    faster = dataclasses.replace(TINY, training=dataclasses.replace(TRAINING, learning_rate=1e-2), seeds=(0,),
                                 contexts=(16,), networks=(OURS,))
    found = compare(tmp_path, faster).trained
    assert found[0].bits_per_byte != report.runs(OURS, 16)[0].bits_per_byte


def test_ablations_leave_out_what_they_say():
    config = recommended_model(ModelConfig(width=64, heads=2), 2048)
    for name, change in ABLATIONS.items():
        left = dataclasses.replace(config, **change)
        assert left != config
        assert (left.compounding is False) == (name == "no-ema")
        assert any("spiral" in stream.name for stream in left.lattice.streams) == (name in ("no-cross", "no-ema"))
        assert any("cross" in stream.name for stream in left.lattice.streams) == (name in ("no-spirals", "no-ema"))


@pytest.mark.parametrize("context", [16, 32, 2048, 4096])
def test_lattices_hold_the_context(context):
    for make in (recommended_model, language.first_model):
        assert make(ModelConfig(), context).lattice.num_sites == context


def test_the_first_model_has_the_defaults_of_model_config():
    assert language.first_model(ModelConfig(), 256) == ModelConfig() != recommended_model(ModelConfig(), 256)


def test_table_and_verdicts_follow_from_the_runs(report, folder):
    shown = markdown_of(folder / "language.json")
    for network in TINY.networks:
        assert LABELS[network] in shown
    assert LABELS[FIRST] not in shown
    trained = [Trained(name, 16, budget, 0, 8, 100, ((8, bits),), bits)
               for name, budget, bits in ((OURS, "tokens", 2.0), (DENSE, "tokens", 1.6), (DENSE, "seconds", 2.5))]
    lines = verdicts(dataclasses.replace(report, trained=trained))
    assert lines == [
        "Context 16, equal tokens: the torus needs 25.0% more bits than dense attention (fewer from 0 of 1 seeds).",
        "Context 16, equal seconds: the torus needs 20.0% fewer bits than dense attention (fewer from 1 of 1 seeds).",
    ]


def test_plots_are_written(folder):
    for name in ("language.png", "language-ablations.png"):
        assert (folder / name).read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--networks", "dense"], "--networks must hold torus"),
    (["--contexts", "100"], "power of two"),
    (["--contexts", "4096", "--tokens", "1000"], "tokens must be at least"),
    (["--width", "20"], "width / heads"),
    (["--device", "nowhere"], "device"),
])
def test_command_refuses_in_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["language", "--runs", str(tmp_path), *arguments])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_command_line_makes_the_settings():
    given = __main__._parser().parse_args(["language", "--tokens", "8192", "--seeds", "3", "--contexts", "1024",
                                           "--networks", "dense", "torus", "--learning-rate", "0.01",
                                           "--budgets", "tokens"])
    settings = settings_of(given)
    assert (settings.tokens, settings.seeds, settings.contexts) == (8192, (0, 1, 2), (1024,))
    assert settings.budgets == ("tokens",)
    assert settings.networks == (OURS, DENSE) and settings.training.learning_rate == 0.01
    assert settings_of(__main__._parser().parse_args(["language"])) == Settings()


def test_timings_of_other_models_are_not_used(folder, tmp_path):
    file = tmp_path / "timings.json"
    file.write_text((folder / "runs" / "timings.json").read_text())
    key = json.loads(file.read_text())["key"]
    assert language._kept_timings(file, key) is not None
    assert language._kept_timings(file, key + "x") is None
    file.write_text("{")
    assert language._kept_timings(file, key) is None
