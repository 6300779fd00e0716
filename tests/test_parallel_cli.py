"""``torchrun -m torus_model train``: two processes from the command line, and what does not divide into them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from model_runs import fails_in_one_line
from processes import make_config

from torus_model import checkpoint
from torus_model.__main__ import main
from torus_model.parallel import LAYOUTS, check_layout

OPTIONS = ["--width", "16", "--layers", "2", "--heads", "2", "--n-major", "4", "--n-minor", "6", "--seq-len", "24",
           "--batch-size", "2", "--validations", "1", "--validation-windows", "2", "--backend", "reference"]
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


def torchrun(*arguments, timeout=300) -> subprocess.CompletedProcess:
    """Two processes, started as a user does; their idle threads sleep only if they have restarted themselves."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "GLOO_SOCKET_IFNAME": "lo",
                                "OMP_NUM_THREADS": "1"}
    environment.pop("OMP_WAIT_POLICY", None)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "torus_model",
                           *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be or not to be, that is the question; " * 50)
    return path


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_make_one_run_that_one_process_continues(text, tmp_path, capsys):
    budget = ["--seconds", "0.2", *(["--tensorboard"] if HAS_TENSORBOARD else [])]
    done = torchrun("train", "--parallel", "pipeline", "--output", tmp_path, "--data", text, *budget, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per byte") == 1 and done.stderr.count("parameters;") == 1
    losses = checkpoint.load_metadata(tmp_path)["history"]["losses"]
    assert {"history.json", "validation.png"} <= {file.name for file in tmp_path.iterdir()}
    if HAS_TENSORBOARD:
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    main(["train", "--output", str(tmp_path), "--resume", "--steps", str(len(losses) + 1)])
    assert checkpoint.load_metadata(tmp_path)["history"]["losses"][:-1] == losses
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_torchrun_there_are_no_processes(text, tmp_path, capsys, layout):
    message = fails_in_one_line(capsys, "train", "--output", tmp_path, "--data", text, "--parallel", layout)
    assert f"--parallel {layout}" in message and "torchrun --nproc-per-node" in message


def test_several_processes_need_a_layout(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    message = fails_in_one_line(capsys, "train", "--output", tmp_path, "--data", text)
    assert "2 processes needs --parallel, one of ddp, fsdp, pipeline, sequence" in message


@pytest.mark.parametrize(("layout", "size", "changes", "message"), [
    ("ddp", 3, {}, "batch_size / accumulate must be a multiple of the 3 processes, got 8 / 2"),
    ("fsdp", 8, {}, "batch_size / accumulate must be a multiple of the 8 processes, got 8 / 2"),
    ("pipeline", 4, {}, "layers must be at least the 4 processes of the pipeline, got 3"),
    ("pipeline", 2, {"layer_decay": 0.5}, "layer_decay must be 1 in a pipeline"),
    ("sequence", 8, {}, "seq_len must be a multiple of the 8 processes, got 20"),
    ("sequence", 4, {"model": {"kv_heads": 2}}, "kv_heads must be a multiple of the 4 processes, got 2"),
    ("sequence", 5, {}, "heads must be a multiple of the 5 processes, got 4"),
    ("fsdp", 2, {"teacher": "runs/model"}, "teacher must be None on several processes, got 'runs/model'"),
    ("sequence", 2, {"freeze": ("embedding",)}, "freeze must be .* on several processes, got .*embedding"),
    ("ddp", 2, {"model": {"experts": 2}}, "experts must be 1 on several processes, got 2"),
    ("pipeline", 2, {"model": {"ema_momentum": True}}, "ema_momentum must be False on several processes"),
    ("ddp", 2, {"max_batch_size": 16}, "max_batch_size must be None on several processes, got 16"),
    ("fsdp", 2, {"coherence_every": 1}, "coherence_every must be None on several processes, got 1"),
    ("rows", 2, {}, "parallel must be one of ddp, fsdp, pipeline, sequence, got 'rows'"),
])
def test_what_does_not_divide_is_refused(text, layout, size, changes, message):
    with pytest.raises(ValueError, match=message):
        check_layout(layout, size, make_config(text, **changes))


@pytest.mark.parametrize(("layout", "size"), [("ddp", 4), ("fsdp", 2), ("pipeline", 3), ("sequence", 2)])
def test_what_divides_is_not(text, layout, size):
    check_layout(layout, size, make_config(text))
    check_layout(None, 1, make_config(text))
