"""The comparison on periodic fields: its bookkeeping, its table and its command, in a tiny setting."""

import dataclasses

import pytest
import torch
from rich.console import Console

from benchmarks import __main__, field, field_report
from benchmarks.field import Comparison, Settings, edge_profile, settings_of
from benchmarks.field_report import LABELS, PUBLISHED, FieldReport
from benchmarks.report import ReportError
from benchmarks.show import markdown_of
from torus_model.field import NETWORKS, FieldConfig, FieldData, FieldTrainConfig, save_data

TINY = Settings(
    train=3, test=2,
    model=FieldConfig(grid=(16, 16), width=16, heads=2, layers=2, history=2, cross_radius=(1, 1), modes=3, window=2),
    training=FieldTrainConfig(epochs=2, batch_size=2), seeds=(0, 1), networks=("torus", "windows"),
)


def waves(trajectories=5, frames=12, side=16):
    """Waves that travel diagonally, each with a phase of its own."""
    x = torch.arange(side) / side * 2 * torch.pi
    phase = torch.arange(trajectories)[:, None, None, None] * 0.7
    time = torch.arange(frames)[None, :, None, None] * 0.4
    frames = (x[:, None] + 2 * x + phase - time).sin().float()[:, :, None].contiguous()
    return FieldData(frames, frames[:1, 0], parameters={"viscosity": 1e-5})


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("field")
    comparison = Comparison(TINY, waves(), folder / "runs")
    field.run(comparison, seconds=0.0, output=folder / "field.json", console=Console(quiet=True))
    return folder / "field.json"


@pytest.fixture(scope="module")
def report(output):
    return FieldReport.load(output)


def test_every_network_has_a_label():
    assert set(LABELS) == set(NETWORKS)


def test_report_comes_back_from_its_file(report, tmp_path):
    report.save(tmp_path / "deep" / "again.json")
    assert FieldReport.load(tmp_path / "deep" / "again.json") == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "gpu", "format": 1}', '{"kind": "field", "format": 1}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"other\.json"):
        FieldReport.load(path)


def test_all_networks_are_trained_from_all_seeds_alike(report):
    assert [(t.network, t.seed) for t in report.trained] == [(n, s) for s in (0, 1) for n in ("torus", "windows")]
    first, *others = (t.parameters for t in report.trained)
    assert all(abs(other - first) <= 0.03 * first for other in others)
    assert report.steps_per_epoch == 3 * (12 - 2) / 2
    assert all(len(t.losses) == 2 and t.losses[1] < t.losses[0] for t in report.trained)
    assert set(report.steps) == {"torus", "windows"}
    assert len({t.scores["one_step"] for t in report.trained}) == 4
    assert report.scores("torus", "equivariance_patches_float64")[0] < 1e-9
    assert report.scores("windows", "equivariance_patches_float64")[0] > 1e-6


def test_complete_runs_are_not_repeated_and_others_are(output, report, monkeypatch):
    trained = []
    monkeypatch.setattr(field, "train", lambda *args, **_: trained.append(args) or pytest.fail("trained again"))
    again = Comparison(TINY, waves(), output.parent / "runs")
    assert again.train("torus", 1, lambda _: None) == report.runs("torus")[1]
    assert not trained
    for changed, data in (
        (dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, learning_rate=2e-3)), waves()),
        (dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, ff_width=24)), waves()),
        (TINY, dataclasses.replace(waves(), frames=waves().frames * 1.5)),
    ):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            Comparison(changed, data, output.parent / "runs").train("torus", 1, lambda _: None)


def test_each_network_is_timed_by_its_own_steps(tmp_path, monkeypatch):
    comparison = Comparison(TINY, waves(), tmp_path)
    made = []
    step = field.FieldRun._step
    monkeypatch.setattr(field.FieldRun, "_step", lambda run, *batch: made.append(run.model) or step(run, *batch))
    comparison.time_steps(0.0, lambda _: None)
    models = list(dict.fromkeys(made))
    assert [type(model).__name__ for model in models] == ["TorusField", "WindowField"]
    assert len({made.count(model) for model in models}) == 1


def test_a_comparison_shorter_than_its_timing_ends(tmp_path):
    tiny = dataclasses.replace(TINY, train=1, test=1, training=dataclasses.replace(TINY.training, epochs=1))
    steps = Comparison(tiny, waves(), tmp_path).time_steps(0.0, lambda _: None)
    assert all(len(timing.seconds) == 5 for timing in steps.values())


