"""The commands on text: tokenizer, train, evaluate, generate."""

import argparse
import ast

import pytest
import torch
from model_runs import fails_in_one_line, run

from torus_model import ModelConfig, checkpoint
from torus_model.commands.train import add_arguments, configure
from torus_model.config import SIZES

TINY = ["--width", "16", "--layers", "1", "--heads", "2", "--n-major", "4", "--n-minor", "6", "--seq-len", "24",
        "--batch-size", "2", "--validations", "1", "--validation-windows", "2", "--backend", "reference"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"document {number}: to be or not to be, that is the question\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, text):
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("tokenizer") / "made" / "tokenizer.json"
    assert run("tokenizer", "train", "--data", text, "--vocab-size", 300, "--output", path) == 0
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, text, tokenizer):
    path = tmp_path_factory.mktemp("run")
    assert run("train", "--output", path, "--data", text, "--tokenizer", tokenizer, "--pack-documents", "--steps", 3,
               "--test-fraction", 0.1, *TINY) == 0
    return path


@pytest.mark.parametrize("command", [["tokenizer"], ["tokenizer", "train"], ["tokenizer", "encode"], ["evaluate"]])
def test_help(capsys, command):
    assert run(*command, "--help") == 0
    assert "usage: python -m torus_model" in capsys.readouterr().out


def test_help_names_every_option_of_training(capsys):
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    for flag in ("--tokenizer", "--pack-documents", "--test-fraction", "--size", "--accumulate", "--autocast",
                 "--activation-checkpointing", "--patience", "--tensorboard", "--kv-heads"):
        assert f"  {flag}" in shown, flag


def test_tokenizer_commands(tokenizer, text, tmp_path, capsys):
    assert run("tokenizer", "encode", "--tokenizer", tokenizer, "--text", "to be é") == 0
    lines = capsys.readouterr().out.splitlines()
    pieces = [ast.literal_eval(line.split("\t")[1]) for line in lines]
    assert b"".join(pieces) == "to be é".encode() and len(pieces) < 7
    assert "--overwrite" in fails_in_one_line(capsys, "tokenizer", "train", "--data", text, "--output", tokenizer)
    for wrong, said in ((["--vocab-size", 10], "vocab-size"), (["--held-out", 1], "held-out"),
                        (["--max-bytes", 0], "max-bytes"), (["--data", "no/such"], "no/such")):
        assert said in fails_in_one_line(capsys, "tokenizer", "train", "--output", tmp_path / "t.json", *wrong)


