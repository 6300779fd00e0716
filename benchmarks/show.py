"""Any report as Markdown, whichever command wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import (
    coherence_report,
    dynamics_report,
    field_report,
    fuzz_report,
    generation,
    gpu_report,
    language_report,
    precision_report,
    scale_report,
    transfer_report,
)
from .report import Report
from .tables import markdown_report

_REPORTS: dict[str, tuple[Any, Callable[[Any], str]]] = {
    coherence_report.KIND: (coherence_report.CoherenceReport, coherence_report.markdown),
    dynamics_report.KIND: (dynamics_report.DynamicsReport, dynamics_report.markdown),
    field_report.KIND: (field_report.FieldReport, field_report.markdown),
    generation.KIND: (generation.GenerationReport, generation.markdown),
    gpu_report.KIND: (gpu_report.GpuReport, gpu_report.markdown),
    language_report.KIND: (language_report.LanguageReport, language_report.markdown),
    precision_report.KIND: (precision_report.PrecisionReport, precision_report.markdown),
    scale_report.KIND: (scale_report.ScaleReport, scale_report.markdown),
    transfer_report.KIND: (transfer_report.TransferReport, transfer_report.markdown),
}
"""What loads a report of each kind, and what shows it."""


def kind_of(path: Path) -> str | None:
    """What a file says that it is a report of; None where it says nothing.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text()).get("kind")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return None


def markdown_of(path: Path) -> str:
    """The tables of a report, and how it was measured, as the README shows them.

    Raises:
        ReportError: the file holds none.
        OSError: it cannot be read.
    """
    kind = kind_of(path)
    if kind == fuzz_report.KIND:
        return fuzz_report.markdown(path)
    if kind in _REPORTS:
        report, markdown = _REPORTS[kind]
        return markdown(report.load(path))
    return markdown_report(Report.load(path))
