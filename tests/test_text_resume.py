"""A run that is killed goes on exactly, and a damaged checkpoint gives way to the one before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torus_model import checkpoint
from torus_model.__main__ import main
from torus_model.checkpoint import CheckpointError
from torus_model.run import Run, TrainingError

STEPS = 9
OPTIONS = [
    "--width", "16", "--layers", "2", "--heads", "2", "--n-major", "4", "--n-minor", "6", "--seq-len", "24",
    "--batch-size", "2", "--validations", "3", "--validation-windows", "2", "--dropout", "0.1", "--backend",
    "reference",
]
PREVIOUS = "checkpoint.previous.safetensors"

DEATHS = {
    "between checkpoints": """
from torus_model.run import Run

advance = Run.advance

def advance_or_die(self):
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self)

Run.advance = advance_or_die
""",
    "while writing one": """
from torus_model import checkpoint

write, written = checkpoint.save_file, []

def write_or_die(tensors, path, metadata):
    write(tensors, path, metadata)
    written.append(path)
    if len(written) == 3:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = write_or_die
""",
    "between the moves": """
replace, replaced = os.replace, []

def replace_or_die(source, target):
    replace(source, target)
    if str(target).endswith("previous.safetensors"):
        replaced.append(target)
        if len(replaced) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace_or_die
""",
}
"""What kills a run in its sixth step, in its third checkpoint, or when the second one has been moved aside."""

KILLER = """
import os, signal
from torus_model.__main__ import main

for death, arguments in {runs!r}:
    child = os.fork()
    if child == 0:
        exec(death)
        main(arguments)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be or not to be, that is the question; " * 50)
    return str(path)


def arguments(text, run_dir, steps=STEPS):
    return ["train", "--output", str(run_dir), "--data", text, "--steps", str(steps), *OPTIONS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The tensors and the history of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    main(arguments(text, run_dir))
    return checkpoint.load(run_dir)


def assert_same_run(run_dir, whole):
    tensors, metadata = checkpoint.load(run_dir)
    assert metadata["history"]["losses"] == whole[1]["history"]["losses"]
    assert [p["bits_per_byte"] for p in metadata["history"]["validation"]] == [
        p["bits_per_byte"] for p in whole[1]["history"]["validation"]
    ]
    assert tensors.keys() == whole[0].keys()
    assert all(torch.equal(tensors[name], x) for name, x in whole[0].items())


@pytest.fixture(scope="module")
def killed(tmp_path_factory, text):
    """Folders of runs that were killed, by what killed them."""
    folders = {name: tmp_path_factory.mktemp("killed") for name in DEATHS}
    runs = [(death, arguments(text, folders[name])) for name, death in DEATHS.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLER.format(runs=runs)], env=environment, capture_output=True,
                          text=True)
    assert done.stdout.split() == [str(-signal.SIGKILL.value)] * len(runs), done.stdout + done.stderr
    return folders


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_goes_on_to_the_bit(killed, whole, death, capsys):
    run_dir = killed[death]
    assert (run_dir / checkpoint.FILE_NAME).exists() == (death != "between the moves")
    if death != "between the moves":
        assert len(checkpoint.load_metadata(run_dir)["history"]["losses"]) == 3
    capsys.readouterr()
    main(["train", "--output", str(run_dir), "--resume"])
    assert ("warning" in capsys.readouterr().err) == (death == "between the moves")
    assert_same_run(run_dir, whole)
    assert not list(run_dir.glob("*.tmp")), "what a killed process left is still there"


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_previous_one(text, tmp_path, whole, damage, capsys):
    main(arguments(text, tmp_path))
    newest = tmp_path / checkpoint.FILE_NAME
    assert len(checkpoint.load_metadata(tmp_path / PREVIOUS)["history"]["losses"]) == 6
    if damage == "missing":
        newest.unlink()
    else:
        os.truncate(newest, newest.stat().st_size // 2 if damage == "truncated" else 0)
    capsys.readouterr()
    if damage != "missing":
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors cannot be read .* truncated or damaged"):
            checkpoint.load(newest)
    main(["generate", "--checkpoint", str(tmp_path), "--prompt", "to", "--bytes", "2", "--backend", "reference"])
    [warning] = capsys.readouterr().err.splitlines()
    assert "warning" in warning and str(newest) in warning and str(tmp_path / PREVIOUS) in warning
    before = (tmp_path / PREVIOUS).read_bytes()
    main(["train", "--output", str(tmp_path), "--resume"])
    assert_same_run(tmp_path, whole)
    assert (tmp_path / PREVIOUS).read_bytes() == before, "a damaged checkpoint took the place of the previous one"


def test_without_a_previous_checkpoint_a_damaged_one_is_refused(text, tmp_path, capsys):
    main(arguments(text, tmp_path, steps=1))
    (tmp_path / PREVIOUS).unlink()
    truncate(tmp_path / checkpoint.FILE_NAME)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["train", "--output", str(tmp_path), "--resume", "--steps", "2"])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.count("\n") == 1
    assert str(tmp_path / checkpoint.FILE_NAME) in shown and "truncated or damaged" in shown


def test_a_run_that_is_overwritten_leaves_nothing_to_go_back_to(text, tmp_path, monkeypatch):
    main([*arguments(text, tmp_path), "--patience", "9"])
    assert (tmp_path / PREVIOUS).exists() and (tmp_path / checkpoint.BEST_FILE_NAME).exists()

    def broken(self):
        raise TrainingError("the first step fails")

    monkeypatch.setattr(Run, "advance", broken)
    with pytest.raises(SystemExit):
        main([*arguments(text, tmp_path), "--overwrite", "--seed", "7"])
    assert checkpoint.load_metadata(tmp_path)["train_config"]["seed"] == 7
    assert not (tmp_path / PREVIOUS).exists() and not (tmp_path / checkpoint.BEST_FILE_NAME).exists()


def test_a_previous_checkpoint_alone_is_a_run(text, tmp_path, capsys):
    main(arguments(text, tmp_path, steps=1))
    (tmp_path / checkpoint.FILE_NAME).unlink()
    with pytest.raises(SystemExit):
        main(arguments(text, tmp_path, steps=1))
    assert "holds a run" in capsys.readouterr().err
