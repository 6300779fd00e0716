"""Options of training: accumulation, autocast, activation checkpointing, packing, sizes, patience and logs."""

import dataclasses
import random
import sys

import pytest
import torch
from support import assert_same_up_to_rounding

import torus_model.block as block_module
import torus_model.run as run_module
from torus_kernels import available_backends
from torus_model import ModelConfig, TorusLM, checkpoint
from torus_model.config import SIZES, TrainConfig
from torus_model.data import IGNORED
from torus_model.history import History, Validation
from torus_model.run import Run, training_step
from torus_model.tensorboard import TensorBoardLog
from torus_model.tokenizer import BPETokenizer, TokenizerError
from torus_model.train import TrainingError, train

MODEL = ModelConfig(width=32, layers=2, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2))
PACKED = dataclasses.replace(MODEL, vocab_size=260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = random.Random(0)
    words = ["torus", "lattice", "major", "minor", "spiral", "cross"]
    path = tmp_path_factory.mktemp("text")
    for number in range(200):
        (path / f"{number:02}.txt").write_text(" ".join(rng.choice(words) for _ in range(rng.randrange(2, 9))))
    return path


def make_config(folder, **changes):
    fields = {
        "model": MODEL, "steps": 4, "data": str(folder), "seq_len": 32, "batch_size": 4, "learning_rate": 1e-2,
        "validations": 2, "validation_windows": 5, "backend": "reference",
    }
    return TrainConfig(**(fields | changes))


def gradients(model, *arguments):
    """The loss of a step, and the gradients that it leaves."""
    loss = training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), *arguments)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (4, 33), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :30] = IGNORED  # parts of a batch then have different numbers of targets
    return tokens[:, :-1], targets


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts, monkeypatch):
    torch.manual_seed(0)
    model = TorusLM(MODEL, backend="reference").double()
    whole, wanted = gradients(model, *batch(), 1e9)
    sizes = []
    loss = TorusLM.loss
    monkeypatch.setattr(TorusLM, "loss", lambda self, tokens, *a, **k: sizes.append(len(tokens)) or
                        loss(self, tokens, *a, **k))
    accumulated, got = gradients(model, *batch(), 1e9, None, parts)
    assert sizes == [4 // parts] * parts
    assert accumulated == pytest.approx(whole, rel=1e-12)
    for name, gradient in got.items():
        assert_same_up_to_rounding(gradient, wanted[name], name, ulps=4096)


def test_a_run_that_accumulates_has_the_losses_of_one_that_does_not(folder, tmp_path):
    whole = train(make_config(folder), tmp_path / "whole", progress=False).history.losses
    parts = train(make_config(folder, accumulate=4), tmp_path / "parts", progress=False).history.losses
    assert parts == pytest.approx(whole, rel=1e-5)
    with pytest.raises(ValueError, match="accumulate"):
        make_config(folder, accumulate=3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients_and_runs_blocks_again(dropout, monkeypatch):
    passes = []
    forward = block_module.AttentionBlock.forward
    monkeypatch.setattr(block_module.AttentionBlock, "forward",
                        lambda self, *a, **k: passes.append(1) or forward(self, *a, **k))
    found = {}
    for again in (False, True):
        torch.manual_seed(0)
        model = TorusLM(dataclasses.replace(MODEL, dropout=dropout), backend="reference",
                        activation_checkpointing=again).double()
        passes.clear()
        found[again] = gradients(model, *batch(), 1e9, torch.zeros(4, 32, dtype=torch.int64))
        assert len(passes) == (4 if again else 2)
    assert found[True][0] == found[False][0]
    assert all(torch.equal(found[True][1][name], gradient) for name, gradient in found[False][1].items())


def test_a_run_with_activation_checkpointing_has_the_same_losses(folder, tmp_path):
    plain = train(make_config(folder, steps=2), tmp_path / "plain", progress=False)
    again = train(make_config(folder, steps=2, activation_checkpointing=True), tmp_path / "again", progress=False)
    assert again.model.activation_checkpointing and not plain.model.activation_checkpointing
    assert again.history.losses == plain.history.losses


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in available_backends()])
def test_autocast_runs_steps_in_bfloat16_and_validations_in_float32(folder, tmp_path, monkeypatch, backend):
    seen = []
    attend = block_module.TorusAttention.forward

    def watch(self, x, *args, **options):
        out, state = attend(self, x, *args, **options)
        seen.append((torch.is_grad_enabled(), state.dtype))
        return out, state

    monkeypatch.setattr(block_module.TorusAttention, "forward", watch)
    found = train(make_config(folder, autocast=True, backend=backend), tmp_path / "low", progress=False)
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    plain = train(make_config(folder, backend=backend), tmp_path / "plain", progress=False)
    assert found.history.losses != plain.history.losses
    assert found.history.losses == pytest.approx(plain.history.losses, rel=0.02)


