"""Command-line options that are fields of a configuration."""

from __future__ import annotations

import argparse
from typing import Any


def add_option(group: Any, flag: str, help_text: str, default: object = None, **options: Any) -> None:
    """Adds an option that is absent from the result where it is not given; its help shows the ``default``."""
    shown = "" if default is None else f" (default: {default})"
    group.add_argument(flag, default=argparse.SUPPRESS, help=help_text + shown, **options)


def stream_names(text: str) -> tuple[str, ...]:
    """``"a,b"`` as the names of streams."""
    return tuple(text.split(","))