def test_an_interrupted_run_is_continued(tmp_path, monkeypatch):
    training = dataclasses.replace(TINY.training, checkpoint_epochs=1)
    settings = dataclasses.replace(TINY, training=training, seeds=(0,), networks=("torus",))
    whole = Comparison(settings, waves(), tmp_path / "whole").train("torus", 0, lambda _: None)
    epochs = []

    def interrupt(epoch):
        epochs.append(epoch)
        if epoch.startswith("epoch 1 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Comparison(settings, waves(), tmp_path / "cut").train("torus", 0, interrupt)
    later = []
    assert Comparison(settings, waves(), tmp_path / "cut").train("torus", 0, later.append) == whole
    assert not any(line.startswith("epoch 0 ") for line in later)


def test_the_topology_is_that_of_the_data(tmp_path):
    data = dataclasses.replace(waves(), parameters={"topology": "cylinder"})
    assert Comparison(TINY, data, tmp_path).models["torus"].topology == "cylinder"


def test_table(report, output):
    head, _, ours, windows, unchanged, *_ = markdown_of(output).splitlines()
    assert head.startswith("| network | parameters | relative L2, one step |")
    assert ours.startswith(f"| {LABELS['torus']} | {report.trained[0].parameters:,} | ")
    assert "s (" in windows.rpartition("|")[0].rpartition("|")[2]
    assert unchanged.startswith("| no change (last frame) | 0 | ")
    cells = [cell.strip() for cell in windows.strip("|").split("|")]
    for cell, name in zip(cells[2:6], ("one_step", "rollout", "seam_one_step", "seam_rollout"), strict=True):
        low, high = sorted(report.scores("windows", name))
        digits = 2 if name.startswith("seam") else 3
        assert cell == f"{(low + high) / 2:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
    by_patches, by_points = (report.scores("torus", f"equivariance_{kind}") for kind in ("patches", "points"))
    assert max(by_patches) < 1e-4 < min(by_points)
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert "e-" in cells[6] and cells[7].startswith(f"{sum(by_points) / 2:.2f}")


def test_the_note_says_what_is_compared(report):
    note = field_report.describe(report)
    assert "2 seeds" in note and "Fourier operator:" not in note
    assert all(f"{name} {value:.4f}" in note for name, value in PUBLISHED.items())
    other = dataclasses.replace(report, data={"viscosity": 1e-3})
    assert "FNO" not in field_report.describe(other)


def test_plots_are_written(output):
    for suffix in (".png", "-errors.png", "-maps.png"):
        assert output.with_name(f"{output.stem}{suffix}").stat().st_size > 10_000


def test_edge_profile_finds_a_seam():
    error = torch.ones(12, 8)
    assert edge_profile(error, 2) == pytest.approx([1, 1])
    assert len(edge_profile(error, 1)) == 4
    error[:2] = error[-2:] = error[:, :2] = error[:, -2:] = 2
    outer, inner = edge_profile(error, 2)
    assert outer == pytest.approx(2 * inner) and inner < 1


def parsed(*options):
    given = __main__._parser().parse_args(["field", *options])
    return settings_of(given)


def test_options(monkeypatch):
    assert parsed() == dataclasses.replace(
        field.CPU, training=dataclasses.replace(
            field.CPU.training, train_trajectories=field.CPU.train, test_trajectories=field.CPU.test,
        ),
    )
    full = parsed("--full", "--device", "cpu")
    assert (full.train, full.test, full.task.solve_resolution) == (1000, 200, 256) and full.training.augment
    assert parsed("--epochs", "3").training.epochs == 3
    assert parsed("--train", "7", "--test", "2").task.trajectories == 9
    assert parsed("--width", "32").model.width == 32
    assert parsed("--seeds", "3").seeds == (0, 1, 2)
    assert parsed("--networks", "unet", "torus").networks == ("torus", "unet")
    assert parsed("--viscosity", "1e-3").task.viscosity == 1e-3
    assert parsed("--initial", "paper").task.initial == "paper" != parsed().task.initial
    assert parsed("--augment").training.augment and not parsed().training.augment
    monkeypatch.setattr(field, "check_device", lambda name: name)
    assert parsed("--device", "cuda").training.device == parsed("--full").training.device == "cuda"
    assert parsed().training.device == "cpu"


def test_user_errors_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.environment.restart_with_warm_memory", lambda: None)

    def fails(*options):
        with pytest.raises(SystemExit) as stop:
            __main__.main(["field", "--runs", str(tmp_path), *options])
        assert stop.value.code in (1, 2)
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("python -m benchmarks")
        return message

    assert "width" in fails("--width", "33")
    assert "viscosity" in fails("--viscosity", "-1")
    assert "device" in fails("--device", "abacus")
    assert "nowhere" in fails("--data", "nowhere.safetensors")
    assert "--networks" in fails("--networks", "perceptron")
    assert "--viscosity" in fails("--data", "some.safetensors", "--viscosity", "1e-3")
    assert "--forcing" in fails("--forcing", "classical")
    if not torch.cuda.is_available():
        assert "cuda" in fails("--full")
    save_data(tmp_path / "narrow.safetensors", FieldData(torch.randn(5, 12, 1, 6, 16)))
    assert "grid" in fails("--data", str(tmp_path / "narrow.safetensors"), "--train", "3", "--test", "2")
