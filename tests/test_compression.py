"""Smaller checkpoints: pruning, weights in int8, what is in the file, and what reads it."""

import sys

import pytest
import torch
from model_runs import fails_in_one_line, run

from torus_model import ModelConfig, TorusLM, checkpoint
from torus_model.checkpoint import CheckpointError
from torus_model.compression import CompressionError, bytes_of, is_quantized, pack, prune, quantize, sparsity, unpack
from torus_model.config import TrainConfig
from torus_model.run import Run
from torus_model.train import train

MODEL = ModelConfig(width=32, layers=2, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2), experts=2)


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("TORUS_BACKEND", "reference")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, and its text."""
    path = tmp_path_factory.mktemp("run")
    (path / "text.txt").write_text("to be or not to be, that is the question; " * 60)
    config = TrainConfig(model=MODEL, steps=8, data=str(path / "text.txt"), seq_len=24, batch_size=2, validations=1,
                         validation_windows=2, learning_rate=1e-2, backend="reference")
    train(config, path, progress=False)
    return path


@pytest.fixture
def model(trained) -> TorusLM:
    return checkpoint.load_model(trained)


def linear_weights(model):
    return {name: module.weight.detach().clone() for name, module in model.named_modules()
            if type(module) is torch.nn.Linear}


@pytest.mark.parametrize("amount", [0.25, 0.9])
def test_the_smallest_weights_are_pruned(model, amount):
    before, others = linear_weights(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    prune(model, amount)
    values = torch.cat([x.abs().flatten() for x in before.values()])
    level = values.sort().values[round(amount * values.numel())]
    for name, weight in linear_weights(model).items():
        assert torch.equal(weight, before[name].where(before[name].abs() >= level, 0)), name
    assert sparsity(model) == pytest.approx(amount, abs=1 / values.numel())
    assert others.keys() == dict(model.named_parameters()).keys(), "pruning is permanent"
    rest = {name for name in others if name.removesuffix(".weight") not in before}
    assert {"embedding.weight", "norm.weight", "blocks.0.ff.router.weight"} < rest
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name in rest)


def test_pruning_within_each_layer(model):
    prune(model, 0.5, "layer")
    assert all((x == 0).float().mean().item() == pytest.approx(0.5, abs=0.01) for x in linear_weights(model).values())


@pytest.mark.parametrize(("arguments", "said"), [((0.0,), "amount"), ((1.0,), "amount"), ((0.5, "row"), "scope")])
def test_wrong_pruning_is_refused(model, arguments, said):
    with pytest.raises(ValueError, match=said):
        prune(model, *arguments)


def test_weights_in_int8_are_those_of_the_formula(model):
    pytest.importorskip("torchao")
    before = linear_weights(model) | {"embedding": model.embedding.weight.detach().clone()}
    router = model.blocks[0].ff.router.weight.detach().clone()
    quantize(model)
    assert is_quantized(model)
    modules = dict(model.named_modules())
    for name, weight in before.items():
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        scale = scale.clamp(min=torch.finfo(torch.float32).eps)  # of a row of zeros
        found = modules[name].weight
        assert found.qdata.dtype == torch.int8
        assert torch.allclose(found.scale, scale, rtol=1e-6, atol=0), name
        # A value half-way between two may fall to either by the rounding of the division.
        assert (found.qdata - (weight / scale).round().clamp(-128, 127)).abs().max() <= 1, name
        assert ((found.dequantize() - weight).abs() <= 0.5001 * scale).all(), name
    assert torch.equal(model.blocks[0].ff.router.weight, router)


@pytest.mark.parametrize("pruned", [0.0, 0.7])
@pytest.mark.parametrize("int8", [False, True])
def test_a_packed_model_is_smaller_and_comes_back_to_the_bit(trained, model, tmp_path, pruned, int8):
    if int8:
        pytest.importorskip("torchao")
    whole = bytes_of(model.state_dict())
    if pruned:
        prune(model, pruned)
    if int8:
        quantize(model)
    size = checkpoint.save_compressed(tmp_path / "small.safetensors", model, trained)
    assert size == bytes_of(pack(model.state_dict()))
    each = (1 if int8 else 4) * (1 - pruned) + (0.125 if pruned else 0)  # bytes of a weight of a linear layer
    linear = sum(x.numel() for x in linear_weights(model).values())
    rows = sum(x.shape[0] for x in linear_weights(model).values()) + 256 if int8 else 0
    embedding = (1 if int8 else 4) * 256 * MODEL.width
    rest = whole - 4 * linear - 4 * 256 * MODEL.width
    # Gates have zeros of their own; rounding to int8 makes more.
    assert 0.9 * each * linear < size - embedding - rest - 4 * rows <= each * linear + 8 * 64
    loaded = checkpoint.load_model(tmp_path / "small.safetensors")
    assert is_quantized(loaded) == int8
    tokens = torch.randint(256, (2, 30))
    with torch.inference_mode():
        assert torch.equal(loaded(tokens), model(tokens))
    if int8:
        weight = loaded.blocks[0].ff.experts[0][0].weight
        assert weight.qdata.dtype == torch.int8, "it stays in int8 in memory"


def test_tensors_that_do_not_fit_are_refused(model):
    packed = pack(model.state_dict())
    with pytest.raises(RuntimeError, match="missing or unexpected"):
        unpack(TorusLM(MODEL), {name: x for name, x in packed.items() if "embedding" not in name})
    with pytest.raises(RuntimeError):
        unpack(TorusLM(ModelConfig(width=16, layers=2, heads=2, experts=2)), packed)


def small(trained, path, capsys, *options):
    capsys.readouterr()
    assert run("compress", "--checkpoint", trained, "--output", path, "--windows", 4, "--backend", "reference",
               *options) == 0
    return capsys.readouterr().out


def test_commands_read_the_smaller_checkpoint(trained, tmp_path, capsys):
    pytest.importorskip("torchao")
    path = tmp_path / "made" / "small.safetensors"
    shown = small(trained, path, capsys, "--int8", "--prune", 0.4)
    before, after, wrote = shown.splitlines()
    bits = {"before": float(before.split("weights, ")[1].split()[0]), "after": float(after.split("), ")[1].split()[0])}
    assert abs(bits["after"] - bits["before"]) < 2
    assert "40." in after and f"{path.stat().st_size:,} bytes" in wrote
    assert path.stat().st_size < 0.3 * bytes_of(checkpoint.load_model(trained).state_dict())
    for source, value in ((trained, bits["before"]), (path, bits["after"])):
        assert run("evaluate", "--checkpoint", source, "--split", "validation", "--windows", 4, "--backend",
                   "reference") == 0
        assert capsys.readouterr().out.startswith(f"validation: {value:.4f} bits per byte")
    written = []
    for cache in ([], ["--no-cache"]):
        assert run("generate", "--checkpoint", path, "--prompt", "to be", "--bytes", 12, "--temperature", 0,
                   "--backend", "reference", *cache) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] and written[0].startswith("to be")


def test_a_smaller_checkpoint_can_be_a_start_and_a_teacher(trained, tmp_path, capsys):
    pytest.importorskip("torchao")
    path = tmp_path / "small.safetensors"
    small(trained, path, capsys, "--int8", "--prune", 0.5)
    wanted = checkpoint.load_model(path)
    config = TrainConfig(model=MODEL, steps=2, data=str(trained / "text.txt"), seq_len=24, initial=str(path),
                         teacher=str(path), keep_zeros=True, validations=1, validation_windows=2, backend="reference")
    start = Run(config).model
    assert torch.equal(start.blocks[0].ff.experts[1][2].weight, wanted.blocks[0].ff.experts[1][2].weight.dequantize())
    assert start.blocks[0].ff.experts[1][2].weight.requires_grad
    tuned = train(config, tmp_path / "tuned", progress=False).model
    assert sparsity(tuned) == sparsity(wanted) > 0.49
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / checkpoint.FILE_NAME)
    said = fails_in_one_line(capsys, "train", "--resume", "--output", folder)
    assert "does not hold a run that can be resumed" in said


def test_compress_fails_in_one_line(trained, tmp_path, capsys):
    command = ["compress", "--checkpoint", trained, "--output", tmp_path / "small.safetensors"]
    for wrong, said in (([], "--int8, --prune or both"), (["--prune", 1], "--prune"), (["--int8", "--windows", 0],
                        "--windows"), (["--prune", 0.5, "--data", "no/such"], "no/such")):
        assert said in fails_in_one_line(capsys, *command, *wrong)
    assert "is a folder" in fails_in_one_line(capsys, *command[:-1], tmp_path, "--int8")
    small(trained, tmp_path / "small.safetensors", capsys, "--prune", 0.5)
    assert "--overwrite" in fails_in_one_line(capsys, *command, "--prune", 0.5)
    assert run("compress", "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"  {flag}" in shown for flag in ("--int8", "--prune", "--prune-scope", "--overwrite", "--split"))


def test_without_torchao_int8_says_what_to_install(trained, model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchao")
    small(trained, tmp_path / "small.safetensors", capsys, "--int8")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(CompressionError, match=r"torus-kernels\[quantize\]"):
        quantize(model)
    with pytest.raises(CheckpointError, match=r"torus-kernels\[quantize\]"):
        checkpoint.load_model(tmp_path / "small.safetensors")
