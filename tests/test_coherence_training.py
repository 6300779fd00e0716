"""Coherence in training: what is measured and when, the adaptive alpha, and what a run keeps of it."""

import dataclasses
import json

import pytest
import torch
from model_runs import Interrupted, fails_in_one_line, interrupt_at, run

import torus_model.attention as attention_module
import torus_model.coherence_tracking as tracking
from torus_kernels import torus_attention_with_stats
from torus_model import ModelConfig, TorusLM, checkpoint
from torus_model.coherence import MEASURES, alpha_factor, measure_layers
from torus_model.config import TrainConfig
from torus_model.generate import generate
from torus_model.history import History
from torus_model.train import COHERENCE_PLOT, resumable_config, train

MODEL = ModelConfig(width=32, layers=2, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2), dropout=0.1)
ADAPTIVE = dataclasses.replace(MODEL, adaptive_alpha=True)
TINY = ["--width", "16", "--layers", "2", "--heads", "2", "--n-major", "4", "--n-minor", "6", "--seq-len", "24",
        "--batch-size", "2", "--validations", "1", "--validation-windows", "2", "--backend", "reference"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be or not to be, that is the question; " * 50)
    return str(path)


def make_config(text, **changes):
    fields = {
        "model": MODEL, "steps": 6, "data": text, "seq_len": 32, "batch_size": 2, "learning_rate": 1e-2,
        "validations": 2, "validation_windows": 2, "backend": "reference", "coherence_every": 2,
    }
    return TrainConfig(**(fields | changes))


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """A run that measures and goes on as one that does not."""
    return train(make_config(text), tmp_path_factory.mktemp("plain"), progress=False)


@pytest.fixture(scope="module")
def adaptive(text, tmp_path_factory):
    return train(make_config(text, model=ADAPTIVE), tmp_path_factory.mktemp("adaptive"), progress=False)


def test_measuring_changes_nothing_else_and_steps_without_it_measure_nothing(plain, text, tmp_path, monkeypatch):
    measured = []

    def watch(*arguments, **options):
        measured.append(torch.is_grad_enabled())
        return torus_attention_with_stats(*arguments, **options)

    monkeypatch.setattr(attention_module, "torus_attention_with_stats", watch)
    without = train(make_config(text, coherence_every=None), tmp_path, progress=False)
    assert not measured and without.history.coherence == [] and not (tmp_path / COHERENCE_PLOT).exists()
    measure_layers(without.model, torch.zeros(1, 32, dtype=torch.int64))
    assert measured == [False] * MODEL.layers
    assert without.history.losses == plain.history.losses, "dropout included"
    assert [point.step for point in plain.history.coherence] == [2, 4, 6]
    assert (plain.checkpoint.parent / COHERENCE_PLOT).stat().st_size > 10_000


def test_points_are_what_the_layers_measure(text, tmp_path, monkeypatch):
    seen = []
    measure = tracking.measure_layers

    def watch(model, tokens, first_key):
        seen.append((measure(model, tokens, first_key), tokens.shape, model.training))
        return seen[-1][0]

    monkeypatch.setattr(tracking, "measure_layers", watch)
    result = train(make_config(text, accumulate=2), tmp_path, progress=False)
    assert [shape for _, shape, _ in seen] == [(1, 32)] * 3, "as many sequences as a part of the batch"
    assert all(training for _, _, training in seen), "the model goes on training"
    for (layers, _, _), point in zip(seen, result.history.coherence, strict=True):
        for name in MEASURES:
            values = getattr(point, name)
            assert values == [getattr(layer, name) for layer in layers]
            assert all(0 <= value <= 1 for value in values)
            assert point.mean(name) == pytest.approx(sum(values) / len(values))
        assert point.alpha_factor == []
    kept = json.loads((tmp_path / "history.json").read_text())
    assert History.from_dict(kept).coherence == result.history.coherence
    del kept["coherence"]
    assert History.from_dict(kept).coherence == []


def test_the_statistics_are_of_the_model_as_it_is(text):
    torch.manual_seed(0)
    model = TorusLM(MODEL, backend="reference")
    tokens = torch.randint(256, (2, 40))
    before = measure_layers(model, tokens)
    assert len(before) == MODEL.layers and model.training
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q_norm.weight.mul_(8)  # sharper attention
    for layer, sharper in zip(before, measure_layers(model, tokens), strict=True):
        assert sharper.comprehensibility > layer.comprehensibility + 0.1
        assert sharper.manageability < layer.manageability - 0.1
    with pytest.raises(ValueError, match="on_stats takes no cache"):
        model.blocks[0](torch.zeros(1, 1, 32), cache=object(), on_stats=print)


def test_adaptive_alpha_follows_earlier_steps_alone(plain, adaptive):
    # The factors of the measurement after step 2 act from step 3 on.
    assert adaptive.history.losses[:2] == plain.history.losses[:2]
    assert adaptive.history.losses[2] != plain.history.losses[2]
    first, *_, last = adaptive.history.coherence
    wanted = [alpha_factor(s, c) for s, c in zip(first.score, first.cohesion, strict=True)]
    assert first.alpha_factor == pytest.approx(wanted[1:]), "the first layer compounds nothing"
    score, cohesion = first.score[1], first.cohesion[1]
    for point in adaptive.history.coherence[1:]:
        score += tracking.RATE * (point.score[1] - score)
        cohesion += tracking.RATE * (point.cohesion[1] - cohesion)
    assert last.alpha_factor == pytest.approx([alpha_factor(score, cohesion)]), "the averages, not the last values"
    assert 0.5 <= last.alpha_factor[0] < 1
    factors = [block.attention.alpha_factor for block in adaptive.model.blocks]
    assert factors[0] is None
    assert [f.item() for f in factors[1:]] == pytest.approx(last.alpha_factor)
    assert not any(f.requires_grad for f in factors[1:])


def test_a_trained_adaptive_model_writes_the_same_with_and_without_cache(adaptive):
    model = checkpoint.load_model(adaptive.checkpoint, backend="reference")
    assert 0.5 <= model.blocks[1].attention.alpha_factor.item() < 1
    prompt = torch.tensor(list(b"to be"))
    texts = [list(generate(model, prompt, 40, temperature=0, use_cache=use_cache)) for use_cache in (False, True)]
    assert texts[0] == texts[1]
    tokens = torch.randint(256, (1, 40))
    other = tokens.clone()
    other[:, 25:] = 0
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, :25], model(other)[:, :25])


