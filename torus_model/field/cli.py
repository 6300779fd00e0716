"""``python -m torus_model field``: data, training, evaluation and pictures of models of fields."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .commands import evaluate, generate, rollout, train

HELP = "models of fields on periodic grids and cylinders"

_COMMANDS = {"generate": generate, "train": train, "evaluate": evaluate, "rollout": rollout}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands."""
    commands = parser.add_subparsers(dest="field_command", required=True, metavar="{" + ",".join(_COMMANDS) + "}")
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.__doc__))


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """What the chosen command does, ready to run.

    Raises:
        TypeError, ValueError, OSError: an option is wrong, or what it names is missing; the message says what.
    """
    return _COMMANDS[options.field_command].prepare(options)
