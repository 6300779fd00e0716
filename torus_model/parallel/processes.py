"""The processes of a run: those that ``torchrun`` started, and their process group."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others before it fails; the first one may have a text to tokenise meanwhile."""

ERRORS: tuple[type[Exception], ...] = (dist.DistError,) if dist.is_available() else ()
"""What is raised where processes do not find each other, or lose each other."""


def launched() -> int | None:
    """How many processes ``torchrun`` started, or None outside it; reads ``WORLD_SIZE``, and needs no process group."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else None


def count() -> int:
    """How many processes the default process group has, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, from the process group or, before there is one, from torchrun's ``RANK``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() is not None else 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A process group of the processes that ``torchrun`` started, for as long as the context lasts; one that is there
    already is used as it is, and outside torchrun there is none.

    Tensors on the CPU travel by gloo, those on CUDA devices by NCCL.

    Raises:
        RuntimeError: this PyTorch has no distributed package, or the processes do not find each other.
    """
    if launched() is None or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Lets the first process through the context before all others: they find in the caches what it has made."""
    if count() > 1 and rank() > 0:
        dist.barrier()
    yield
    if count() > 1 and rank() == 0:
        dist.barrier()
