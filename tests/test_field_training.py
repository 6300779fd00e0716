"""Training of field models: it learns, moves every parameter, and goes on exactly where it stopped."""

import dataclasses
import json

import pytest
import torch
from fields import travelling_waves
from model_runs import Interrupted, interrupt_at, parameters_of
from safetensors.torch import load_file
from torch import nn

import torus_model.field.run as run_module
from torus_model import ModelConfig, TorusLM
from torus_model.checkpoint import CheckpointError, model_tensors, save
from torus_model.field import FieldConfig
from torus_model.field.data import FieldDataError, Windows, split
from torus_model.field.evaluate import evaluate
from torus_model.field.losses import relative_l2
from torus_model.field.networks import NETWORKS
from torus_model.field.run import FieldRun, augment
from torus_model.field.train import FieldTrainConfig, load_field_model, resumable_configs, train
from torus_model.optimizer import make_optimizer
from torus_model.run import TrainingError
from torus_model.schedules import learning_rate_factor

MODEL = FieldConfig(grid=(8, 8), history=2, patch=2, width=16, layers=2, heads=2, cross_radius=(1, 2), modes=3)


@pytest.fixture(scope="module")
def data():
    return travelling_waves(8, 6)


def make_config(**changes):
    fields = {"epochs": 4, "test_trajectories": 2, "batch_size": 5, "learning_rate": 1e-2, "backend": "reference"}
    return FieldTrainConfig(**fields | changes)


def test_trained_model_beats_persistence_and_every_parameter_moves(data, tmp_path):
    config = make_config(epochs=30)
    start = parameters_of(FieldRun(config, MODEL, data).model)
    result = train(config, MODEL, data, tmp_path, progress=False)
    scores = evaluate(result.model, split(data, 6, 2)[1])
    assert scores.one_step == pytest.approx(result.test_error, rel=1e-5)
    assert result.history.epochs[0].test_error == pytest.approx(scores.persistence_one_step, rel=1e-5)
    assert scores.one_step < 0.4 * scores.persistence_one_step
    assert scores.rollout < 0.5 * scores.persistence_rollout
    for name, p in result.model.named_parameters():
        assert not torch.equal(p, start[name]), name


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_weights_of_linear_maps_decay_in_every_network_and_nothing_else(network, data):
    model = dataclasses.replace(MODEL, network=network, window=2)
    run = FieldRun(make_config(weight_decay=0.5), model, data)
    decay = {n: g["weight_decay"] for g in run.optimizer.param_groups for n in g["param_names"]}
    assert set(decay) == {name for name, _ in run.model.named_parameters()}
    for name, parameter in run.model.named_parameters():
        is_gain = parameter.ndim < 2 or name.endswith(("raw_decay", "stream_logits"))
        assert decay[name] == (0.0 if is_gain else 0.5), name


def batches_seen(run):
    seen = []
    step = run._step

    def watched(*batch):
        seen.append(batch)
        return step(*batch)

    run._step = watched
    for _ in range(2):
        for _ in run.epoch():
            pass
    return seen


