"""Plots of the comparison on text, as PNG."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import environment
from .language_report import ABLATIONS, LABELS, OURS, LanguageReport
from .language_runs import DENSE, FIRST, Trained

_COLOURS = {OURS: "C0", DENSE: "C3", FIRST: "0.6"}


def _curves(axes: Axes, runs: Sequence[Trained], x: Callable[[Trained, int], float], **style) -> None:
    """The mean validation curve of runs over ``x`` of a step, and each of them in pale."""
    if not runs:
        return
    places = [x(runs[0], step) for step, _ in runs[0].curve]
    if len(runs) > 1:
        for run in runs:
            axes.plot(places, [bits for _, bits in run.curve], color=style["color"], lw=0.6, alpha=0.4)
    means = [statistics.fmean(bits) for bits in zip(*([b for _, b in run.curve] for run in runs), strict=True)]
    axes.plot(places, means, marker="o", ms=3, **style)


def write_curves(report: LanguageReport, path: Path) -> None:
    """Bits per byte on the validation part over tokens and over seconds, a row for each context."""
    contexts = report.contexts
    figure = Figure(figsize=(10, 0.8 + 3.4 * len(contexts)), layout="constrained")
    panels = figure.subplots(len(contexts), 2, squeeze=False, sharey="row")
    windows = report.training["batch_size"]
    for (by_tokens, by_seconds), context in zip(panels, contexts, strict=True):
        def tokens(run: Trained, step: int) -> float:
            return step * run.context * windows / 1e6

        def seconds(run: Trained, step: int) -> float:
            return step * report.step(run.network, run.context).spread.median

        for network, color in _COLOURS.items():
            runs = report.runs(network, context)
            _curves(by_tokens, runs, tokens, color=color, label=LABELS[network])
            _curves(by_seconds, runs, seconds, color=color, label=LABELS[network])
        _curves(by_seconds, report.runs(DENSE, context, "seconds"), seconds, color=_COLOURS[DENSE], ls="--",
                label=f"{LABELS[DENSE]}, equal seconds")
        by_tokens.set(ylabel="bits per byte, validation part", xlabel="million tokens", title=f"context {context}")
        by_seconds.set(xlabel="seconds: steps times the median step", title=f"context {context}")
        for axes in (by_tokens, by_seconds):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.suptitle(environment.describe(report.machine), fontsize=7, wrap=True)
    figure.savefig(path, dpi=150)


def write_ablations(report: LanguageReport, path: Path) -> None:
    """Bits per byte on the test part and the time of a step, with parts of the torus left out; of the seeds that all
    networks have."""
    context = report.contexts[0]
    networks = [name for name in (OURS, *ABLATIONS, FIRST, DENSE) if report.runs(name, context)]
    seeds = set.intersection(*({run.seed for run in report.runs(name, context)} for name in networks))
    figure = Figure(figsize=(10, 0.9 + 0.42 * len(networks)), layout="constrained")
    quality, speed = figure.subplots(1, 2, sharey=True)
    for place, network in enumerate(networks):
        bits = [trained.bits_per_byte for trained in report.runs(network, context) if trained.seed in seeds]
        step = report.step(network, context).spread
        color = _COLOURS.get(network, "C0")
        quality.plot(statistics.fmean(bits), place, "o", ms=7, color=color)
        quality.plot(bits, [place] * len(bits), "|", ms=12, color=color)
        quality.annotate(f"{statistics.fmean(bits):.3f}", (max(bits), place), (8, 0), textcoords="offset points",
                         va="center", fontsize=8)
        speed.errorbar(step.median * 1e3, place, fmt="o", ms=6, capsize=3, color=color,
                       xerr=[[(step.median - step.lower) * 1e3], [(step.upper - step.median) * 1e3]])
        speed.annotate(f"{step.median * 1e3:.0f}", (step.upper * 1e3, place), (8, 0), textcoords="offset points",
                       va="center", fontsize=8)
    quality.set_yticks(range(len(networks)), [LABELS[name] for name in networks])
    quality.invert_yaxis()
    quality.set(xlabel="bits per byte, test part, equal tokens",
                title=f"context {context}, {len(seeds)} seed{'s' * (len(seeds) != 1)}")
    speed.set(xlabel="milliseconds a training step: median and quartiles")
    for axes in (quality, speed):
        axes.margins(x=0.25, y=0.1)
        axes.grid(axis="x", alpha=0.3)
    speed.set_xlim(left=0)
    figure.savefig(path, dpi=150)
