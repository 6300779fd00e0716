"""``python -m benchmarks``: the main job, the CPU suite, and the README's table."""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path

import torch
from rich.console import Console

from torus_kernels import BackendError
from torus_model.checkpoint import CheckpointError
from torus_model.data import DataError
from torus_model.train import TrainingError

from . import cpu, demo, environment
from .accuracy import WrongResult
from .candidates import PEERS
from .report import Report, ReportError, markdown_table

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_EXPECTED = (BackendError, CheckpointError, DataError, OSError, ReportError, TrainingError, WrongResult)


def _seconds(text: str) -> float:
    value = float(text)  # argparse reports the ValueError
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a length of time in seconds")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Without a command, the main job: shows which backends run here, checks them, times them beside "
                    "what a PyTorch user would do instead, and trains a byte-level model. Under 6 minutes on 2 cores.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def choice(target: argparse.ArgumentParser, flag: str, choices, default, text: str) -> None:
        target.add_argument(flag, nargs="*", choices=sorted(choices), default=list(default), metavar="NAME",
                            help=f"{text}, of {', '.join(choices)} (default: {' '.join(default)})")

    choice(parser, "--workloads", cpu.CPU_WORKLOADS, ("field-4k", "text-4k"), "workloads to time")
    choice(parser, "--dtypes", _DTYPES, ("float32",), "dtypes to time")
    parser.add_argument("--seconds", type=_seconds, default=8.0, metavar="S",
                        help="how long the rounds of one timing go on (default: %(default)g)")
    parser.add_argument("--train-seconds", type=_seconds, default=120.0, metavar="S",
                        help="length of the training run; 0 skips it (default: %(default)g)")
    parser.add_argument("--skip-training", action="store_const", const=0.0, dest="train_seconds",
                        help="the same as --train-seconds 0")
    parser.add_argument("--quick", action="store_true",
                        help="only a few rounds and 10 seconds of training: to see whether everything works")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="folder for the report, plots and the model (default: %(default)s)")

    suite = commands.add_parser("cpu", help="time all CPU workloads for the record",
                                description="Times all CPU workloads, writes a report (JSON) and a plot (PNG).")
    choice(suite, "--workloads", cpu.CPU_WORKLOADS, cpu.CPU_WORKLOADS, "workloads to time")
    choice(suite, "--dtypes", _DTYPES, tuple(_DTYPES), "dtypes to time")
    choice(suite, "--peers", PEERS, cpu.DEFAULT_PEERS, "peers to time; dense is large, flex compiles long")
    suite.add_argument("--seconds", type=_seconds, default=20.0, metavar="S",
                       help="how long the rounds of one timing go on (default: %(default)g)")
    suite.add_argument("--no-memory", action="store_false", dest="memory", help="do not measure peak memory")
    suite.add_argument("--output", type=Path, default=cpu.default_output(), metavar="FILE",
                       help="report to write (default: %(default)s)")

    table = commands.add_parser("table", help="print the README's table of a report",
                                description="Prints a report as a table in Markdown.")
    table.add_argument("report", type=Path, metavar="REPORT.json")
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.command == "table":
        print(markdown_table(Report.load(arguments.report)))
        return
    environment.restart_with_warm_memory()
    dtypes = [_DTYPES[name] for name in arguments.dtypes]
    if arguments.command == "cpu":
        cpu.run(arguments.workloads, dtypes, arguments.peers, seconds=arguments.seconds, memory=arguments.memory,
                output=arguments.output, console=console)
        return
    seconds, train_seconds = arguments.seconds, arguments.train_seconds
    if arguments.quick:
        seconds, train_seconds = min(seconds, 1.0), min(train_seconds, 10.0)
    demo.run(demo.Settings(arguments.workloads, dtypes, seconds, train_seconds, arguments.output), console)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        _run(arguments, Console())
    except _EXPECTED as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


if __name__ == "__main__":
    main()