def test_a_run_that_was_interrupted_goes_on_to_the_bit(adaptive, text, tmp_path):
    with pytest.raises(Interrupted):
        train(make_config(text, model=ADAPTIVE), tmp_path, progress=False, on_validation=interrupt_at(step=3))
    parts = train(resumable_config(tmp_path), tmp_path, resume=True, progress=False)
    assert parts.history.losses == adaptive.history.losses
    assert parts.history.coherence == adaptive.history.coherence
    tensors, again = (checkpoint.load(path)[0] for path in (adaptive.checkpoint, tmp_path))
    assert "coherence.alignment" in tensors and "model.blocks.1.attention.alpha_factor" in tensors
    assert tensors.keys() == again.keys()
    assert all(torch.equal(again[name], x) for name, x in tensors.items())


def test_a_run_may_begin_to_measure_when_it_goes_on(text, tmp_path):
    train(make_config(text, coherence_every=None, steps=1), tmp_path, progress=False)
    result = train(resumable_config(tmp_path, coherence_every=1, steps=3), tmp_path, resume=True, progress=False)
    assert [point.step for point in result.history.coherence] == [2, 3]


def test_packed_documents_and_options_of_the_model_are_measured(text, tmp_path):
    model = dataclasses.replace(ADAPTIVE, vocab_size=260, ema_scales=2, sinusoidal_positions=True,
                                streams=("minor_forward", "spiral_cw"))
    config = make_config(text, model=model, pack_documents=True, activation_checkpointing=True)
    result = train(config, tmp_path, progress=False)
    for point in result.history.coherence:
        assert all(0 <= value <= 1 for name in MEASURES for value in getattr(point, name))


def test_tensorboard_has_the_measures(text, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(make_config(text, tensorboard=True), tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in MEASURES:
        wanted = [(p.step, pytest.approx(p.mean(name), rel=1e-6)) for p in result.history.coherence]
        assert [(e.step, e.value) for e in events.Scalars(f"coherence/{name}")] == wanted
    for layer in range(MODEL.layers):
        wanted = [pytest.approx(p.score[layer], rel=1e-6) for p in result.history.coherence]
        assert [e.value for e in events.Scalars(f"coherence_score/layer_{layer}")] == wanted


def test_options_of_the_command_line(text, tmp_path, capsys):
    command = ("train", "--data", text, "--steps", 2, *TINY)
    assert run(*command, "--output", tmp_path / "a", "--adaptive-alpha", "--coherence-every", 1, "--ema-momentum",
               "--sinusoidal-positions") == 0
    metadata = checkpoint.load(tmp_path / "a")[1]
    config = ModelConfig.from_dict(metadata["model_config"])
    assert (config.adaptive_alpha, config.ema_momentum, config.sinusoidal_positions) == (True, True, True)
    assert metadata["train_config"]["coherence_every"] == 1 and len(metadata["history"]["coherence"]) == 2
    assert (tmp_path / "a" / COHERENCE_PLOT).exists()
    assert run(*command, "--output", tmp_path / "b", "--ema-scales", 3) == 0
    assert ModelConfig.from_dict(checkpoint.load(tmp_path / "b")[1]["model_config"]).ema_scales == 3
    for options, said in ((["--adaptive-alpha"], "needs coherence_every"), (["--coherence-every", 0], "at least 1"),
                          (["--ema-scales", 2, "--ema-momentum"], "one time constant"), (["--ema-scales", 0], "least")):
        assert said in fails_in_one_line(capsys, *command, "--output", tmp_path / "c", *options)
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    for flag in ("--coherence-every", "--adaptive-alpha", "--ema-momentum", "--ema-scales", "--sinusoidal-positions"):
        assert flag in shown
