"""What the command lines of the benchmarks share."""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .candidates import DIRECTIONS

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = ("float32", "bfloat16")


def seconds(text: str) -> float:
    """A length of time, zero included."""
    value = float(text)  # argparse reports the ValueError
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a length of time in seconds")
    return value


def at_least(least: int, text: str) -> int:
    """An integer from ``least`` on."""
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return value


def add_choice(
    parser: argparse.ArgumentParser, flag: str, choices: Iterable[str], default: Sequence[str], text: str, *,
    may_be_none: bool = False,
) -> None:
    """An option that takes any number of names."""
    choices = list(choices)
    parser.add_argument(flag, nargs="*" if may_be_none else "+", choices=sorted(choices), default=list(default),
                        metavar="NAME",
                        help=f"{text}, of {', '.join(choices)} (default: {' '.join(default)})")


def add_dtypes(parser: argparse.ArgumentParser, default: Sequence[str] = DEFAULT_DTYPES) -> None:
    add_choice(parser, "--dtypes", DTYPES, default, "dtypes to time")


def add_directions(parser: argparse.ArgumentParser) -> None:
    add_choice(parser, "--directions", DIRECTIONS, DIRECTIONS, "directions to time")


def add_seconds(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument("--seconds", type=seconds, default=default, metavar="S",
                        help="how long the rounds of one timing go on (default: %(default)g)")


def add_longest_call(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--longest-call", type=seconds, default=20.0, metavar="S",
                        help=f"{what} is left out where one call takes longer (default: %(default)g)")


def add_output(parser: argparse.ArgumentParser, kind: str) -> None:
    """The report to write, by default ``results/<kind>-<today>.json`` beside this file."""
    parser.add_argument("--output", type=Path, default=RESULTS / f"{kind}-{datetime.date.today().isoformat()}.json",
                        metavar="FILE", help="report to write, a plot is put beside it (default: %(default)s)")


def dtypes(names: Iterable[str]) -> list[torch.dtype]:
    """The dtypes of these names."""
    return [DTYPES[name] for name in names]
