"""Sampling, and the command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torus_kernels import BackendError, available_backends
from torus_model import ModelConfig, TorusLM, checkpoint
from torus_model.__main__ import main, restart_with_sleeping_threads
from torus_model.generate import generate, sample

MODEL = ModelConfig(width=16, layers=2, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2))
TINY = ["--width", "16", "--layers", "1", "--heads", "2", "--n-major", "4", "--n-minor", "6", "--seq-len", "24",
        "--batch-size", "2", "--validations", "1", "--validation-windows", "2", "--backend", "reference"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TorusLM(MODEL, backend="reference").eval()


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


def tokens_of(text):
    return torch.tensor(list(text.encode()))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sampling_follows_its_seed(model):
    def draw(seed):
        return list(generate(model, tokens_of("ab"), 20, generator=generator(seed)))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_temperature_zero_takes_the_likeliest_token(model):
    prompt = tokens_of("ab")
    greedy = list(generate(model, prompt, 5, temperature=0))
    assert greedy == list(generate(model, prompt, 5, top_k=1, generator=generator(5)))
    text = prompt
    with torch.no_grad():
        for token in greedy:
            assert token == model(text[None])[0, -1].argmax()
            text = torch.cat((text, torch.tensor([token])))


def test_top_k_samples_from_the_k_likeliest():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    random = generator()
    assert {sample(logits, 1.0, 2, random) for _ in range(200)} == {1, 3}
    assert {sample(logits, 1.0, 9, random) for _ in range(500)} == {0, 1, 2, 3}


def test_temperature_sharpens():
    logits = torch.tensor([0.0, 1.0])
    random = generator()

    def share(temperature):
        return sum(sample(logits, temperature, None, random) for _ in range(2000)) / 2000

    for temperature in (0.5, 1.0, 4.0):
        assert share(temperature) == pytest.approx(torch.tensor(1 / temperature).sigmoid().item(), abs=0.05)


def test_long_text_is_cut_to_the_window_at_its_position(model, monkeypatch):
    calls = []

    def record(tokens, *, offset=0):
        calls.append((tokens.shape[1], offset, int(tokens[0, 0])))
        return TorusLM.forward(model, tokens, offset=offset)

    monkeypatch.setattr(model, "forward", record)
    prompt = torch.arange(22)
    list(generate(model, prompt, 5, temperature=0))
    window = MODEL.lattice.num_sites
    assert window == 24
    assert calls == [(22, 0, 0), (23, 0, 0), (24, 0, 0), (24, 1, 1), (24, 2, 2)]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"prompt": torch.empty(0, dtype=torch.int64)}, "prompt"),
        ({"prompt": torch.zeros(1, 3, dtype=torch.int64)}, "prompt"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"new_tokens": -1}, "new_tokens"),
    ],
)
def test_wrong_arguments_raise_before_the_first_token(model, arguments, name):
    with pytest.raises(ValueError, match=name):
        generate(**({"model": model, "prompt": tokens_of("a"), "new_tokens": 1} | arguments))


def run(*arguments):
    """The exit status of the command line; what argparse and ours print is captured by capsys."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def fails_in_one_line(capsys, *arguments):
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and "error:" in shown.err
    return shown.err


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
        "checkpoint.safetensors", "history.json", "validation.png",
    ]

    def write(seed):
        assert run("generate", "--checkpoint", run_dir, "--prompt", "to be", "--bytes", 30, "--seed", seed,
                   "--backend", "reference") == 0
        return capsys.readouterr().out

    assert write(0).startswith("to be")
    assert write(0) == write(0)
    assert write(0) != write(1)


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

    monkeypatch.setattr("torus_model.__main__.train", broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["train", "--output", str(run_dir), "--overwrite", "--steps", "1"])


def test_one_line_even_where_the_reason_has_many(run_dir, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise BackendError("the compiler said\nmany\nlines")

    monkeypatch.setattr("torus_model.__main__.train", broken)
    assert "said many lines" in fails_in_one_line(capsys, "train", "--output", run_dir, "--overwrite", "--steps", 1)


def test_interruption_is_one_line(run_dir, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("torus_model.__main__.train", interrupted)
    assert run("train", "--output", run_dir, "--overwrite", "--steps", 1) == 130
    assert "interrupted" in capsys.readouterr().err
