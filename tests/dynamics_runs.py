"""Tiny runs of dynamic training, whole and interrupted."""

import random

import pytest
import torch
from model_runs import Interrupted, interrupt_at

from torus_model import ModelConfig, checkpoint
from torus_model.train import TrainConfig, train

MODEL = ModelConfig(width=16, layers=2, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2), dropout=0.1)
STEPS = 12


def write_text(path) -> str:
    """Words in random order: easy to learn something about, impossible to learn by heart."""
    rng = random.Random(0)
    words = ["torus", "lattice", "major", "minor", "spiral", "cross", "stream", "kernel"]
    path.write_text(" ".join(rng.choice(words) for _ in range(2000)))
    return str(path)


def make_config(text, **changes) -> TrainConfig:
    fields = {
        "model": MODEL, "steps": STEPS, "data": text, "seq_len": 24, "batch_size": 4, "learning_rate": 1e-2,
        "validations": 4, "validation_windows": 2, "backend": "reference",
    }
    return TrainConfig(**(fields | changes))


def tiny_options(text, folder) -> list:
    """Of ``train``, for a run of some steps."""
    return ["--width", 16, "--layers", 2, "--heads", 2, "--n-major", 4, "--n-minor", 6, "--seq-len", 24, "--data", text,
            "--validations", 1, "--validation-windows", 2, "--backend", "reference", "--output", folder]


def assert_goes_on_to_the_bit(config: TrainConfig, folder, step: int) -> dict:
    """Interrupts a run at the validation after ``step``, resumes it, and compares everything that its checkpoint holds
    but times with that of a run left alone, whose metadata is returned."""
    train(config, folder / "whole", progress=False)
    with pytest.raises(Interrupted):
        train(config, folder / "parts", progress=False, on_validation=interrupt_at(step=step))
    assert len(checkpoint.load_metadata(folder / "parts")["history"]["losses"]) == step
    torch.manual_seed(99)  # nothing may depend on the process that continues
    torch.rand(7)
    train(config, folder / "parts", resume=True, progress=False)
    (wanted, about), (got, about_got) = (checkpoint.load(folder / name) for name in ("whole", "parts"))
    for metadata in (about, about_got):
        del metadata["seconds"]
        for point in metadata["history"]["validation"]:
            del point["seconds"]
    assert about_got == about
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], x) for name, x in wanted.items())
    return about
