"""The command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_runs import fails_in_one_line, run
from safetensors.torch import save_file

from torus_kernels import BackendError, available_backends
from torus_model import ModelConfig, checkpoint
from torus_model.__main__ import main, restart_with_sleeping_threads

MODEL = ModelConfig(width=16, layers=2, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2))
TINY = ["--width", "16", "--layers", "1", "--heads", "2", "--n-major", "4", "--n-minor", "6", "--seq-len", "24",
        "--batch-size", "2", "--validations", "1", "--validation-windows", "2", "--backend", "reference"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be or not to be, that is the question; " * 50)
    return str(path)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("run")
    main(["train", "--output", str(path), "--data", text, "--steps", "2", *TINY])
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["generate", "--help"]])
def test_help(capsys, arguments):
    assert run(*arguments) == 0
    assert "usage: python -m torus_model" in capsys.readouterr().out


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "torus_model", "generate", "--checkpoint", "nowhere", "--prompt", "a"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "python -m torus_model: error: no checkpoint at nowhere\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the program does not restart")
def test_program_restarts_once_with_threads_that_sleep(monkeypatch):
    started = []
    monkeypatch.setattr("os.execve", lambda path, arguments, environment: started.append((arguments, environment)))
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "torus_model", "train"])
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    restart_with_sleeping_threads()
    [(arguments, environment)] = started
    assert arguments == [sys.executable, "-m", "torus_model", "train"]
    monkeypatch.setenv("OMP_WAIT_POLICY", environment["OMP_WAIT_POLICY"])
    restart_with_sleeping_threads()
    assert len(started) == 1


def test_train_then_generate(run_dir, capsys):
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoint.previous.safetensors", "checkpoint.safetensors", "history.json", "validation.png",
    ]

    def write(seed):
        assert run("generate", "--checkpoint", run_dir, "--prompt", "to be", "--bytes", 30, "--seed", seed,
                   "--backend", "reference") == 0
        return capsys.readouterr().out

    assert write(0).startswith("to be")
    assert write(0) == write(0)
    assert write(0) != write(1)


def write(capsys, run_dir, *options, prompts=("to be",)):
    named = [part for prompt in prompts for part in ("--prompt", prompt)]
    assert run("generate", "--checkpoint", run_dir, *named, "--bytes", 30, "--backend", "reference", *options) == 0
    return capsys.readouterr().out


def test_every_option_of_generate_acts(run_dir, capsys):
    free = write(capsys, run_dir)
    for options in (["--top-k", 2], ["--top-p", 0.1], ["--repetition-penalty", 0.001], ["--beams", 3],
                    ["--temperature", 0]):
        assert write(capsys, run_dir, *options) != free
    # A large vocabulary of stops ends the search at once, where short texts are preferred.
    stops = [part for code in range(1, 128) for part in ("--stop", chr(code))]
    short, long = (write(capsys, run_dir, "--beams", 3, "--length-penalty", p, *stops) for p in (0, 99))
    assert len(short) <= len("to be") + 2 < len(long)
    assert len(write(capsys, run_dir, *stops)) < len(free)


@pytest.mark.parametrize("penalty", ["inf", "nan", "1e300"])
def test_length_penalty_fails_in_one_line(run_dir, capsys, penalty):
    message = fails_in_one_line(capsys, "generate", "--checkpoint", run_dir, "--prompt", "a", "--beams", 2,
                                "--length-penalty", penalty)
    assert "length_penalty must be" in message


def test_generate_without_cache_writes_the_same(run_dir, capsys, monkeypatch):
    with_cache = write(capsys, run_dir)
    made = []
    monkeypatch.setattr("torus_model.generate.LMCache", lambda *_: made.append(1))
    assert write(capsys, run_dir, "--no-cache") == with_cache and not made


def test_generate_continues_several_prompts(run_dir, capsys):
    texts = write(capsys, run_dir, "--temperature", 0, prompts=("to be", "that is")).split("\n---\n")
    alone = [write(capsys, run_dir, "--temperature", 0, prompts=(p,)) for p in ("to be", "that is")]
    assert [text.rstrip("\n") for text in texts] == [text.rstrip("\n") for text in alone]


def test_generate_continues_a_prompt_that_is_not_ascii(run_dir, capsys):
    assert run("generate", "--checkpoint", run_dir, "--prompt", "tør", "--bytes", 0, "--backend", "reference") == 0
    assert capsys.readouterr().out == "tør\n"


def test_existing_run_is_not_overwritten_unasked(run_dir, text, capsys):
    before = (run_dir / "checkpoint.safetensors").read_bytes()
    message = fails_in_one_line(capsys, "train", "--output", run_dir, "--data", text, "--steps", 1, *TINY)
    assert "--resume" in message and "--overwrite" in message
    assert (run_dir / "checkpoint.safetensors").read_bytes() == before


def test_resume_and_overwrite(tmp_path, text):
    def steps():
        return len(checkpoint.load(tmp_path)[1]["history"]["losses"])

    assert run("train", "--output", tmp_path, "--data", text, "--steps", 2, *TINY) == 0
    assert run("train", "--output", tmp_path, "--resume", "--steps", 5) == 0
    assert steps() == 5
    assert run("train", "--output", tmp_path, "--overwrite", "--data", text, "--steps", 1, *TINY) == 0
    assert steps() == 1


def test_options_become_the_configuration(tmp_path, text):
    assert run("train", "--output", tmp_path, "--data", text, "--steps", 1, *TINY, "--kv-heads", 1, "--no-token-gated",
               "--streams", "minor_forward,spiral_cw", "--cross-radius", 2, 1, "--learning-rate", 0.5) == 0
    metadata = checkpoint.load(tmp_path)[1]
    config = ModelConfig.from_dict(metadata["model_config"])
    assert (config.kv_heads, config.token_gated, config.cross_radius) == (1, False, (2, 1))
    assert config.streams == ("minor_forward", "spiral_cw")
    assert metadata["train_config"]["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "no/such/text"], "no/such/text"),
        (["--width", "20"], "width"),
        (["--width", "wide"], "--width"),
        (["--steps", "0"], "steps"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--streams", "sideways"], "sideways"),
        (["--seq-len", "100000000"], "fewer than one window"),
        (["--steps", "1", "--seconds", "1"], "--seconds"),
        (["--resume"], "no checkpoint"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_train_fails_in_one_line(tmp_path, capsys, arguments, said):
    assert said in fails_in_one_line(capsys, "train", "--output", tmp_path / "run", *arguments)


def test_train_says_what_resume_keeps(run_dir, capsys):
    assert "layers" in fails_in_one_line(capsys, "train", "--output", run_dir, "--resume", "--layers", 3)
    assert "seed" in fails_in_one_line(capsys, "train", "--output", run_dir, "--resume", "--seed", 3)


def test_folder_that_cannot_be_made_fails_in_one_line(tmp_path, text, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails_in_one_line(capsys, "train", "--output", tmp_path / "file" / "run", "--data", text,
                                       "--steps", 1, *TINY)


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text", "foreign", "missing weights", "config"])
def test_damaged_checkpoint_fails_in_one_line(run_dir, tmp_path, capsys, damage):
    path = tmp_path / "damaged.safetensors"
    content = (run_dir / "checkpoint.safetensors").read_bytes()
    tensors, metadata = checkpoint.load(run_dir)
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "header":
        path.write_bytes(content[:8] + b"\xff" * 100 + content[108:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint at all")
    elif damage == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif damage == "missing weights":
        checkpoint.save(path, {name: x for name, x in tensors.items() if "q_proj" not in name}, metadata)
    elif damage == "config":
        checkpoint.save(path, tensors, metadata | {"model_config": {"width": -1}})
    message = fails_in_one_line(capsys, "generate", "--checkpoint", path, "--prompt", "a")
    assert str(path) in message


def test_damaged_checkpoint_cannot_be_resumed(run_dir, tmp_path, capsys):
    tensors, metadata = checkpoint.load(run_dir)
    path = tmp_path / "checkpoint.safetensors"
    for kind in ("model.", "optimizer.", "rng."):
        checkpoint.save(path, {name: x for name, x in tensors.items() if not name.startswith(kind)}, metadata)
        assert str(path) in fails_in_one_line(capsys, "train", "--output", tmp_path, "--resume", "--steps", 9), kind


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--prompt"),
        (["--prompt", ""], "prompt"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top-k", "0"], "top_k"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--seed", str(2**80)], "seed must be at least 0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty"),
        (["--prompt", "a", "--stop", "no"], "--stop"),
        (["--prompt", "a", "--beams", "0"], "beams"),
        (["--prompt", "a", "--prompt", "b", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--prompt", ""], "prompt"),
        (["--prompt", "a", "--bytes", "-1"], "new_tokens"),
    ],
)
def test_generate_fails_in_one_line(run_dir, capsys, arguments, said):
    assert said in fails_in_one_line(capsys, "generate", "--checkpoint", run_dir, *arguments)


def test_backend_that_cannot_run_fails_in_one_line(run_dir, capsys, monkeypatch):
    command = ["generate", "--checkpoint", run_dir, "--prompt", "a"]
    missing = [name for name in ("cuda", "triton") if name not in available_backends()]
    for name in missing:
        assert name in fails_in_one_line(capsys, *command, "--backend", name)
    monkeypatch.setenv("TORUS_BACKEND", "abacus")
    assert "TORUS_BACKEND" in fails_in_one_line(capsys, *command)


def test_defects_keep_their_traceback(run_dir, monkeypatch):
    """Only what a user can cause is made one line."""

    def broken(*args, **kwargs):
        raise ValueError("a defect")

    monkeypatch.setattr("torus_model.commands.train.train", broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["train", "--output", str(run_dir), "--overwrite", "--steps", "1"])


def test_one_line_even_where_the_reason_has_many(run_dir, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise BackendError("the compiler said\nmany\nlines")

    monkeypatch.setattr("torus_model.commands.train.train", broken)
    assert "said many lines" in fails_in_one_line(capsys, "train", "--output", run_dir, "--overwrite", "--steps", 1)


def test_interruption_is_one_line(run_dir, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("torus_model.commands.train.train", interrupted)
    assert run("train", "--output", run_dir, "--overwrite", "--steps", 1) == 130
    assert "interrupted" in capsys.readouterr().err
