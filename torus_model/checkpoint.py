"""Checkpoints: one safetensors file, replaced atomically, that holds weights, configuration and training state."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from .compression import CompressionError, bytes_of, pack, unpack
from .files import replacing
from .lm import ModelConfig, TorusLM
from .tokenizer import ByteTokenizer, Tokenizer

FILE_NAME = "checkpoint.safetensors"
BEST_FILE_NAME = "checkpoint.best.safetensors"
WEIGHTS = "model."
"""Prefix of the model's weights among the tensors of the file."""

_NOTHING = "-"
"""Prefix of no tensor."""

_OPTIMIZER = "optimizer."
_RNG = "rng."
_FORMAT = "torus_model.checkpoint.1"


class CheckpointError(ValueError):
    """A file is not a checkpoint, or not one that can be used this way; the message says why."""


def previous_of(path: Path) -> Path:
    """Where the checkpoint that was at ``path`` before is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, keep_previous: bool = False
) -> None:
    """Writes the file beside ``path`` and moves it there, so that a crash leaves the old file or the new one.

    Args:
        path: the checkpoint.
        tensors: by name.
        metadata: values that JSON can hold.
        keep_previous: move what is at ``path`` to `previous_of` it, unless it is damaged. A crash between the two moves
            leaves that file alone, which `locate` finds.
    """
    texts = {"format": _FORMAT} | {key: json.dumps(value) for key, value in metadata.items()}
    with replacing(path) as temporary:
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temporary, metadata=texts)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # otherwise a power failure may keep the new name and lose the content
        if keep_previous and _defect(path) is None:
            os.replace(path, previous_of(path))


def locate(path: str | os.PathLike) -> Path:
    """The checkpoint at ``path``, which may be the folder of a run: then it is the newest, or, with a warning, the
    previous one where the newest is damaged.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    previous = previous_of(file)
    if path.is_dir() and (defect := _defect(file)) is not None and _defect(previous) is None:
        warnings.warn(f"{file} is not usable ({defect}); going back to {previous}", stacklevel=1)
        return previous
    if not file.exists():
        raise CheckpointError(f"no checkpoint at {file}")
    return file


def _defect(file: Path) -> str | None:
    """Why a file cannot be a checkpoint, or None: whether it is there, and as long as its header says."""
    try:
        with safe_open(file, framework="pt"):
            return None
    except FileNotFoundError:
        return "it is missing"
    except (SafetensorError, OSError) as error:
        return f"truncated or damaged: {_one_line(error)}"


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
        raise CheckpointError(f"{file} cannot be read as a checkpoint, it is truncated or damaged: "
                              f"{_one_line(error)}") from error


def load_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """All metadata, without the tensors; raises as `load`."""
    return load(path, _NOTHING)[1]


def load_model(path: str | os.PathLike, backend: str | None = None) -> TorusLM:
    """The model of a checkpoint, in evaluation mode.

    Raises:
        CheckpointError: the file is not there, not complete, or does not hold a `TorusLM`.
    """
    tensors, metadata = load(path, WEIGHTS)
    model = TorusLM(_model_config(path, metadata), backend=backend)
    try:
        unpack(model, {name.removeprefix(WEIGHTS): x for name, x in tensors.items()})
    except CompressionError as error:
        raise CheckpointError(f"{locate(path)} cannot be used: {error}") from error
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{locate(path)} does not hold the weights of its TorusLM: {_one_line(error)}") from error
    return model.eval()


def save_compressed(path: Path, model: TorusLM, source: str | os.PathLike) -> int:
    """Writes the weights of a model in few bytes, and what else of the checkpoint ``source`` is needed to use it, but
    nothing to resume its run.

    Returns:
        The bytes of the weights in the file.
    """
    metadata = load_metadata(source)
    packed = pack(model.state_dict())
    kept = ("model_config", "train_config", "tokenizer", "data_fingerprint")
    save(path, {WEIGHTS + name: x for name, x in packed.items()},
         {name: metadata[name] for name in kept if name in metadata})
    return bytes_of(packed)


def load_initial(model: TorusLM, path: str | os.PathLike) -> None:
    """Gives a model the weights of the checkpoint of another run, those of a quantised one in its own dtype.

    Raises:
        CheckpointError: it is not of the same model, whose settings that concern no weight may differ.
    """
    source = load_model(path)
    free = ("dropout", "experts_per_token", "balance_weight")
    wanted = dataclasses.replace(source.config, **{name: getattr(model.config, name) for name in free})
    check_same_config(locate(path), wanted, model.config, (), "its weights need")
    model.load_state_dict({name: x.dequantize() for name, x in source.state_dict().items()})


