"""Pages of results: tables and plots for the newest report of a kind in ``benchmarks/results``.

A page asks for them with a line ``<!-- results: KIND -->``; where there is no report, a sentence says so.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.report import ReportError
from benchmarks.show import markdown_of

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "results"

_MARKER = re.compile(r"^<!-- results: ([a-z0-9-]+) -->$", re.MULTILINE)
_DATED = re.compile(r"^(?P<kind>[a-z0-9-]+)-(?P<date>\d{4}-\d{2}-\d{2})(-[a-z0-9-]+)?$")


def newest(kind: str, folder: Path) -> str | None:
    """``KIND-DATE`` of the newest report of a kind, or of its newest plot where there is no report."""
    for ending in ("json", "png"):
        names = (_DATED.match(path.stem) for path in folder.glob(f"*.{ending}"))
        dates = [name["date"] for name in names if name and name["kind"] == kind]
        if dates:
            return f"{kind}-{max(dates)}"
    return None


def table(path: Path) -> str:
    """A report as Markdown; empty for files that `benchmarks` did not write, such as the history of a training run."""
    try:
        return markdown_of(path)
    except ReportError:
        return ""


def markdown(kind: str, up: str, folder: Path = FOLDER) -> str:
    """Tables, plots, and where they come from.

    Args:
        kind: the part of the files' names before their date.
        up: path from the page to ``folder``.
    """
    name = newest(kind, folder)
    if name is None:
        return f"*No results of this kind (`{kind}`) are recorded in this revision.*"
    report = folder / f"{name}.json"
    parts = [table(report)] if report.is_file() else []
    parts += [f"![{picture.stem}]({up}/{picture.name})" for picture in sorted(folder.glob(f"{name}*.png"))]
    if report.is_file():
        parts.append(f"Report: {{download}}`{report.name} <{up}/{report.name}>`")
    return "\n\n".join(part for part in parts if part)


def fill_in(text: str, up: str, folder: Path = FOLDER) -> str:
    """A page with its markers replaced."""
    return _MARKER.sub(lambda match: markdown(match[1], up, folder), text)
