"""Training on several processes that ``torchrun`` starts: layouts that `Run` takes, all of which compute one step.

    torchrun --nproc-per-node 2 -m torus_model train --parallel fsdp --steps 100

A layout changes where the numbers are, not what they are: with the same configuration the losses are those of one
process up to rounding (with dropout, of which every process draws its own, in distribution), and a checkpoint of one
layout continues under any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import processes
from .layout import ONE_PROCESS, Layout

if TYPE_CHECKING:
    from ..config import TrainConfig

__all__ = ["LAYOUTS", "ONE_PROCESS", "Layout", "check_layout", "make_layout"]

LAYOUTS = ("ddp", "fsdp", "pipeline", "sequence")
"""Names of the layouts on several processes."""


_RUNS_OF_ONE_PROCESS: dict[str, object] = {
    "freeze": (), "keep_zeros": False, "teacher": None, "coherence_every": None,
    "curriculum": (), "max_batch_size": None, "grow_at": (), "alpha_schedule": None,
}
_MODELS_OF_ONE_PROCESS: dict[str, object] = {
    "experts": 1, "ema_momentum": False, "ema_scales": 1, "sinusoidal_positions": False, "adaptive_alpha": False,
}
"""Fields of runs and models that layouts on several processes do not know, and their values without effect. A process
would balance experts, and measure coherence and the noise of gradients, on its share alone, momentum and time constants
make another state, and positions of a share of the tokens would begin anew."""


def check_layout(name: str | None, size: int, config: TrainConfig) -> None:
    """Raises where a run does not divide into the processes.

    Args:
        name: out of `LAYOUTS`; None for one process.
        size: how many processes there are.
        config: the run.

    Raises:
        ValueError: the message names the field, what it is and what it must be.
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
    for of, plain in ((config, _RUNS_OF_ONE_PROCESS), (model, _MODELS_OF_ONE_PROCESS)):
        for field, value in plain.items():
            if (got := getattr(of, field)) != value:
                raise ValueError(f"{field} must be {value!r} on several processes, got {got!r}")
    if name == "pipeline":
        if config.layer_decay != 1:
            raise ValueError(f"layer_decay must be 1 in a pipeline, whose stages do not know each other's depth, got "
                             f"{config.layer_decay}")
        if model.layers < size:
            raise ValueError(f"layers must be at least the {size} processes of the pipeline, got {model.layers}")
    elif name == "sequence":
        kv_heads = model.heads if model.kv_heads is None else model.kv_heads
        for field, value in (("seq_len", config.seq_len), ("heads", model.heads), ("kv_heads", kv_heads)):
            if value % size != 0:
                raise ValueError(f"{field} must be a multiple of the {size} processes, got {value}")
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
