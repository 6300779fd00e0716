"""Fine-tuning with frozen parts, and distillation: what they change, what they leave alone, and what they refuse."""

import dataclasses
import math
import shutil

import pytest
import torch
from model_runs import Interrupted, fails_in_one_line, interrupt_at, parameters_of, run

from torus_model import ModelConfig, TorusLM, checkpoint
from torus_model.checkpoint import CheckpointError
from torus_model.config import TrainConfig
from torus_model.data import IGNORED
from torus_model.distillation import Distillation
from torus_model.run import Run
from torus_model.tokenizer import TokenizerError
from torus_model.train import train
from torus_model.transfer import freeze

MODEL = ModelConfig(width=16, layers=3, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2))
STUDENT = dataclasses.replace(MODEL, layers=1)


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("TORUS_BACKEND", "reference")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be or not to be, that is the question; " * 60)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, text):
    """The folder of a run to start from."""
    path = tmp_path_factory.mktemp("base")
    train(make_config(text, learning_rate=1e-2, steps=6), path, progress=False)
    return path


def make_config(text, **changes):
    fields = {"model": MODEL, "steps": 4, "data": str(text), "seq_len": 24, "batch_size": 2, "validations": 2,
              "validation_windows": 2, "backend": "reference"}
    return TrainConfig(**fields | changes)


