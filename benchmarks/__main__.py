"""``python -m benchmarks``: the main job, and the commands that measure."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from rich.console import Console

from torus_kernels import BackendError
from torus_model.checkpoint import CheckpointError
from torus_model.compression import CompressionError
from torus_model.data import DataError
from torus_model.field import FieldDataError
from torus_model.train import TrainingError

from . import (
    arguments,
    coherence,
    compare,
    cpu,
    decode,
    demo,
    dynamics,
    environment,
    field,
    generation,
    gpu,
    growth,
    language,
    precision,
    scale,
    threads,
    transfer,
)
from .accuracy import WrongResult
from .report import ReportError
from .show import markdown_of

_COMMANDS = (cpu, growth, threads, decode, compare, precision, gpu, field, language, generation, coherence, scale,
             transfer, dynamics)
_EXPECTED = (BackendError, CheckpointError, CompressionError, DataError, FieldDataError, OSError, ReportError,
             TrainingError, WrongResult, compare.ComparisonError)


def _add_table_parser(commands) -> None:
    parser = commands.add_parser("table", help="print a report as Markdown",
                                 description="Prints a report as Markdown, as the README shows it.")
    parser.add_argument("report", type=Path, metavar="REPORT.json")
    parser.set_defaults(run=lambda given, console: print(markdown_of(given.report)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Without a command, the main job: shows which backends run here, checks them, times them beside "
                    "what a PyTorch user would do instead, and trains a byte-level model. Under 6 minutes on 2 cores.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    arguments.add_choice(parser, "--workloads", cpu.CPU_WORKLOADS, ("field-4k", "text-4k"),
                         "workloads to time; none skips this", may_be_none=True)
    arguments.add_dtypes(parser, ("float32",))
    arguments.add_seconds(parser, 8.0)
    parser.add_argument("--train-seconds", type=arguments.seconds, default=120.0, metavar="S",
                        help="length of the training run; 0 skips it (default: %(default)g)")
    parser.add_argument("--skip-training", action="store_const", const=0.0, dest="train_seconds",
                        help="the same as --train-seconds 0")
    parser.add_argument("--quick", action="store_true",
                        help="only a few rounds and 10 seconds of training: to see whether everything works")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="folder for the report, plots and the model (default: %(default)s)")
    parser.set_defaults(run=_run_demo)
    for command in _COMMANDS:
        command.add_parser(commands)
    _add_table_parser(commands)
    return parser


def _run_demo(given: argparse.Namespace, console: Console) -> None:
    environment.restart_with_warm_memory()
    seconds, train_seconds = given.seconds, given.train_seconds
    if given.quick:
        seconds, train_seconds = min(seconds, 1.0), min(train_seconds, 10.0)
    demo.run(demo.Settings(given.workloads, arguments.dtypes(given.dtypes), seconds, train_seconds, given.output),
             console)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = _parser()
    given = parser.parse_args(argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        given.run(given, Console())
    except _EXPECTED as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


if __name__ == "__main__":
    main()
