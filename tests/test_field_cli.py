"""``python -m torus_model field``."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import model_runs
import numpy as np
import pytest
import torch
from fields import travelling_waves
from PIL import Image

from torus_model.__main__ import main
from torus_model.field import FieldConfig
from torus_model.field.commands import evaluate as evaluate_command
from torus_model.field.commands import rollout as rollout_command
from torus_model.field.commands import train as train_command
from torus_model.field.data import load_data, save_data, split
from torus_model.field.navier_stokes import classical_forcing
from torus_model.field.train import FieldTrainConfig, resumable_configs
from torus_model.run import TrainingError

TINY = ["--history", "2", "--patch", "2", "--width", "8", "--layers", "1", "--heads", "1", "--cross-radius", "1", "2",
        "--backend", "reference", "--test-trajectories", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of data, and a run of one epoch on the first of them."""
    path = tmp_path_factory.mktemp("field")
    data = travelling_waves(6, 6, static=True)
    save_data(path / "waves.safetensors", data)
    save_data(path / "other.safetensors", travelling_waves(3, 6, seed=1, static=True))
    save_data(path / "cylinder.safetensors", dataclasses.replace(data, parameters={"topology": "cylinder"}))
    torch.manual_seed(0)
    field("train", "--data", path / "waves.safetensors", "--output", path / "run", "--epochs", 1, *TINY)
    return path


def field(*arguments):
    main(["field", *map(str, arguments)])


def fails_in_one_line(capsys, *arguments):
    return model_runs.fails_in_one_line(capsys, "field", *arguments)


@pytest.fixture
def trained(folder, monkeypatch):
    """What ``train`` would be called with."""
    calls = []

    class Stop(Exception):
        pass

    def record(config, model_config, data, run_dir, *, resume):
        calls.append((config, model_config, data, str(run_dir), resume))
        raise Stop

    monkeypatch.setattr(train_command, "train", record)

    def call(*arguments, data="waves.safetensors", output="elsewhere"):
        with pytest.raises(Stop):
            field("train", "--data", folder / data, "--output", folder / output, *arguments)
        return calls[-1]

    return call


def test_commands_are_listed(capsys):
    for arguments, names in ((["--help"], ["train", "generate", "field"]),
                             (["field", "--help"], ["generate", "train", "evaluate", "rollout"])):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert all(f"\n    {name} " in shown for name in names)


