"""Any report as Markdown, whichever command wrote it."""

from __future__ import annotations

import json
from pathlib import Path

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
    if kind == gpu_report.KIND:
        return gpu_report.markdown(gpu_report.GpuReport.load(path))
    if kind == field_report.KIND:
        return field_report.markdown(field_report.FieldReport.load(path))
    if kind == precision_report.KIND:
        return precision_report.markdown(precision_report.PrecisionReport.load(path))
    if kind == coherence_report.KIND:
        return coherence_report.markdown(coherence_report.CoherenceReport.load(path))
    if kind == language_report.KIND:
        return language_report.markdown(language_report.LanguageReport.load(path))
    if kind == generation.KIND:
        return generation.markdown(generation.GenerationReport.load(path))
    if kind == transfer_report.KIND:
        return transfer_report.markdown(transfer_report.TransferReport.load(path))
    if kind == scale_report.KIND:
        return scale_report.markdown(scale_report.ScaleReport.load(path))
    if kind == dynamics_report.KIND:
        return dynamics_report.markdown(dynamics_report.DynamicsReport.load(path))
    if kind == fuzz_report.KIND:
        return fuzz_report.markdown(path)
    return markdown_report(Report.load(path))
