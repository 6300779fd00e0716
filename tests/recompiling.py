"""Compiled functions that may not be compiled a second time."""

import contextlib
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def compiled_once(function: Callable, backend: str | Callable = "aot_eager") -> Iterator[Callable]:
    """The function compiled whole; an error where a call would need another graph than the first one did."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield torch.compile(function, fullgraph=True, backend=backend)
    torch._dynamo.reset()


@contextlib.contextmanager
def compiled_at_most(limit: int, function: Callable, backend: str | Callable = "aot_eager") -> Iterator[Callable]:
    """The function compiled whole; an error where it takes more than ``limit`` graphs."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        yield torch.compile(function, fullgraph=True, backend=backend)
    torch._dynamo.reset()


def mark_dynamic(x: torch.Tensor, *dims: int) -> None:
    """Sizes that the graph has to leave open; an error where it would hold for one size alone."""
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
