"""``python -m torus_model``: language models (``tokenizer``, ``train``, ``evaluate``, ``compress``, ``generate``), and
``field``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any, NoReturn

from torus_kernels import BackendError

from .checkpoint import CheckpointError
from .commands import compress, evaluate, generate, tokenizer, train
from .compression import CompressionError
from .data import DataError
from .field import cli as field_cli
from .field.data import FieldDataError
from .field.navier_stokes import SolverError
from .parallel import processes
from .run import TrainingError
from .tokenizer import TokenizerError

_COMMANDS = {"tokenizer": tokenizer, "train": train, "evaluate": evaluate, "compress": compress, "generate": generate}
_EXPECTED: tuple[type[Exception], ...] = (
    BackendError, CheckpointError, CompressionError, DataError, FieldDataError, SolverError, TokenizerError,
    TrainingError, OSError, *processes.ERRORS,
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m torus_model", description="Models on torus attention: text, and fields.")
    names = ",".join([*_COMMANDS, "field"])
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{names}}}")
    for name, module in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.__doc__))
    field_cli.add_arguments(commands.add_parser(
        "field", help=field_cli.HELP, description="Models of fields: data, training, scores and pictures.",
    ))
    return parser


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning is one line on stderr, too, and one of all processes."""
    if processes.rank() == 0:
        print(f"python -m torus_model: warning: {' '.join(str(message).split())}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; a user's error becomes one line on stderr and exit status 2."""
    parser = _build_parser()
    options = parser.parse_args(arguments)
    prepare = {name: module.prepare for name, module in _COMMANDS.items()} | {"field": field_cli.prepare}
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                run = prepare[options.command](options)
            except (TypeError, ValueError) as error:  # the options; later they would be a defect of ours
                if processes.rank() > 0:
                    sys.exit(2)  # the first process says it
                parser.error(str(error))
            run()
    except _EXPECTED as error:
        parser.error(f"process {processes.rank()}: {error}" if processes.rank() > 0 else str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")


def restart_with_sleeping_threads() -> None:
    """Replaces this process by one whose idle OpenMP threads sleep; OpenMP reads its settings only at the start.

    A training step is made of about a thousand short parallel loops, and by default threads spin at the end of each.
    While another program holds a core, they spin for a thread that is not running, and a step takes tens of times
    longer. Sleeping makes it 10 to 20% longer on an idle machine. ``OMP_WAIT_POLICY=active`` brings the default back.
    """
    if sys.platform == "linux" and "OMP_WAIT_POLICY" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"OMP_WAIT_POLICY": "passive"})


if __name__ == "__main__":
    restart_with_sleeping_threads()
    main()