def test_epoch_passes_every_window_once_in_an_order_of_its_own(data):
    run = FieldRun(make_config(), MODEL, data)
    seen = batches_seen(run)
    assert len(seen) == 2 * run.steps_per_epoch == 2 * 5  # 6 trajectories of 4 windows, 5 a batch
    assert [len(history) for history, *_ in seen[:5]] == [5, 5, 5, 5, 4]
    windows = Windows(split(data, 6, 2)[0], 2)
    everything = [torch.cat((h, t), 1) for h, _, t in (windows.gather(torch.tensor([i])) for i in range(24))]
    order = [
        next(i for i, window in enumerate(everything) if torch.equal(window[0], torch.cat((h, t))))
        for history, _, target in seen for h, t in zip(history, target, strict=True)
    ]
    first, second = order[:24], order[24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != sorted(first)


def test_loss_is_relative_l2_over_the_unrolled_steps(data):
    run = FieldRun(make_config(unroll=3, batch_size=100), MODEL, data)
    for p in run.model.parameters():
        nn.init.normal_(p, std=0.1)
    history, _, target = run.windows.gather(torch.arange(len(run.windows)))
    assert target.shape[1] == 3
    with torch.no_grad():
        steps = run.model.rollout(history, 3)
        expected = torch.stack([relative_l2(steps[:, i], target[:, i]) for i in range(3)]).mean().item()
    assert next(run.epoch()) == pytest.approx(expected, rel=1e-5)


def test_gradient_passes_through_the_unrolled_steps(data, monkeypatch):
    run = FieldRun(make_config(unroll=2), MODEL, data)
    rollout = run.model.rollout
    outputs = []

    def watched(*args):
        outputs.append(rollout(*args))
        return outputs[-1]

    monkeypatch.setattr(run.model, "rollout", watched)
    nn.init.normal_(run.model.network.head.weight)
    next(run.epoch())
    weight = run.model.network.head.weight
    assert outputs[0].shape[1] == 2
    assert weight.grad.abs().max() > 0
    history, _, _ = run.windows.gather(torch.arange(2))
    history.requires_grad_()
    late = run.model.rollout(history, 2)[:, 1].sum()
    assert torch.autograd.grad(late, history)[0][:, 0].abs().max() > 0  # the oldest frame is gone in the second step


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradient_is_clipped_to_its_norm(data, clip):
    run = FieldRun(make_config(clip=clip), MODEL, data)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    start = parameters_of(run.model)
    next(run.epoch())
    moved = torch.stack([(p.detach() - start[n]).norm() for n, p in run.model.named_parameters()]).norm().item()
    if clip < 1:
        assert moved == pytest.approx(clip, rel=1e-3)
    else:
        assert 1e-2 < moved < clip


@pytest.mark.parametrize("flag", [False, True])
def test_augmentation_is_a_setting(data, flag, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_module, "augment", lambda *args: drawn.append(args) or augment(*args))
    run = FieldRun(make_config(augment=flag), MODEL, data)
    next(run.epoch())
    assert bool(drawn) == flag


def test_augmentation_changes_what_is_learnt(data, tmp_path):
    def losses(flag):
        return train(make_config(augment=flag, epochs=2), MODEL, data, tmp_path, progress=False).history.losses

    assert losses(False) == losses(False)
    assert losses(True) == losses(True)
    assert losses(True) != losses(False)


def test_schedule_follows_the_budget_of_epochs(data):
    run = FieldRun(make_config(epochs=2, warmup=0.5, final_learning_rate=0.2), MODEL, data)
    rates = []
    for _ in range(2):
        rates.append(run.optimizer.param_groups[0]["lr"])
        for _ in run.epoch():
            rates.append(run.optimizer.param_groups[0]["lr"])
        rates.pop()
    assert rates == pytest.approx([1e-2 * learning_rate_factor(i / 10, 0.5, 0.2) for i in range(10)])


def test_schedule_and_end_follow_the_budget_of_seconds(data, tmp_path, monkeypatch):
    clock = [0.0]

    def tick():
        clock[0] += 0.5
        return clock[0]

    monkeypatch.setattr(run_module.time, "perf_counter", tick)  # a step takes half a second, all else nothing
    config = make_config(epochs=None, seconds=3.5, warmup=0.5)
    run = FieldRun(config, MODEL, data)
    rates = [run.optimizer.param_groups[0]["lr"]]
    rates += [run.optimizer.param_groups[0]["lr"] for _ in run.epoch()]
    assert rates == pytest.approx([1e-2 * learning_rate_factor(i / 7, 0.5, 0.01) for i in range(6)])
    history = train(config, MODEL, data, tmp_path, progress=False).history
    assert len(history.losses) == 7
    assert [(p.epoch, p.step, p.seconds) for p in history.epochs] == [(0, 0, 0), (1, 5, 2.5), (1.4, 7, 3.5)]
    assert history.epochs[-1].test_error is not None


def test_history_has_the_mean_loss_of_each_epoch(data, tmp_path):
    result = train(make_config(epochs=3, checkpoint_epochs=2), MODEL, data, tmp_path, progress=False)
    losses, epochs = result.history.losses, result.history.epochs
    assert [p.training_loss for p in epochs[1:]] == pytest.approx(
        [sum(losses[i:i + 5]) / 5 for i in (0, 5, 10)]
    )
    assert epochs[0].training_loss is None
    assert [p.test_error is not None for p in epochs] == [True, False, True, True]  # every second, and the last
    assert result.test_error == epochs[-1].test_error
    assert result.seconds_per_epoch == pytest.approx(epochs[-1].seconds / 3)


def test_interrupted_run_goes_on_exactly(tmp_path):
    data = travelling_waves(8, 6, static=True)
    model = dataclasses.replace(MODEL, dropout=0.2, static_channels=1)
    config = make_config(augment=True, unroll=2)
    whole = train(config, model, data, tmp_path / "whole", progress=False)
    with pytest.raises(Interrupted):
        train(config, model, data, tmp_path / "parts", progress=False, on_epoch=interrupt_at(epoch=2))
    torch.manual_seed(99)  # nothing may depend on the process that continues
    torch.rand(7)
    resumed = train(config, model, data, tmp_path / "parts", resume=True, progress=False)
    assert resumed.history.losses == whole.history.losses
    assert len(set(whole.history.losses)) == len(whole.history.losses)

    def curve(result):
        return [dataclasses.replace(point, seconds=0) for point in result.history.epochs]

    assert curve(resumed) == curve(whole)
    assert [point.epoch for point in curve(whole)] == [0, 1, 2, 3, 4]
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, whole.model.get_parameter(name)), name
    seconds = [point.seconds for point in resumed.history.epochs]
    assert seconds == sorted(seconds)