@pytest.mark.parametrize("command", ["generate", "train", "evaluate", "rollout"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        field(command, "--help")
    assert caught.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_program_runs_as_a_module(folder):
    """In a process of its own: with the restart, the exit status and the real streams."""
    done = subprocess.run(
        [sys.executable, "-m", "torus_model", "field", "evaluate", "--checkpoint", folder, "--data", "nowhere"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("python -m torus_model: error: no checkpoint at")
    assert done.stderr.count("\n") == 1


def test_defaults_are_those_of_the_configurations(trained, folder):
    config, model, data, run_dir, resume = trained("--history", 2, "--patch", 2)
    assert config == FieldTrainConfig(epochs=train_command.DEFAULT_EPOCHS)
    assert model == FieldConfig(grid=(8, 8), static_channels=1, history=2, patch=2)
    assert torch.equal(data.frames, load_data(folder / "waves.safetensors").frames)
    assert run_dir == str(folder / "elsewhere")
    assert not resume


TRAINING_OPTIONS = {
    "epochs": (["--epochs", "3"], 3), "seconds": (["--seconds", "2.5"], 2.5),
    "train_trajectories": (["--train-trajectories", "3"], 3), "test_trajectories": (["--test-trajectories", "2"], 2),
    "batch_size": (["--batch-size", "3"], 3), "learning_rate": (["--learning-rate", "0.5"], 0.5),
    "warmup": (["--warmup", "0.5"], 0.5), "final_learning_rate": (["--final-learning-rate", "0.5"], 0.5),
    "weight_decay": (["--weight-decay", "0.5"], 0.5), "clip": (["--clip", "0.5"], 0.5),
    "unroll": (["--unroll", "3"], 3), "augment": (["--augment"], True), "seed": (["--seed", "7"], 7),
    "backend": (["--backend", "reference"], "reference"), "device": (["--device", "cpu:0"], "cpu:0"),
    "checkpoint_epochs": (["--checkpoint-epochs", "4"], 4),
}
MODEL_OPTIONS = {
    "network": (["--network", "unet"], "unet"), "history": (["--history", "3"], 3), "patch": (["--patch", "1"], 1),
    "width": (["--width", "64"], 64), "layers": (["--layers", "3"], 3), "heads": (["--heads", "3"], 3),
    "ff_width": (["--ff-width", "24"], 24), "topology": (["--topology", "cylinder"], "cylinder"),
    "winding": (["--winding", "3"], 3), "cross_radius": (["--cross-radius", "2", "3"], (2, 3)),
    "streams": (["--streams", "major_forward,cross_u_to_v"], ("major_forward", "cross_u_to_v")),
    "token_gated": (["--no-token-gated"], False), "window": (["--window", "2"], 2), "modes": (["--modes", "3"], 3),
    "dropout": (["--dropout", "0.5"], 0.5),
}
FROM_THE_DATA = {"grid", "channels", "static_channels"}


def test_every_setting_has_an_option():
    assert set(TRAINING_OPTIONS) == {f.name for f in dataclasses.fields(FieldTrainConfig)}
    assert set(MODEL_OPTIONS) | FROM_THE_DATA == {f.name for f in dataclasses.fields(FieldConfig)}


@pytest.mark.parametrize("name", [*TRAINING_OPTIONS, *MODEL_OPTIONS])
def test_option_of_a_setting_changes_it_alone(name, trained):
    arguments, expected = (TRAINING_OPTIONS | MODEL_OPTIONS)[name]
    base = ["--history", "2", "--patch", "2"]
    default, given = trained(*base), trained(*base, *arguments)
    changed = [
        f.name for old, new in zip(default[:2], given[:2], strict=True) for f in dataclasses.fields(old)
        if getattr(old, f.name) != getattr(new, f.name)
    ]
    assert set(changed) - {"epochs"} == {name} - {"epochs"}
    assert getattr(given[name in MODEL_OPTIONS], name) == expected


def test_topology_of_the_data_is_the_default(trained):
    base = ["--history", "2", "--patch", "2"]
    assert trained(*base, data="cylinder.safetensors")[1].topology == "cylinder"
    assert trained(*base, "--topology", "periodic", data="cylinder.safetensors")[1].topology == "periodic"


def test_resumed_run_keeps_its_configuration_but_for_what_may_change(trained, folder):
    before = resumable_configs(folder / "run")
    config, model, _, run_dir, resume = trained("--resume", output="run")
    assert ((config, model), run_dir, resume) == (before, str(folder / "run"), True)
    config, model, *_ = trained("--resume", "--seconds", "3", "--backend", "cpu", output="run")
    assert model == before[1]
    assert config == dataclasses.replace(before[0], epochs=None, seconds=3.0, backend="cpu")


def test_run_is_overwritten_on_demand_alone(trained, folder, capsys):
    assert "--overwrite" in fails_in_one_line(
        capsys, "train", "--data", folder / "waves.safetensors", "--output", folder / "run", *TINY
    )
    assert trained("--overwrite", *TINY, output="run")[4] is False


def test_training_evaluation_and_rollout(folder, capsys):
    assert {"checkpoint.safetensors", "history.json", "history.png"} <= {p.name for p in (folder / "run").iterdir()}
    common = ["--checkpoint", folder / "run", "--data", folder / "waves.safetensors", "--backend", "reference"]
    field("evaluate", *common)
    shown = capsys.readouterr().out
    written = json.loads((folder / "run" / "evaluation.json").read_text())
    assert shown.startswith("torus on the 2 trajectories of the file that its run tested on\n")
    for name in ("one_step", "rollout", "persistence_one_step", "persistence_rollout", "seam_one_step"):
        assert f"{written[name]:.4f}" in shown, name
        assert math.isfinite(written[name])
    assert written["model_config"]["width"] == 8
    for name in ("error-map.png", "errors-over-time.png"):
        assert (folder / "run" / name).read_bytes().startswith(b"\x89PNG")

    field("rollout", *common, "--trajectory", 1)
    assert "over 4 steps of trajectory 1" in capsys.readouterr().out
    for name in ("rollout.png", "rollout-error.png"):
        assert (folder / "run" / name).read_bytes().startswith(b"\x89PNG")
    with Image.open(folder / "run" / "rollout.gif") as image:
        assert image.n_frames == 4


@pytest.fixture
def evaluated(folder, monkeypatch, tmp_path):
    """The model, the data and the options that ``evaluate`` works with, and the folder that it writes to."""
    calls = []
    evaluate = evaluate_command.evaluate

    def record(model, data, **options):
        calls.append((model, data, options))
        return evaluate(model, data, **options)

    monkeypatch.setattr(evaluate_command, "evaluate", record)
    for name in ("write_error_maps", "write_errors_over_time"):
        monkeypatch.setattr(evaluate_command, name, lambda *args: None)

    def call(*arguments, data="waves.safetensors"):
        field("evaluate", "--checkpoint", folder / "run", "--data", folder / data, "--output", tmp_path, *arguments)
        return calls[-1]

    return call


def test_evaluation_is_of_what_was_not_trained_on(evaluated, folder):
    _, data, options = evaluated()
    assert torch.equal(data.frames, split(load_data(folder / "waves.safetensors"), 4, 2)[1].frames)
    assert options == {"batch_size": 8, "seed": 0, "progress": True}
    assert len(evaluated(data="other.safetensors")[1]) == 3  # all of another file


def test_options_of_the_evaluation(evaluated, tmp_path):
    model, data, options = evaluated("--trajectories", 3, "--batch-size", 2, "--seed", 5, "--backend", "reference")
    assert len(data) == 3
    assert (options["batch_size"], options["seed"]) == (2, 5)
    assert model.network.blocks[0].attention.backend == "reference"
    assert (tmp_path / "evaluation.json").exists()


@pytest.fixture
def drawn(folder, monkeypatch, tmp_path):
    """What ``rollout`` draws, and the folder that it writes to."""
    calls = {}
    for name in ("write_rollout", "write_animation", "write_errors_over_time"):
        monkeypatch.setattr(rollout_command, name, lambda path, *args, name=name: calls.update({name: (path, *args)}))

    def call(*arguments):
        field("rollout", "--checkpoint", folder / "run", "--data", folder / "waves.safetensors", "--output", tmp_path,
              *arguments)
        return calls

    return call


def test_rollout_is_of_the_last_trajectory_unless_told(drawn, folder, tmp_path):
    frames = load_data(folder / "waves.safetensors").frames
    path, truth, predicted, steps, topology = drawn()["write_rollout"]
    assert path == tmp_path / "rollout.png"
    assert torch.equal(truth, frames[5, 2:, 0])
    assert predicted.shape == truth.shape
    assert (steps, topology) == ([1, 2, 3, 4], "periodic")
    calls = drawn("--trajectory", 2, "--steps", 2, 4, "--frames-per-second", 7, "--channel", 0)
    assert torch.equal(calls["write_rollout"][1], frames[2, 2:, 0])
    assert calls["write_rollout"][3] == [2, 4]
    assert calls["write_animation"][-1] == 7
    errors = calls["write_errors_over_time"][1]
    expected = [((frames[2, 1] - f).norm() / f.norm()).item() for f in frames[2, 2:]]
    assert errors["persistence"] == pytest.approx(expected, rel=1e-5)


def test_mistakes_are_one_line(folder, capsys, tmp_path):
    data, run = folder / "waves.safetensors", folder / "run"
    (tmp_path / "text.safetensors").write_text("no")
    for arguments, expected in (
        (["train"], "--data"),
        (["train", "--data", folder / "nowhere.safetensors"], "no file at"),
        (["train", "--data", tmp_path / "text.safetensors"], "cannot be read"),
        (["train", "--data", data, "--forcing", "classical"], "forcing"),
        (["train", "--data", data, "--epochs", 1, "--seconds", 1], "not allowed with"),
        (["train", "--data", data, "--history", 2, "--patch", 2, "--network", "windows", "--window", 3], "window"),
        (["train", "--data", data, "--history", 2, "--patch", 2, "--network", "fourier", "--modes", 40], "modes"),
        (["train", "--data", data, "--network", "nothing"], "invalid choice"),
        (["train", "--data", data, *TINY, "--heads", 3], "width / heads"),
        (["train", "--data", data, *TINY, "--history", 9], "frames a trajectory"),
        (["train", "--data", data, *TINY, "--unroll", 9], "frames a trajectory"),
        (["train", "--data", data, *TINY, "--clip", 0], "clip"),
        (["train", "--data", data, *TINY, "--streams", "none"], "none"),
        (["train", "--data", data, *TINY, "--device", "nowhere"], "device"),
        (["train", "--data", data, *TINY, "--device", "meta:0", "--train-trajectories", 9], "train and test"),
        (["train", "--data", data, "--output", run, "--resume", "--width", 16], "keeps its model"),
        (["train", "--data", data, "--output", run, "--resume", "--clip", 0.5], "clip"),
        (["train", "--data", folder / "other.safetensors", "--output", run, "--resume"], "other data"),
        (["train", "--data", data, "--output", folder, "--resume"], "no checkpoint"),
        (["evaluate", "--checkpoint", folder, "--data", data], "no checkpoint"),
        (["evaluate", "--checkpoint", data, "--data", data], "not a checkpoint"),
        (["evaluate", "--checkpoint", run, "--data", data, "--trajectories", 7], "from 1 to the 6"),
        (["evaluate", "--checkpoint", run, "--data", data, "--batch-size", 0], "--batch-size"),
        (["evaluate", "--checkpoint", run, "--data", data, "--device", "nowhere"], "device"),
        (["rollout", "--checkpoint", run, "--data", data, "--trajectory", 6], "--trajectory must be from 0 to 5"),
        (["rollout", "--checkpoint", run, "--data", data, "--channel", 1], "--channel"),
        (["rollout", "--checkpoint", run, "--data", data, "--steps", 5], "--steps must be from 1 to 4"),
        (["rollout", "--checkpoint", run, "--data", data, "--frames-per-second", 0], "--frames-per-second"),
    ):
        output = [] if "--output" in arguments or arguments == ["train"] else ["--output", tmp_path / "new"]
        assert expected in fails_in_one_line(capsys, *arguments, *output), arguments


def test_failed_training_is_one_line(folder, capsys, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise TrainingError("the loss\nbecame nan")

    monkeypatch.setattr(train_command, "train", broken)
    assert "loss became nan" in fails_in_one_line(
        capsys, "train", "--data", folder / "waves.safetensors", "--output", tmp_path, *TINY
    )


def test_public_files_get_their_forcing_by_name(trained, folder):
    np.save(folder / "public.npy", np.random.default_rng(0).normal(size=(6, 8, 8, 6)).astype(np.float32))
    base = ["--history", "2", "--patch", "2"]
    assert trained(*base, data="public.npy")[2].static is None
    _, model, data, *_ = trained(*base, "--forcing", "classical", data="public.npy")
    assert torch.equal(data.static[0, 0], classical_forcing(8).float())
    assert model.static_channels == 1
