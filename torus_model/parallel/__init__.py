"""Training on several processes that ``torchrun`` starts: layouts that `Run` takes, all of which compute one step.

    torchrun --nproc-per-node 2 -m torus_model train --parallel fsdp --steps 100

A layout changes where the numbers are, not what they are: with the same configuration the losses are those of one
process up to rounding (with dropout, of which every process draws its own, in distribution), and a checkpoint of one
layout continues under any other.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from . import processes
from .layout import ONE_PROCESS, Layout

if TYPE_CHECKING:
    from ..config import TrainConfig

__all__ = ["LAYOUTS", "ONE_PROCESS", "Layout", "check_layout", "make_layout"]

LAYOUTS = ("ddp", "fsdp", "pipeline", "sequence")
"""Names of the layouts on several processes."""


_FIELDS_OF_RUNS = {
    "model", "steps", "seconds", "data", "max_bytes", "tokenizer", "pack_documents", "validation_fraction",
    "test_fraction", "seq_len", "batch_size", "learning_rate", "warmup", "final_learning_rate", "accumulate",
    "autocast", "activation_checkpointing", "weight_decay", "clip", "validations", "validation_windows", "patience",
    "tensorboard", "seed", "backend", "schedule", "milestones", "milestone_factor", "layer_decay", "initial",
}
_FIELDS_OF_MODELS = {
    "vocab_size", "width", "layers", "heads", "kv_heads", "ff_width", "n_major", "n_minor", "winding", "cross_radius",
    "streams", "token_gated", "dropout", "compounding", "rotary", "graded_heads", "qk_gain",
}
"""What the layouts on several processes know; they refuse every other option, which might make another run of it. A
process would balance experts, and measure coherence and the noise of gradients, on its share alone, momentum and time
constants of the compounding make another state, positions of a share of the tokens would begin anew, and a model or a
batch that grows would have to be laid out again."""


def check_layout(name: str | None, size: int, config: TrainConfig) -> None:
    """Raises where a run does not divide into the processes.

    Args:
        name: out of `LAYOUTS`; None for one process.
        size: how many processes there are.
        config: the run.

    Raises:
        ValueError: it does not divide, or has an option that is for one process; the message names the field.
    """
    if name is None:
        if size > 1:
            raise ValueError(f"a run on {size} processes needs --parallel, one of {', '.join(LAYOUTS)}")
        return
    if name not in LAYOUTS:
        raise ValueError(f"parallel must be one of {', '.join(LAYOUTS)}, got {name!r}")
    if size == 1:
        return
    model, rows = config.model, config.batch_size // config.accumulate
    for options, known in ((config, _FIELDS_OF_RUNS), (model, _FIELDS_OF_MODELS)):
        for field in dataclasses.fields(options):
            if field.name not in known and (value := getattr(options, field.name)) != field.default:
                raise ValueError(f"{field.name} must be {field.default!r} on several processes, got {value!r}")
    if name == "pipeline":
        if config.layer_decay != 1:
            raise ValueError(f"layer_decay must be 1 in a pipeline, whose stages do not know each other's depth, got "
                             f"{config.layer_decay}")
        if model.layers < size:
            raise ValueError(f"layers must be at least the {size} processes of the pipeline, got {model.layers}")
    elif name == "sequence":
        kv_heads = model.heads if model.kv_heads is None else model.kv_heads
        for dimension, value in (("seq_len", config.seq_len), ("heads", model.heads), ("kv_heads", kv_heads)):
            if value % size != 0:
                raise ValueError(f"{dimension} must be a multiple of the {size} processes, got {value}")
    elif rows % size != 0:
        raise ValueError(f"batch_size / accumulate must be a multiple of the {size} processes, got "
                         f"{config.batch_size} / {config.accumulate}")


def make_layout(name: str | None) -> Layout:
    """The layout of this name on the processes of the default process group; one process without one."""
    if name is None or processes.count() == 1:
        return ONE_PROCESS
    # Imported where they are needed: they load much of torch.distributed.
    if name == "pipeline":
        from .pipeline import Pipeline
        return Pipeline()
    if name == "sequence":
        from .sequence import SequenceParallel
        return SequenceParallel()
    from .data_parallel import DataParallel, FullySharded
    return DataParallel() if name == "ddp" else FullySharded()