def test_a_run_begins_with_the_weights_of_another(base, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("whether it is nobler in the mind to suffer " * 60)
    weights = parameters_of(checkpoint.load_model(base))
    started = Run(make_config(other, initial=str(base), seed=5))
    assert all(torch.equal(p, weights[name]) for name, p in started.model.named_parameters())
    assert started.step == 0 and not started.optimizer.state
    tuned = train(make_config(text, initial=str(base)), tmp_path / "tuned", progress=False)
    plain = train(make_config(text), tmp_path / "plain", progress=False)
    assert tuned.history.validation[0].bits_per_byte < plain.history.validation[0].bits_per_byte - 0.5
    assert tuned.history.validation[0].bits_per_byte == pytest.approx(
        checkpoint.load_metadata(base)["history"]["validation"][-1]["bits_per_byte"])


def test_a_checkpoint_of_another_model_is_refused(base, text):
    with pytest.raises(CheckpointError, match=r"layers = 3.*its weights need; got 2"):
        Run(make_config(text, model=dataclasses.replace(MODEL, layers=2), initial=str(base)))
    Run(make_config(text, model=dataclasses.replace(MODEL, dropout=0.2), initial=str(base)))


FROZEN = {
    "embedding": {"embedding.weight"},
    "blocks.0-1": {"blocks.0.", "blocks.1."},
    "blocks.1-2.attention": {"blocks.1.attention.", "blocks.2.attention."},
    "norm,blocks.2.ff": {"norm.", "blocks.2.ff."},
}


@pytest.mark.parametrize("parts", FROZEN)
def test_frozen_parts_stay_as_they_are_to_the_bit_and_all_others_learn(base, text, tmp_path, parts):
    config = make_config(text, initial=str(base), freeze=tuple(parts.split(",")), weight_decay=0.5)
    tuned = train(config, tmp_path, progress=False)
    start = parameters_of(checkpoint.load_model(base))
    frozen = {name for name in start if name.startswith(tuple(FROZEN[parts]))}
    assert 0 < len(frozen) < len(start)
    assert {name for name, p in tuned.model.named_parameters() if torch.equal(p, start[name])} == frozen
    tensors, _ = checkpoint.load(tmp_path)
    with_state = {name.split(".", 2)[2] for name in tensors if name.startswith("optimizer.exp_avg.")}
    assert with_state == start.keys() - frozen, "a frozen parameter has no state of the optimiser"


def test_a_frozen_run_that_is_interrupted_goes_on_to_the_bit(base, text, tmp_path):
    config = make_config(text, initial=str(base), freeze=("embedding", "blocks.0"), keep_zeros=True)
    whole = train(config, tmp_path / "whole", progress=False)
    moved = shutil.copytree(base, tmp_path / "moved")
    config = dataclasses.replace(config, initial=str(moved))
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", progress=False, on_validation=interrupt_at(step=2))
    shutil.rmtree(moved)  # it is needed at the start only
    resumed = train(config, tmp_path / "cut", resume=True, progress=False)
    assert resumed.history.losses == whole.history.losses
    weights = parameters_of(whole.model)
    assert all(torch.equal(p, weights[name]) for name, p in resumed.model.named_parameters())


@pytest.mark.parametrize("keeps", [False, True])
def test_zeros_are_kept_where_that_is_asked_for(base, text, tmp_path, keeps):
    tensors, metadata = checkpoint.load(base)
    weight = tensors["model.blocks.1.ff.0.weight"]
    weight[weight.abs() < weight.abs().median()] = 0
    sparse = tmp_path / "sparse.safetensors"
    checkpoint.save(sparse, tensors, metadata)
    tuned = train(make_config(text, initial=str(sparse), keep_zeros=keeps), tmp_path / "run", progress=False)
    after = tuned.model.blocks[1].ff[0].weight
    assert torch.equal(after == 0, weight == 0) if keeps else (after != 0).all()
    assert not torch.equal(after, weight)


@pytest.mark.parametrize("parts", [["head"], ["blocks.1-9"], ["blocks.0.attn"], ["block"], [""]])
def test_what_is_not_there_cannot_be_frozen(parts):
    with pytest.raises(ValueError, match=r"freeze must name parts of the model \(embedding, blocks.0-2, norm, or"):
        freeze(TorusLM(MODEL), parts)


def test_something_must_be_left_to_learn():
    with pytest.raises(ValueError, match="something to learn"):
        freeze(TorusLM(MODEL), ["embedding", "blocks.0-2", "norm"])


def predictions(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 256, generator=generator, dtype=torch.float64)


class FixedTeacher(torch.nn.Module):
    """Answers with the same logits whatever it is asked."""

    def forward(self, tokens, first_key=None):
        assert not self.training and not torch.is_grad_enabled()
        return predictions(1)


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 2.0), (0.3, 1.0), (1.0, 4.0)])
def test_distillation_is_that_of_the_formula(weight, temperature):
    targets = torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(2))
    targets[0, :3] = IGNORED
    logits = predictions(0).requires_grad_()
    found = Distillation(FixedTeacher(), weight, temperature)(logits, targets, targets, None)
    wanted, count = 0.0, 0
    for b in range(2):
        for t in range(5):
            if targets[b, t] != IGNORED:
                q = torch.softmax(predictions(1)[b, t] / temperature, 0)
                p = torch.softmax(logits[b, t] / temperature, 0)
                hard = -torch.log(torch.softmax(logits[b, t], 0)[targets[b, t]])
                soft = (q * (q / p).log()).sum()
                wanted, count = wanted + (1 - weight) * hard + weight * temperature**2 * soft, count + 1
    assert found.item() == pytest.approx((wanted / count).item(), rel=1e-12)
    assert torch.autograd.grad(found, logits)[0].abs().max() > 0
    same = Distillation(FixedTeacher(), 1.0, temperature)(predictions(1), targets, targets, None)
    assert same.item() == pytest.approx(0, abs=1e-12)


def test_a_student_comes_nearer_to_its_teacher(base, text, tmp_path):
    teacher = checkpoint.load_model(base)
    before = parameters_of(teacher)
    tokens = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(3))
    distance = {}
    for weight in (0.0, 1.0):
        config = make_config(text, model=STUDENT, teacher=str(base), distill_weight=weight, distill_temperature=1.0,
                             learning_rate=1e-2, steps=20, validations=1)
        student = train(config, tmp_path / str(weight), progress=False).model
        with torch.no_grad():
            expected = teacher(tokens).softmax(-1)
            distance[weight] = -(expected * student(tokens).log_softmax(-1)).sum(-1).mean().item()
    assert distance[1.0] < distance[0.0] - 0.1
    assert all(torch.equal(p, before[name]) for name, p in checkpoint.load_model(base).named_parameters())
    plain = train(make_config(text, model=STUDENT, learning_rate=1e-2, steps=20, validations=1), tmp_path / "plain",
                  progress=False)
    weighted = checkpoint.load_metadata(tmp_path / "0.0")["history"]["losses"]
    assert weighted == plain.history.losses, "a teacher of weight 0 teaches nothing"