def test_a_tokenizer_does_not_learn_from_what_is_held_out(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    (tmp_path / "text.txt").write_text("seen " * 200 + "hidden " * 100)
    pieces = {}
    for held_out in (0, 0.5):
        assert run("tokenizer", "train", "--data", tmp_path / "text.txt", "--held-out", held_out, "--vocab-size", 300,
                   "--output", tmp_path / "t.json", "--overwrite") == 0
        capsys.readouterr()
        assert run("tokenizer", "encode", "--tokenizer", tmp_path / "t.json", "--text", " hidden") == 0
        pieces[held_out] = capsys.readouterr().out.count("\n")
    assert pieces == {0: 1, 0.5: 7}, "the word is one token where it was learnt from, and bytes elsewhere"


def test_evaluate_and_generate_need_the_checkpoint_alone(run_dir, tokenizer, text, tmp_path, capsys):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((run_dir / checkpoint.FILE_NAME).read_bytes())
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    try:
        capsys.readouterr()
        assert run("generate", "--checkpoint", moved, "--prompt", "to be", "--tokens", 5, "--backend", "reference") == 0
        assert capsys.readouterr().out.startswith("to be")
        assert run("evaluate", "--checkpoint", moved, "--data", text, "--backend", "reference") == 0
        assert capsys.readouterr().out.startswith("test: ")
    finally:
        tokenizer.write_bytes(content)


def evaluate(capsys, *arguments):
    capsys.readouterr()
    assert run("evaluate", "--backend", "reference", *arguments) == 0
    return capsys.readouterr().out


def test_evaluate_scores_each_part(run_dir, capsys):
    shown = {split: evaluate(capsys, "--checkpoint", run_dir, "--split", split)
             for split in ("training", "validation", "test")}
    for split, line in shown.items():
        assert line.startswith(f"{split}: ") and "bits per byte, perplexity" in line
    assert len({line.split(": ")[1] for line in shown.values()}) == 3
    # The validation of the run, on its own windows.
    last = checkpoint.load_metadata(run_dir)["history"]["validation"][-1]
    line = evaluate(capsys, "--checkpoint", run_dir, "--split", "validation", "--windows", 2)
    assert f"{last['bits_per_byte']:.4f} bits per byte, perplexity {last['perplexity']:.4f}" in line


def test_evaluate_fails_in_one_line(run_dir, text, tmp_path, capsys):
    command = ["evaluate", "--checkpoint", run_dir]
    (tmp_path / "other.txt").write_text("other text " * 500)
    assert "other text" in fails_in_one_line(capsys, *command, "--data", tmp_path / "other.txt")
    assert "--windows" in fails_in_one_line(capsys, *command, "--windows", 0)
    assert "one window" in fails_in_one_line(capsys, *command, "--seq-len", 100000)
    without = tmp_path / "run"
    assert run("train", "--output", without, "--data", text, "--steps", 1, "--test-fraction", 0, *TINY) == 0
    assert "--split validation" in fails_in_one_line(capsys, "evaluate", "--checkpoint", without)


def test_generate_begins_with_bos_and_stops_at_eos(run_dir, capsys, monkeypatch):
    tokens = checkpoint.load_tokenizer(run_dir)
    prompts, stops = [], []

    def watch(model, prompt, new_tokens, *, stop_tokens, **options):
        prompts.append(prompt.tolist())
        stops.append(set(stop_tokens))
        return iter([tokens.eos])

    monkeypatch.setattr("torus_model.commands.generate.generate", watch)
    command = ["generate", "--checkpoint", run_dir, "--prompt", "to be"]
    for options in ([], ["--ignore-eos"], ["--stop", "q"]):
        assert run(*command, *options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "to be"
    assert prompts[0] == [tokens.bos, *tokens.encode(b"to be").tolist()]
    assert stops == [{tokens.eos}, set(), {tokens.eos, *tokens.encode(b"q").tolist()}]
    assert "--stop" in fails_in_one_line(capsys, *command, "--stop", "zzzz")


def options_of(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = vars(parser.parse_args(list(arguments)))
    return configure(given.pop("output"), given.pop("resume"), {k: v for k, v in given.items() if k != "overwrite"})


def test_named_sizes_and_what_changes_them():
    assert options_of().model == ModelConfig() == SIZES["tiny"]
    large = options_of("--size", "gpt2", "--kv-heads", "3", "--steps", "1")
    assert (large.model.width, large.model.layers, large.model.heads, large.model.kv_heads) == (768, 12, 12, 3)
    assert large.seq_len == 1024 and options_of("--size", "small", "--seq-len", "99").seq_len == 99


def test_options_become_the_configuration():
    config = options_of(
        "--steps", "1", "--pack-documents", "--accumulate", "2", "--autocast", "--activation-checkpointing",
        "--patience", "3", "--tensorboard", "--test-fraction", "0.2",
    )
    assert (config.pack_documents, config.accumulate, config.autocast) == (True, 2, True)
    assert (config.activation_checkpointing, config.patience, config.tensorboard) == (True, 3, True)
    assert config.test_fraction == 0.2 and config.model.vocab_size == 260


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokenizer", "no/such.json"], "no/such.json"), (["--size", "huge"], "--size"),
        (["--accumulate", "3"], "accumulate"), (["--patience", "0"], "patience"), (["--test-fraction", "1"], "test"),
    ],
)
def test_train_fails_in_one_line(tmp_path, text, capsys, arguments, said):
    assert said in fails_in_one_line(capsys, "train", "--output", tmp_path / "run", "--data", text, *arguments)


def test_a_resumed_run_keeps_its_text_and_model(run_dir, capsys):
    resume = ["train", "--output", run_dir, "--resume"]
    assert "size" in fails_in_one_line(capsys, *resume, "--size", "small")
    assert "test_fraction" in fails_in_one_line(capsys, *resume, "--test-fraction", 0.3)


def test_a_checkpoint_of_another_vocabulary_is_refused(run_dir, tmp_path, capsys):
    tensors, metadata = checkpoint.load(run_dir)
    path = tmp_path / "wrong.safetensors"
    checkpoint.save(path, tensors, metadata | {"tokenizer": {"type": "bytes", "special_tokens": False}})
    assert "vocabulary" in fails_in_one_line(capsys, "generate", "--checkpoint", path, "--prompt", "a")
    checkpoint.save(path, tensors, metadata | {"tokenizer": {"type": "bytes"}})
    assert "tokenizer" in fails_in_one_line(capsys, "generate", "--checkpoint", path, "--prompt", "a")
    assert torch.is_tensor(tensors["model.embedding.weight"])