def test_packing_reaches_the_step(folder, tmp_path, monkeypatch):
    seen = []
    step = run_module.training_step

    def watch(model, optimizer, tokens, targets, clip, first_key, *rest):
        seen.append((tokens, targets, first_key))
        return step(model, optimizer, tokens, targets, clip, first_key, *rest)

    monkeypatch.setattr(run_module, "training_step", watch)
    packed = train(make_config(folder, model=PACKED, pack_documents=True), tmp_path, progress=False)
    bos = packed.model.config.vocab_size - 4
    for tokens, targets, first_key in seen:
        starts = tokens.gather(1, first_key)
        assert ((starts == bos) | (first_key == 0)).all()
        assert first_key.max() > 0 and (targets == IGNORED).any() and not (targets == bos).any()
    with pytest.raises(ValueError, match="vocab_size"):
        make_config(folder, pack_documents=True)


def test_a_run_with_byte_pairs_keeps_its_tokenizer(folder, tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(["torus lattice major minor spiral cross " * 9], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    config = make_config(folder, model=model, tokenizer=str(tmp_path / "tokenizer.json"))
    train(config, tmp_path / "run", progress=False)
    (tmp_path / "tokenizer.json").unlink()
    assert checkpoint.load_tokenizer(tmp_path / "run").fingerprint == tokenizer.fingerprint
    longer = dataclasses.replace(config, steps=5)
    assert len(train(longer, tmp_path / "run", resume=True, progress=False).history.losses) == 5
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="vocab_size"):
        Run(dataclasses.replace(config, model=MODEL))


def test_a_checkpoint_without_a_tokenizer_is_one_of_bytes(folder, tmp_path):
    train(make_config(folder, steps=1, test_fraction=0.0), tmp_path, progress=False)
    tensors, metadata = checkpoint.load(tmp_path)
    del metadata["tokenizer"]
    for name in ("tokenizer", "pack_documents", "test_fraction", "accumulate", "autocast", "activation_checkpointing",
                 "patience", "tensorboard"):
        del metadata["train_config"][name]
    for point in metadata["history"]["validation"]:
        del point["perplexity"]
    checkpoint.save(tmp_path / checkpoint.FILE_NAME, tensors, metadata)
    assert checkpoint.load_tokenizer(tmp_path).vocab_size == 256
    resumed = train(make_config(folder, steps=2, test_fraction=0.0), tmp_path, resume=True, progress=False)
    points = resumed.history.validation
    assert points[0].perplexity == pytest.approx(2 ** points[0].bits_per_byte)
    assert points[-1].perplexity == pytest.approx(2 ** points[-1].bits_per_byte, rel=1e-5)


def test_the_test_part_is_not_looked_at(folder):
    run = Run(make_config(folder, validation_fraction=0.2, test_fraction=0.1))
    total = len(run.corpus.data)
    assert len(run.training) + len(run.validation) == total - round(0.1 * total)
    assert torch.equal(torch.cat((run.training, run.validation)), run.corpus.data[:-round(0.1 * total)])
    with pytest.raises(ValueError, match="test_fraction"):
        make_config(folder, validation_fraction=0.6, test_fraction=0.4)


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 0.8e6, 0.9e6), ("small", 10e6, 12e6), ("gpt2", 84e6, 88e6)])
def test_named_sizes(name, low, high):
    config = SIZES[name]
    with torch.device("meta"):
        model = TorusLM(config)
    assert low < sum(p.numel() for p in model.parameters()) < high
    if name == "gpt2":
        assert (config.width, config.layers, config.heads, config.lattice.num_sites) == (768, 12, 12, 1024)