def test_a_distilled_run_goes_on_to_the_bit_with_its_own_teacher_only(base, text, tmp_path):
    config = make_config(text, model=STUDENT, teacher=str(base))
    whole = train(config, tmp_path / "whole", progress=False)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", progress=False, on_validation=interrupt_at(step=2))
    moved = str(shutil.copytree(base, tmp_path / "moved"))
    other = dataclasses.replace(config, teacher=str(tmp_path / "other"))
    train(make_config(text), other.teacher, progress=False)
    with pytest.raises(CheckpointError, match="another teacher"):
        train(other, tmp_path / "cut", resume=True, progress=False)
    resumed = train(dataclasses.replace(config, teacher=moved), tmp_path / "cut", resume=True, progress=False)
    assert resumed.history.losses == whole.history.losses


def test_teacher_and_student_have_one_tokenizer(base, text):
    other = dataclasses.replace(STUDENT, vocab_size=260)
    with pytest.raises(TokenizerError, match="tokenizer of its student"):
        Run(make_config(text, model=other, pack_documents=True, teacher=str(base)))


@pytest.mark.parametrize(("changes", "said"), [
    ({"distill_weight": 1.5}, "distill_weight"), ({"distill_temperature": 0.0}, "distill_temperature"),
    ({"freeze": "embedding"}, "freeze"), ({"keep_zeros": True}, "keep_zeros"),
    ({"initial": "a", "tokenizer": "b"}, "tokenizer"), ({"distill_weight": math.nan}, "distill_weight"),
])
def test_wrong_settings_are_refused(text, changes, said):
    with pytest.raises((TypeError, ValueError), match=said):
        make_config(text, **changes)


def test_commands(base, text, tmp_path, capsys):
    command = ["train", "--data", text, "--steps", 2, "--seq-len", 24, "--validations", 1, "--validation-windows", 2,
               "--backend", "reference"]
    assert run(*command, "--from", base, "--freeze", "embedding,blocks.0-1", "--output", tmp_path / "tuned") == 0
    config = TrainConfig.from_dict(checkpoint.load_metadata(tmp_path / "tuned")["train_config"])
    assert config.model == MODEL and config.freeze == ("embedding", "blocks.0-1") and config.initial == str(base)
    size = ["--width", 16, "--layers", 1, "--heads", 2, "--n-major", 4, "--n-minor", 6]
    assert run(*command, *size, "--teacher", base, "--distill-weight", 0.7, "--distill-temperature", 3,
               "--output", tmp_path / "student") == 0
    config = TrainConfig.from_dict(checkpoint.load_metadata(tmp_path / "student")["train_config"])
    assert (config.teacher, config.distill_weight, config.distill_temperature) == (str(base), 0.7, 3.0)
    for wrong, said in (
        (["--from", base, "--width", 32], "--from takes the model of its checkpoint, but got width"),
        (["--from", base, "--freeze", "head"], "freeze must name parts"), (["--from", "no/such"], "no/such"),
        (["--teacher", "no/such"], "no/such"), (["--keep-zeros"], "keep_zeros"),
        (["--from", base, "--distill-weight", 2], "distill_weight"),
    ):
        assert said in fails_in_one_line(capsys, *command, *wrong, "--output", tmp_path / "wrong")
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    for flag in ("--from", "--freeze", "--keep-zeros", "--teacher", "--distill-weight", "--distill-temperature"):
        assert f"  {flag}" in shown, flag
