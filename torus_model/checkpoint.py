"""Checkpoints: one safetensors file, replaced atomically, that holds weights, configuration and training state."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from .lm import ModelConfig, TorusLM

FILE_NAME = "checkpoint.safetensors"
WEIGHTS = "model."
"""Prefix of the model's weights among the tensors of the file."""

_OPTIMIZER = "optimizer."
_FORMAT = "torus_model.checkpoint.1"


class CheckpointError(ValueError):
    """A file is not a checkpoint, or not one that can be used this way; the message says why."""


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes the file beside ``path`` and moves it there, so that a crash leaves the old file or the new one.

    Args:
        path: the checkpoint.
        tensors: by name.
        metadata: values that JSON can hold.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    texts = {"format": _FORMAT} | {key: json.dumps(value) for key, value in metadata.items()}
    try:
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temporary, metadata=texts)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def locate(path: str | os.PathLike) -> Path:
    """The checkpoint at ``path``, which may be the folder of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.exists():
        raise CheckpointError(f"no checkpoint at {file}")
    return file


def load(path: str | os.PathLike, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors whose names begin with ``prefix``, and all metadata.

    Raises:
        CheckpointError: the file is not there, not complete, or not a checkpoint.
    """
    file = locate(path)
    try:
        with safe_open(file, framework="pt") as content:
            texts = content.metadata() or {}
            if texts.pop("format", None) != _FORMAT:
                raise CheckpointError(f"{file} is not a checkpoint of torus_model")
            names = content.keys()
            tensors = {name: content.get_tensor(name) for name in names if name.startswith(prefix)}
        return tensors, {key: json.loads(text) for key, text in texts.items()}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as a checkpoint: {_one_line(error)}") from error


def load_model(path: str | os.PathLike, backend: str | None = None) -> TorusLM:
    """The model of a checkpoint, in evaluation mode.

    Raises:
        CheckpointError: the file is not there, not complete, or does not hold a `TorusLM`.
    """
    tensors, metadata = load(path, WEIGHTS)
    try:
        config = ModelConfig.from_dict(metadata["model_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{locate(path)} does not hold a TorusLM: {_one_line(error)}") from error
    model = TorusLM(config, backend=backend)
    try:
        load_weights(model, tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{locate(path)} does not hold the weights of its TorusLM: {_one_line(error)}") from error
    return model.eval()


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights under the names that they have in a checkpoint."""
    return {WEIGHTS + name: x for name, x in model.state_dict().items()}


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fills the model with the weights among a checkpoint's tensors; RuntimeError where they do not fit it."""
    model.load_state_dict({n.removeprefix(WEIGHTS): x for n, x in tensors.items() if n.startswith(WEIGHTS)})


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser of named parameters under the names that it has in a checkpoint."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    return {
        f"{_OPTIMIZER}{key}.{names[index]}": value
        for index, values in state["state"].items()
        for key, value in values.items()
    }


def load_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]], *, started: bool
) -> None:
    """Gives an optimiser the state among a checkpoint's tensors, and its ``param_groups``.

    Raises:
        KeyError: ``started``, but the state of a parameter is missing; the optimiser alone would begin anew.
        RuntimeError, ValueError: the state is of other parameters.
    """
    names = [name for group in groups for name in group["param_names"]]
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        if full_name.startswith(_OPTIMIZER):
            key, _, name = full_name.removeprefix(_OPTIMIZER).partition(".")
            state.setdefault(index[name], {})[key] = value.clone()  # not a view of the file
    if started and len(state) < len(names):
        raise KeyError("optimizer state")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_same_config(path: Path, before: Any, now: Any, may_change: Collection[str]) -> None:
    """Raises CheckpointError where a dataclass of settings differs from that of the run that is resumed."""
    for name in (f.name for f in dataclasses.fields(now)):
        if name not in may_change and getattr(before, name) != getattr(now, name):
            raise CheckpointError(f"{path} was made with {name} = {getattr(before, name)!r}, which a resumed run "
                                  f"must keep; got {getattr(now, name)!r}")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