def load_model_config(path: str | os.PathLike) -> ModelConfig:
    """The architecture of `load_model`.

    Raises:
        CheckpointError: the file is not there, not complete, or does not hold a `TorusLM`.
    """
    return _model_config(path, load_metadata(path))


def _model_config(path: str | os.PathLike, metadata: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(metadata["model_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{locate(path)} does not hold a TorusLM: {_one_line(error)}") from error


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint; bytes, where it says nothing of one.

    Raises:
        CheckpointError: the file is not there, not complete, or holds something else in its place.
        TokenizerError: the package of the tokenizer is missing.
    """
    metadata = load_metadata(path)
    if "tokenizer" not in metadata:
        return ByteTokenizer()
    try:
        return Tokenizer.from_dict(metadata["tokenizer"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{locate(path)} does not hold a tokenizer: {_one_line(error)}") from error


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights under the names that they have in a checkpoint."""
    return {WEIGHTS + name: x for name, x in model.state_dict().items()}


def parameter_of(name: str) -> str | None:
    """The model's name of the parameter that a tensor of `training_tensors` is the weight or a state of, or None."""
    if name.startswith(WEIGHTS):
        return name.removeprefix(WEIGHTS)
    return name.removeprefix(_OPTIMIZER).partition(".")[2] if name.startswith(_OPTIMIZER) else None


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fills the model with the weights among a checkpoint's tensors; RuntimeError where they do not fit it."""
    model.load_state_dict({n.removeprefix(WEIGHTS): x for n, x in tensors.items() if n.startswith(WEIGHTS)})


def training_tensors(model: torch.nn.Module, optimizer: Optimizer, batches: torch.Generator) -> dict[str, Tensor]:
    """All tensors of a run: weights, and the state of the optimiser, of the batches and of PyTorch's random numbers."""
    rng = {_RNG + "global": torch.get_rng_state(), _RNG + "batches": batches.get_state()}
    return model_tensors(model) | _optimizer_tensors(optimizer) | rng


def load_training(
    model: torch.nn.Module,
    optimizer: Optimizer,
    batches: torch.Generator,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
    *,
    started: bool,
) -> None:
    """Takes from `training_tensors`, and the optimiser's ``param_groups``, what a run needs to go on.

    Raises:
        KeyError: a tensor is missing; of the optimiser's only where the run has ``started``.
        RuntimeError, ValueError: the tensors are of another model.
    """
    load_weights(model, tensors)
    _load_optimizer(optimizer, tensors, groups, started=started)
    torch.set_rng_state(tensors[_RNG + "global"])
    batches.set_state(tensors[_RNG + "batches"])


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser of named parameters under the names that it has in a checkpoint."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    return {
        f"{_OPTIMIZER}{key}.{names[index]}": value
        for index, values in state["state"].items()
        for key, value in values.items()
    }


def _load_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]], *, started: bool
) -> None:
    """Gives an optimiser the state among a checkpoint's tensors, and the settings of its ``param_groups``; parameters
    are found by their names, so that they may be part of those of the checkpoint."""
    own = optimizer.state_dict()["param_groups"]
    settings = [saved | {key: group[key] for key in ("params", "param_names")}
                for saved, group in zip(groups, own, strict=True)]
    index = {name: i for group in own for name, i in zip(group["param_names"], group["params"], strict=True)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        if full_name.startswith(_OPTIMIZER):
            key, _, name = full_name.removeprefix(_OPTIMIZER).partition(".")
            state.setdefault(index[name], {})[key] = value.clone()  # not a view of the file
    if started and len(state) < len(index):
        raise KeyError("optimizer state")  # an optimiser accepts less, and would start anew
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def check_same_config(
    path: Path, before: Any, now: Any, may_change: Collection[str], needed: str = "a resumed run must keep"
) -> None:
    """Raises CheckpointError where a dataclass of settings differs from that of the run that is resumed."""
    for name in (f.name for f in dataclasses.fields(now)):
        if name not in may_change and getattr(before, name) != getattr(now, name):
            raise CheckpointError(f"{path} was made with {name} = {getattr(before, name)!r}, which {needed}; "
                                  f"got {getattr(now, name)!r}")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