def test_same_seed_same_losses(data, tmp_path):
    def losses(seed):
        return train(make_config(epochs=1, seed=seed), MODEL, data, tmp_path, progress=False).history.losses

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_training_leaves_the_global_random_state_alone(data, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train(make_config(epochs=1), MODEL, data, tmp_path, progress=False)
    assert torch.equal(torch.rand(1), expected)


def test_finished_run_can_be_extended(data, tmp_path):
    train(make_config(epochs=1), MODEL, data, tmp_path, progress=False)
    config, model = resumable_configs(tmp_path)
    assert (config, model) == (make_config(epochs=1), MODEL)
    result = train(dataclasses.replace(config, epochs=2), model, data, tmp_path, resume=True, progress=False)
    assert [point.epoch for point in result.history.epochs] == [0, 1, 2]
    again = train(dataclasses.replace(config, epochs=2), model, data, tmp_path, resume=True, progress=False)
    assert again.history == result.history


def test_resume_refuses_another_run(data, tmp_path):
    config = make_config(epochs=1)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(config, MODEL, data, tmp_path / "empty", resume=True, progress=False)
    train(config, MODEL, data, tmp_path, progress=False)
    for changes, model, other, name in (
        ({"learning_rate": 1e-3}, MODEL, data, "learning_rate"),
        ({"unroll": 2}, MODEL, data, "unroll"),
        ({}, dataclasses.replace(MODEL, token_gated=False), data, "token_gated"),
        ({}, MODEL, travelling_waves(8, 6, seed=1), "other data"),
    ):
        with pytest.raises(CheckpointError, match=name):
            train(dataclasses.replace(config, **changes), model, other, tmp_path, resume=True, progress=False)


def test_checkpoint_without_the_optimizer_is_refused(data, tmp_path):
    config = make_config(epochs=1)
    result = train(config, MODEL, data, tmp_path, progress=False)
    run = FieldRun(config, MODEL, data)
    run.restore(result.checkpoint)
    run.optimizer = make_optimizer(run.model, 1e-2, 0.0)
    run.save(result.checkpoint)
    with pytest.raises(CheckpointError, match="optimizer state"):
        train(config, MODEL, data, tmp_path, resume=True, progress=False)


def test_model_survives_the_checkpoint(data, tmp_path):
    result = train(make_config(epochs=1), MODEL, data, tmp_path, progress=False)
    history, _, _ = Windows(data, 2).gather(torch.arange(3))
    for path in (tmp_path, result.checkpoint):
        loaded = load_field_model(path, backend="reference")
        assert not loaded.training
        assert loaded.config == MODEL
        with torch.no_grad():
            assert torch.equal(loaded(history), result.model(history))
    scale = split(data, 6, 2)[0].frames.square().mean().sqrt().item()
    assert loaded.frame_scale.item() == pytest.approx(scale, rel=1e-5)


def test_checkpoint_of_a_language_model_is_refused(tmp_path):
    config = ModelConfig(width=8, layers=1, heads=1, n_major=2, n_minor=2)
    save(tmp_path / "checkpoint.safetensors", model_tensors(TorusLM(config)), {"model_config": config.to_dict()})
    for load in (load_field_model, resumable_configs):
        with pytest.raises(CheckpointError, match="does not hold"):
            load(tmp_path)


def test_checkpoint_is_replaced_atomically(data, tmp_path, monkeypatch):
    config = make_config()
    with pytest.raises(Interrupted):
        train(config, MODEL, data, tmp_path, progress=False, on_epoch=interrupt_at(epoch=1))
    before, files = load_file(tmp_path / "checkpoint.safetensors"), sorted(tmp_path.iterdir())

    def write_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("torus_model.checkpoint.save_file", write_half)
    with pytest.raises(OSError, match="disk full"):
        train(config, MODEL, data, tmp_path, resume=True, progress=False)
    assert sorted(tmp_path.iterdir()) == files
    after = load_file(tmp_path / "checkpoint.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_history_and_plot_are_written(data, tmp_path):
    config = make_config(epochs=2)
    result = train(config, MODEL, data, tmp_path, progress=False)
    written = json.loads(result.history_file.read_text())
    assert {name: written[name] for name in ("losses", "epochs")} == result.history.to_dict()
    assert FieldTrainConfig.from_dict(written["train_config"]) == config
    assert FieldConfig.from_dict(written["model_config"]) == MODEL
    assert result.plot_file.read_bytes().startswith(b"\x89PNG")


def test_test_trajectories_are_not_trained_on(data, tmp_path):
    hidden = data.frames.clone()
    hidden[-2:] *= 5
    other = dataclasses.replace(data, frames=hidden)
    a, b = (train(make_config(epochs=1), MODEL, d, tmp_path, progress=False) for d in (data, other))
    assert a.history.losses == b.history.losses
    assert a.model.frame_scale == b.model.frame_scale
    assert a.test_error != b.test_error


def test_trajectories_are_split_as_configured():
    assert make_config(test_trajectories=None).trajectories(12) == (10, 2)
    assert make_config(test_trajectories=None).trajectories(3) == (2, 1)
    assert make_config(train_trajectories=3, test_trajectories=4).trajectories(12) == (3, 4)


def test_progress_goes_to_stderr(data, tmp_path, capsys):
    train(make_config(epochs=1), MODEL, data, tmp_path)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "parameters" in shown.err
    assert shown.err.count("relative L2 error") == 2
    train(make_config(epochs=1), MODEL, data, tmp_path, progress=False)
    assert capsys.readouterr().err == ""


def test_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    frames = data.frames.clone()
    frames[0] = 0.0  # relative to which no error is finite
    with pytest.raises(TrainingError, match="loss became nan at step"):
        train(make_config(), MODEL, dataclasses.replace(data, frames=frames), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("model", "changes", "name"),
    [
        (dataclasses.replace(MODEL, grid=(8, 16), winding=2), {}, "grid"),
        (dataclasses.replace(MODEL, channels=2), {}, "channels"),
        (dataclasses.replace(MODEL, static_channels=1), {}, "static_channels"),
        (dataclasses.replace(MODEL, history=6), {}, "frames"), (MODEL, {"unroll": 5}, "frames"),
        (MODEL, {"test_trajectories": 8}, "trajectories"), (MODEL, {"train_trajectories": 7}, "trajectories"),
    ],
)
def test_data_that_does_not_fit_is_named(data, tmp_path, model, changes, name):
    with pytest.raises(FieldDataError, match=name):
        train(make_config(**changes), model, data, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"epochs": None}, "budget"), ({"seconds": 3.0}, "budget"), ({"epochs": 0}, "epochs"),
        ({"epochs": None, "seconds": 0.0}, "seconds"), ({"batch_size": 0}, "batch_size"), ({"unroll": 1.5}, "unroll"),
        ({"learning_rate": 0.0}, "learning_rate"), ({"warmup": 1.0}, "warmup"), ({"clip": "1"}, "clip"),
        ({"final_learning_rate": 2.0}, "final_learning_rate"), ({"weight_decay": -1.0}, "weight_decay"),
        ({"augment": 1}, "augment"), ({"seed": "0"}, "seed"), ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"), ({"device": "nowhere"}, "device"),
        ({"checkpoint_epochs": 0}, "checkpoint_epochs"), ({"train_trajectories": 0}, "train_trajectories"),
        ({"test_trajectories": True}, "test_trajectories"),
    ],
)
def test_config_names_the_field_that_is_wrong(changes, name):
    with pytest.raises((TypeError, ValueError), match=name):
        make_config(**changes)


def test_config_survives_json():
    config = make_config(epochs=None, seconds=2.5, augment=True, unroll=3)
    assert FieldTrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
