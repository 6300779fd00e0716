"""Training: it learns, moves every parameter, and goes on exactly where it stopped."""

import dataclasses
import json
import math
import random

import pytest
import torch
from model_runs import Interrupted, interrupt_at, parameters_of
from safetensors.torch import load_file
from torch import nn

import torus_model.run as run_module
from torus_kernels import TorusLattice
from torus_model import ModelConfig, TorusLM
from torus_model.checkpoint import CheckpointError, load_model
from torus_model.data import DataError, fixed_batches
from torus_model.evaluation import score
from torus_model.optimizer import make_optimizer
from torus_model.run import Run, training_step
from torus_model.schedules import learning_rate_factor
from torus_model.tokenizer import ByteTokenizer
from torus_model.train import TrainConfig, TrainingError, resumable_config, steps_per_second, train

MODEL = ModelConfig(width=32, layers=2, heads=2, n_major=6, n_minor=8, cross_radius=(2, 3), token_gated=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words in random order: easy to learn something about, impossible to learn by heart."""
    rng = random.Random(0)
    words = ["torus", "lattice", "major", "minor", "spiral", "cross", "stream", "kernel"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(5000)))
    return path


def make_config(text, **changes):
    fields = {
        "model": MODEL, "steps": 12, "data": str(text), "seq_len": 48, "batch_size": 4, "learning_rate": 1e-2,
        "validations": 4, "validation_windows": 5, "backend": "reference",
    }
    return TrainConfig(**(fields | changes))


@pytest.mark.parametrize("token_gated", [False, True])
def test_loss_falls_and_every_parameter_gets_a_gradient_and_moves(text, tmp_path, monkeypatch, token_gated):
    gradients = {}
    step = run_module.training_step

    def watched_step(model, *args):
        loss = step(model, *args)
        for name, p in model.named_parameters():
            gradients[name] = max(gradients.get(name, 0.0), p.grad.abs().max().item())
        return loss

    monkeypatch.setattr(run_module, "training_step", watched_step)
    config = make_config(text, steps=60, model=dataclasses.replace(MODEL, token_gated=token_gated))
    start = parameters_of(Run(config).model)
    result = train(config, tmp_path, progress=False)
    losses = result.history.losses
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    assert result.bits_per_byte < 0.5 * result.history.validation[0].bits_per_byte
    kinds = ("stream_gate" if token_gated else "stream_logits", "raw_decay", "raw_alpha", "q_norm", "embedding")
    for kind in kinds:
        assert any(kind in name for name in start)
    for name, p in result.model.named_parameters():
        assert gradients[name] > 0, name
        assert not torch.equal(p, start[name]), name


def test_weight_decay_leaves_gains_and_gates_alone():
    model = TorusLM(MODEL)
    optimizer = make_optimizer(model, 1e-3, 0.1)
    decayed = {name for group in optimizer.param_groups if group["weight_decay"] > 0 for name in group["param_names"]}
    assert "embedding.weight" in decayed
    assert {name.rsplit(".", 2)[-2] for name in decayed} == {
        "embedding", "q_proj", "k_proj", "v_proj", "out_proj", "0", "2",
    }
    everything = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradient_is_clipped_to_its_norm(clip):
    torch.manual_seed(0)
    model = TorusLM(MODEL, backend="reference")
    start = parameters_of(model)
    tokens = torch.randint(256, (2, 21))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    training_step(model, torch.optim.SGD(model.parameters(), lr=1.0), tokens[:, :-1], tokens[:, 1:], clip)
    moved = torch.stack([(p.detach() - start[name]).norm() for name, p in model.named_parameters()]).norm().item()
    assert moved == pytest.approx(min(clip, norm), rel=1e-3)


def test_learning_rate_warms_up_and_follows_a_cosine():
    factor = [learning_rate_factor(i / 1000, warmup=0.1, final=0.05) for i in range(1001)]
    assert factor[0] == pytest.approx(0.05)
    assert factor[50] == pytest.approx(0.05 + 0.95 / 2)
    assert factor[100] == pytest.approx(1.0)
    assert factor[550] == pytest.approx(0.05 + 0.95 / 2)
    assert factor[1000] == pytest.approx(0.05)
    assert factor.index(max(factor)) == 100


def test_schedule_follows_the_budget_of_steps(text, tmp_path):
    run = Run(make_config(text, steps=10, warmup=0.5))
    rates = []
    while run.progress < 1:
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.advance()
    assert len(rates) == 10
    assert rates == pytest.approx([1e-2 * learning_rate_factor(i / 10, 0.5, 0.05) for i in range(10)])


def test_schedule_follows_the_budget_of_seconds(text, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: clock[0])
    run = Run(make_config(text, steps=None, seconds=20.0, warmup=0.5))
    run.stopwatch.start()
    rates, times = [], []
    while run.progress < 1:
        rates.append(run.optimizer.param_groups[0]["lr"])
        times.append(clock[0])
        clock[0] += 2.0 if len(rates) % 2 else 3.0
        run.advance()
    assert times == [0, 2, 5, 7, 10, 12, 15, 17]
    assert rates == pytest.approx([1e-2 * learning_rate_factor(t / 20, 0.5, 0.05) for t in times])


def test_run_of_seconds_is_validated_at_its_end(text, tmp_path):
    result = train(make_config(text, steps=None, seconds=0.5, validations=2), tmp_path, progress=False)
    last = result.history.validation[-1]
    assert last.step == len(result.history.losses) > 0
    assert result.tokens_per_second == pytest.approx(last.step * 4 * 48 / last.seconds)


def test_interrupted_run_goes_on_exactly(text, tmp_path):
    config = make_config(text, model=dataclasses.replace(MODEL, dropout=0.2))
    whole = train(config, tmp_path / "whole", progress=False)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", progress=False, on_validation=interrupt_at(step=6))
    torch.manual_seed(99)  # nothing may depend on the process that continues
    torch.rand(7)
    resumed = train(config, tmp_path / "parts", resume=True, progress=False)
    assert resumed.history.losses == whole.history.losses
    assert len(set(whole.history.losses)) == config.steps

    def curve(result):
        return [(point.step, point.tokens, point.bits_per_byte) for point in result.history.validation]

    assert curve(resumed) == curve(whole)
    assert [step for step, *_ in curve(whole)] == [0, 3, 6, 9, 12]
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, whole.model.get_parameter(name)), name
    seconds = [point.seconds for point in resumed.history.validation]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("seed", [-1, 2**63, "0", True, 1.5])
def test_seed_that_no_generator_takes_is_refused(text, seed):
    with pytest.raises((TypeError, ValueError), match=r"^seed must be"):
        make_config(text, seed=seed)
    assert make_config(text, seed=2**63 - 1).seed == 2**63 - 1


def test_same_seed_same_losses(text, tmp_path):
    def losses(seed):
        return train(make_config(text, steps=3, seed=seed), tmp_path / str(seed), progress=False).history.losses

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_training_leaves_the_global_random_state_alone(text, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train(make_config(text, steps=1), tmp_path, progress=False)
    assert torch.equal(torch.rand(1), expected)


def test_finished_run_can_be_extended(text, tmp_path):
    train(make_config(text, steps=4, validations=1), tmp_path, progress=False)
    longer = resumable_config(tmp_path, steps=6)
    assert longer == make_config(text, steps=6, validations=1)
    result = train(longer, tmp_path, resume=True, progress=False)
    assert len(result.history.losses) == 6
    assert [point.step for point in result.history.validation] == [0, 4, 6]


def test_resuming_a_finished_run_changes_nothing(text, tmp_path):
    config = make_config(text, steps=4)
    first = train(config, tmp_path, progress=False)
    again = train(config, tmp_path, resume=True, progress=False)
    assert again.history == first.history


def test_resume_refuses_another_run(text, tmp_path):
    config = make_config(text, steps=4)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(config, tmp_path / "empty", resume=True, progress=False)
    train(config, tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="learning_rate"):
        train(dataclasses.replace(config, learning_rate=1e-3), tmp_path, resume=True, progress=False)
    with pytest.raises(CheckpointError, match="model"):
        train(dataclasses.replace(config, model=dataclasses.replace(MODEL, layers=3)), tmp_path, resume=True,
              progress=False)
    other = tmp_path / "other.txt"
    other.write_text("x" * 40000)
    with pytest.raises(CheckpointError, match="other text"):
        train(dataclasses.replace(config, data=str(other)), tmp_path, resume=True, progress=False)


def test_weights_survive_the_checkpoint(text, tmp_path):
    result = train(make_config(text, steps=3), tmp_path, progress=False)
    tokens = torch.randint(256, (2, 50))
    for path in (tmp_path, result.checkpoint):
        loaded = load_model(path, backend="reference")
        assert not loaded.training
        assert loaded.config == MODEL
        with torch.no_grad():
            assert torch.equal(loaded(tokens), result.model(tokens))


def test_checkpoint_is_replaced_atomically(text, tmp_path, monkeypatch):
    """A crash while a checkpoint is written leaves the one before, and no other file."""
    config = make_config(text)
    with pytest.raises(Interrupted):
        train(config, tmp_path, progress=False, on_validation=interrupt_at(step=3))
    before, files = load_file(tmp_path / "checkpoint.safetensors"), sorted(tmp_path.iterdir())

    def write_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("torus_model.checkpoint.save_file", write_half)
    with pytest.raises(OSError, match="disk full"):
        train(config, tmp_path, resume=True, progress=False)
    assert sorted(tmp_path.iterdir()) == files
    after = load_file(tmp_path / "checkpoint.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_history_and_plot_are_written(text, tmp_path):
    result = train(make_config(text), tmp_path, progress=False)
    history = json.loads(result.history_file.read_text())
    assert history["losses"] == result.history.losses
    assert [point["bits_per_byte"] for point in history["validation"]] == [
        point.bits_per_byte for point in result.history.validation
    ]
    assert TrainConfig.from_dict(history["config"]) == make_config(text)
    assert result.plot_file.read_bytes().startswith(b"\x89PNG")


def test_matrices_of_linear_layers_and_embeddings_alone_decay():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.Embedding(2, 2))
    groups = make_optimizer(layers, 1e-3, 0.1).param_groups
    assert [set(g["param_names"]) for g in groups] == [{"0.weight", "2.weight"}, {"0.bias", "1.weight", "1.bias"}]


def test_validation_is_the_mean_over_all_windows_in_bits():
    torch.manual_seed(0)
    model = TorusLM(dataclasses.replace(MODEL, dropout=0.5), backend="reference")
    data = torch.randint(256, (300,), dtype=torch.uint8)
    together, apart = (
        score(model, fixed_batches(data, 5, batch_size, 20), ByteTokenizer()).bits_per_byte for batch_size in (5, 2)
    )
    assert model.training
    assert together == pytest.approx(apart, rel=1e-6)
    assert together == pytest.approx(8.0, abs=0.3)


def test_progress_goes_to_stderr(text, tmp_path, capsys):
    train(make_config(text, steps=2, validations=1), tmp_path)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "parameters" in shown.err
    assert shown.err.count("bits per byte") == 2


def test_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "training_step", lambda *args: math.nan)
    with pytest.raises(TrainingError, match="step 1"):
        train(make_config(text), tmp_path, progress=False)


def test_too_little_text_is_an_error(tmp_path):
    (tmp_path / "short").write_text("short")
    with pytest.raises(DataError, match="fewer than one window"):
        train(make_config(tmp_path / "short"), tmp_path / "run", progress=False)


def test_steps_per_second_times_the_steps_but_the_first(monkeypatch):
    clock, calls = [0.0], []

    def slow_first_step(*args, **kwargs):
        clock[0] += 0.5 if calls else 100.0
        calls.append(args)

    monkeypatch.setattr("torus_model.train.training_step", slow_first_step)
    monkeypatch.setattr("torus_model.train.time.perf_counter", lambda: clock[0])
    assert steps_per_second(MODEL, "reference", batch_size=2, seq_len=16, steps=4) == pytest.approx(2.0)
    assert len(calls) == 5


def test_steps_per_second_runs():
    assert steps_per_second(MODEL, "reference", batch_size=2, seq_len=16, steps=1) > 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"steps": None}, "budget"), ({"seconds": 3.0}, "budget"), ({"steps": 0}, "steps"),
        ({"steps": None, "seconds": 0.0}, "seconds"), ({"seq_len": 0}, "seq_len"), ({"batch_size": 1.5}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"), ({"learning_rate": math.nan}, "learning_rate"),
        ({"warmup": 1.0}, "warmup"), ({"validation_fraction": 0.0}, "validation_fraction"),
        ({"final_learning_rate": 2.0}, "final_learning_rate"), ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip": 0.0}, "clip"), ({"clip": "1"}, "clip"), ({"batch_size": None}, "batch_size"),
         ({"model": dataclasses.replace(MODEL, vocab_size=100)}, "vocab_size"),
    ],
)
def test_config_names_the_field_that_is_wrong(text, changes, name):
    with pytest.raises((TypeError, ValueError), match=name):
        make_config(text, **changes)


def test_config_survives_json(text):
    model = dataclasses.replace(MODEL, winding=3, streams=("minor_forward", "spiral_cw"))
    config = make_config(text, model=model)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.model.lattice == TorusLattice(6, 8, "causal", 3, (2, 3), ("minor_forward", "spiral_cw"))
