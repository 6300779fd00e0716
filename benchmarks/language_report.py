"""Results of the comparison on text: kept as JSON, shown as tables."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import environment
from .language_runs import DENSE, FIRST, Trained
from .report import reading
from .tables import Grid
from .timing import Timing, timings_of

KIND, FORMAT = "language-comparison", 1

OURS = "torus"

BUDGETS = ("tokens", "seconds")
"""What two runs may have as much of."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "loops": {"streams": ("major_forward", "major_backward", "minor_forward", "minor_backward")},
    "no-spirals": {"streams": ("major_forward", "major_backward", "minor_forward", "minor_backward", "cross_u_to_v",
                               "cross_v_to_u")},
    "no-cross": {"streams": ("major_forward", "major_backward", "minor_forward", "minor_backward", "spiral_cw",
                             "spiral_ccw")},
    "no-ema": {"compounding": False},
}
"""What is left out of the torus: fields of its `ModelConfig`."""

LABELS = {
    OURS: "torus attention",
    DENSE: "dense attention",
    FIRST: "torus, first defaults",
    "loops": "torus, loops only",
    "no-spirals": "torus without spirals",
    "no-cross": "torus without cross flows",
    "no-ema": "torus without compounding",
}
"""The networks that are compared, in the order of tables and plots."""


@dataclass
class LanguageReport:
    """All that a comparison found.

    Attributes:
        machine: `environment.machine`, of the process that timed the steps.
        training: `language_runs.Training` as fields.
        tokens: that every network trains on.
        models: `ModelConfig.to_dict` of each network and context, with both.
        text: its ``bytes`` and ``files``.
        trained: the results.
        timings: of a training step, by ``network@context``; those of a context in the same rounds.
    """

    machine: dict[str, Any]
    training: dict[str, Any]
    tokens: int
    models: list[dict[str, Any]]
    text: dict[str, int]
    trained: list[Trained] = field(default_factory=list)
    timings: dict[str, Timing] = field(default_factory=dict)

    @property
    def contexts(self) -> list[int]:
        """In order."""
        return sorted({trained.context for trained in self.trained})

    def runs(self, network: str, context: int, budget: str = "tokens") -> list[Trained]:
        """One for each seed."""
        return [t for t in self.trained if (t.network, t.context, t.budget) == (network, context, budget)]

    def step(self, network: str, context: int) -> Timing:
        """Times of a training step."""
        return self.timings[f"{network}@{context}"]

    def seconds(self, trained: Trained) -> float:
        """What the steps of a run take: their number times the median step."""
        return trained.steps * self.step(trained.network, trained.context).spread.median

    def pairs(self, runs: list[Trained], network: str, budget: str = "tokens") -> list[tuple[float, float]]:
        """Bits per byte on the test part of runs beside those of another network at the same context from the same
        seeds, where there are both."""
        return [(run.bits_per_byte, other.bits_per_byte) for run in runs
                for other in self.runs(network, run.context, budget) if other.seed == run.seed]

    def save(self, path: Path) -> None:
        """Writes JSON.

        Raises:
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"kind": KIND, "format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> LanguageReport:
        """The report of `save`.

        Raises:
            ReportError: the file holds none.
            OSError: it cannot be read.
        """
        with reading(path, KIND, FORMAT) as fields:
            fields["trained"] = [Trained.from_dict(x) for x in fields["trained"]]
            fields["timings"] = timings_of(fields["timings"])
            return cls(**fields)


def _change(pairs: list[tuple[float, float]]) -> float:
    """Of the mean over pairs, relative to the second of each."""
    ours, theirs = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return ours / theirs - 1


def grid(report: LanguageReport) -> Grid:
    """A row for each network, context and budget: means over the seeds, with the smallest and the largest."""
    rows = []
    for context in report.contexts:
        for network in LABELS:
            for budget in BUDGETS:
                runs = report.runs(network, context, budget)
                if not runs:
                    continue
                bits = [trained.bits_per_byte for trained in runs]
                mean = f"{statistics.fmean(bits):.3f}"
                pairs = report.pairs(runs, DENSE)
                timing = report.step(network, context)
                ratio = timing.ratio_to(report.step(OURS, context)).median
                rows.append([
                    str(context), LABELS[network], budget, f"{runs[0].parameters:,}", str(runs[0].steps),
                    f"{report.seconds(runs[0]):.0f} s",
                    mean if len(bits) == 1 else f"{mean} ({min(bits):.3f}-{max(bits):.3f})",
                    f"{100 * _change(pairs):+.1f} %" if pairs else "",
                    f"{timing.spread.median * 1e3:.0f} ms" + ("" if network == OURS else f" ({ratio:.2f}x)"),
                ])
    return Grid("Language models at long contexts", (
        "context", "network", "equal", "parameters", "steps", "training time", "bits per byte, test part",
        "against dense, equal tokens and seeds", "step",
    ), rows, left=3)


def verdicts(report: LanguageReport) -> list[str]:
    """Torus and dense attention, a sentence for each context and budget."""
    said = []
    for context in report.contexts:
        for budget in BUDGETS:
            if pairs := report.pairs(report.runs(OURS, context), DENSE, budget):
                change = _change(pairs)
                fewer = sum(ours < theirs for ours, theirs in pairs)
                said.append(f"Context {context}, equal {budget}: the torus needs {abs(change):.1%} "
                            f"{'fewer' if change < 0 else 'more'} bits than dense attention (fewer from {fewer} of "
                            f"{len(pairs)} seeds).")
    return said


def describe(report: LanguageReport) -> str:
    """What the table cannot say."""
    training = report.training
    seeds = len({trained.seed for trained in report.trained})
    ours = next(model for model in report.models if model["network"] == OURS)
    rates = "".join(f" ({LABELS[network]}: {rate:g})" for network, rate in training["other_learning_rates"].items()
                    if any(trained.network == network for trained in report.trained))
    lattices = ", ".join(f"{m['n_major']}x{m['n_minor']}" for m in report.models if m["network"] == OURS)
    return (
        f"Bytes of {report.text['files']} files, {report.text['bytes'] / 1e6:.1f} MB; {report.tokens:,} tokens in "
        f"windows of the context, {training['batch_size']} to the step, AdamW with a peak learning rate of "
        f"{training['learning_rate']:g}{rates}; width {ours['width']}, {ours['layers']} layers, {ours['heads']} heads; "
        f"lattices {lattices}. Tested on {training['test_tokens']:,} tokens after the last step. Seeds: {seeds}; "
        "means, in parentheses smallest and largest. Equal seconds: steps times the median step, in rounds that run "
        "every network of the context once, are those of the torus; the learning rate ends with the steps. Validations "
        f"are not counted. {environment.describe(report.machine)}."
    )


def markdown(report: LanguageReport) -> str:
    """The table, what follows from it, and how it was made."""
    found = "\n".join(f"- {line}" for line in verdicts(report))
    return f"{grid(report).markdown()}\n\n{found}\n\n{describe(report)}"