def worse_from(monkeypatch, step):
    """Validations improve up to ``step`` and get worse from then on."""

    def validate(self):
        bits = float(abs(self.step - step))
        self.history.validation.append(Validation(self.step, 0, 0.0, bits, 1.0))
        return self.history.validation[-1]

    monkeypatch.setattr(Run, "validate", validate)


def test_patience_stops_the_run_and_keeps_the_best(folder, tmp_path, monkeypatch, capsys):
    worse_from(monkeypatch, step=2)
    config = make_config(folder, steps=10, validations=10, patience=3)
    result = train(config, tmp_path)
    assert result.stopped_early and len(result.history.losses) == 5
    assert "stopped early" in capsys.readouterr().err
    best = checkpoint.load_metadata(tmp_path / checkpoint.BEST_FILE_NAME)
    assert len(best["history"]["losses"]) == 2
    leftover = tmp_path / f"{checkpoint.BEST_FILE_NAME}.123.tmp"
    leftover.touch()
    again = train(config, tmp_path, resume=True, progress=False)
    assert not leftover.exists(), "what a killed process left is still there"
    assert len(again.history.losses) == 5, "a run that has stopped goes on"
    patient = train(dataclasses.replace(config, patience=None), tmp_path, resume=True, progress=False)
    assert len(patient.history.losses) == 10 and not patient.stopped_early


def test_best_is_the_first_of_the_lowest():
    assert History().best is None
    points = [Validation(i, 0, 0.0, bits, 1.0) for i, bits in enumerate([3.0, 1.0, 2.0, 1.0])]
    assert History([], points).best == 1


def test_perplexity_and_bits_per_byte_are_shown(folder, tmp_path, capsys):
    result = train(make_config(folder, steps=1, validations=1), tmp_path)
    assert f"{result.bits_per_byte:.3f} bits per byte, perplexity {result.perplexity:.2f}" in capsys.readouterr().err


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_curves_also_of_a_run_that_went_on(folder, tmp_path):
    pytest.importorskip("tensorboard")
    config = make_config(folder, tensorboard=True)
    with TensorBoardLog(tmp_path, 0) as log:  # of a run that is overwritten
        log.write_step(99, 1.0, 1.0)
    train(config, tmp_path, progress=False)
    with TensorBoardLog(tmp_path, 4) as log:  # of steps after the last checkpoint
        log.write_step(5, 1.0, 1.0)
    result = train(dataclasses.replace(config, steps=6), tmp_path, resume=True, progress=False)
    found = scalars(tmp_path)
    assert [step for step, _ in found["training/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["training/loss"]] == pytest.approx(result.history.losses, rel=1e-6)
    for tag, field in (("bits_per_byte", "bits_per_byte"), ("perplexity", "perplexity")):
        wanted = [(p.step, getattr(p, field)) for p in result.history.validation]
        assert found[f"validation/{tag}"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    assert found["training/learning_rate"][0][1] > 0


def test_without_tensorboard_there_are_no_logs_and_the_error_says_what_to_install(folder, tmp_path, monkeypatch):
    train(make_config(folder, steps=1), tmp_path / "quiet", progress=False)
    assert not (tmp_path / "quiet" / "tensorboard").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=r"torus-kernels\[tensorboard\]"):
        train(make_config(folder, tensorboard=True), tmp_path / "run", progress=False)
