"""Progress of a long measurement: a bar on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Say = Callable[[str], None]
"""Told what is going on within a step."""


def silent(text: str) -> None:
    """A `Say` that tells nobody."""


@contextlib.contextmanager
def steps(console: Console, total: int) -> Iterator[Callable[[str], Say]]:
    """Yields a function that starts the next of ``total`` steps by its name, and returns what to tell details."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        started = 0

        def start(name: str) -> Say:
            nonlocal started
            progress.update(task, completed=started, description=name)
            started += 1
            if not console.is_terminal:
                console.print(name, highlight=False)
            return lambda text: progress.update(task, description=f"{name}: {text}")

        yield start
