"""Outcomes of the fuzzer (``tests/fuzz.py``): kept as JSON, shown as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import environment
from .report import ReportError
from .tables import Grid

KIND, FORMAT = "fuzz", 1

OUTCOMES = ("right", "ValueError", "TypeError", "BackendError")
"""A right answer, or the documented error; any other outcome ends the fuzzer."""


def save(path: Path, counts: Mapping[tuple[str, str], int], **about: Any) -> None:
    """Writes counts by function and outcome, and what they are ``about``.

    Raises:
        OSError: the file cannot be written.
    """
    functions: dict[str, dict[str, int]] = {}
    for (function, outcome), count in counts.items():
        functions.setdefault(function, {})[outcome] = count
    content = {"kind": KIND, "format": FORMAT, "machine": environment.machine(), **about, "functions": functions}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def markdown(path: Path) -> str:
    """The table of a report, and the command that made it.

    Raises:
        ReportError: the file holds none.
        OSError: it cannot be read.
    """
    try:
        report = json.loads(path.read_text())
        if (report["kind"], report["format"]) != (KIND, FORMAT):
            raise ReportError(f"{path} is not a report of the fuzzer in format {FORMAT}")
        functions = {name: [counts.get(outcome, 0) for outcome in OUTCOMES]
                     for name, counts in sorted(report["functions"].items())}
        functions["all"] = [sum(column) for column in zip(*functions.values(), strict=True)]
        rows = [[name, *map(str, counts), str(sum(counts))] for name, counts in functions.items()]
        note = (f"`python tests/fuzz.py --cases {report['cases']} --seed {report['seed']} --backend "
                f"{report['backend']}`. {environment.describe(report['machine'])}.")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path} is not a report of the fuzzer: {error!r}") from error
    return f"{Grid('Fuzzing', ['function', *OUTCOMES, 'calls'], rows, left=1).markdown()}\n\n{note}"
