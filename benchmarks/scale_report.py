"""Results of training on several processes: kept as JSON, shown as tables and as a plot."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import environment
from .report import compact, reading
from .scale_arithmetic import LINKS, RATE
from .tables import Grid, milliseconds

KIND, FORMAT = "scale", 1

SINGLE = "one process"


@dataclass(frozen=True)
class Measured:
    """What one process found in one run.

    Attributes:
        losses: of every step, in nats per token.
        weights: bytes of parameters that the process keeps.
        states: bytes of the optimiser's state that it keeps.
        sent: bytes that it sent in one step.
        seconds: of the steps that were timed.
    """

    losses: list[float]
    weights: int
    states: int
    sent: float
    seconds: list[float]


@dataclass
class ScaleReport:
    """One run of the comparison.

    Attributes:
        machine: `benchmarks.environment.machine`.
        training: batch, seq_len, parts, steps and processes, and the model's width and layers.
        runs: a `Measured` for each process, by `SINGLE` and the layouts.
        predicted: bytes sent in one step by each process, by layout, as `scale_arithmetic.Step.sent` has them.
        least_tokens: tokens per process and step from on which sending hides, with ``layout`` and ``link``.
    """

    machine: dict[str, Any]
    training: dict[str, int]
    runs: dict[str, list[Measured]]
    predicted: dict[str, list[float]]
    least_tokens: list[dict[str, Any]] = field(default_factory=list)

    def difference(self, name: str) -> float:
        """The largest relative difference of a loss from that of one process."""
        single = self.runs[SINGLE][0].losses
        return max(abs(x - y) / y for run in self.runs[name] for x, y in zip(run.losses, single, strict=True))

    def save(self, path: Path) -> None:
        """Writes JSON, times to five digits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"kind": KIND, "format": FORMAT} | dataclasses.asdict(self)
        for runs in fields["runs"].values():
            for run in runs:
                run["seconds"] = [float(f"{s:.5g}") for s in run["seconds"]]
        path.write_text(compact(fields) + "\n")

    @classmethod
    def load(cls, path: Path) -> ScaleReport:
        """The report that `save` wrote.

        Raises:
            ReportError: the file does not hold one.
            OSError: the file cannot be read.
        """
        with reading(path, KIND, FORMAT) as fields:
            runs = {name: [Measured(**run) for run in of_name] for name, of_name in fields.pop("runs").items()}
            return cls(**fields, runs=runs)


def _each(numbers: list[float], unit: float = 2**20) -> str:
    """A number for each process, or one where they are equal, in MiB unless said otherwise."""
    shown = [f"{number / unit:.4g}" for number in numbers]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def grid(report: ScaleReport) -> Grid:
    """A row for each run."""
    head = ["layout", "loss differs by", "weights, MiB", "optimiser, MiB", "sent a step, MiB", "by formula, MiB",
            "step, ms"]
    rows = []
    for name, runs in report.runs.items():
        predicted = report.predicted.get(name, [0.0])
        rows.append([name, "-" if name == SINGLE else f"{report.difference(name):.1e}",
                     _each([r.weights for r in runs]), _each([r.states for r in runs]), _each([r.sent for r in runs]),
                     _each(predicted), milliseconds(statistics.median(runs[0].seconds))])
    return Grid("Two processes beside one", head, rows, left=1)


def tokens_grid(report: ScaleReport) -> Grid:
    """Tokens per process and step from on which sending hides behind computing, by layout and link."""
    found = {(entry["layout"], entry["link"]): entry["tokens"] for entry in report.least_tokens}
    layouts = list(dict.fromkeys(entry["layout"] for entry in report.least_tokens))
    rows = [[name, *(_tokens(found[name, link]) for link in LINKS)] for name in layouts]
    return Grid("Tokens that hide the traffic", ["layout", *(f"{k}, {v / 1e9:g} GB/s" for k, v in LINKS.items())], rows,
                left=1)


def _tokens(number: float) -> str:
    return "never" if number == float("inf") else "any" if number < 1 else f"{number:,.0f}"


def markdown(report: ScaleReport) -> str:
    """The tables of the documentation, and how they were made."""
    t, machine = report.training, report.machine
    is_busy = (machine["load_average"] or 0) > machine["cores"]
    busy = " Other programs had the cores most of the time: the times say nothing here." if is_busy else ""
    return (
        f"{grid(report).markdown()}\n\nA model of width {t['width']} with {t['layers']} layers in float32, "
        f"{t['batch']} sequences of {t['seq_len']} tokens a step in {t['parts']} parts, {t['steps']} steps, the same "
        f"samples everywhere; {t['processes']} processes with gloo and one thread each on this CPU, where they share "
        "memory and caches: the times say what the layouts cost here, and nothing of other machines. The losses' "
        "largest relative difference is from those of one process; a number for each process where they differ; "
        "times are medians of steps that took turns. Bytes are those of one step, collectives counted as rings. "
        f"{environment.describe(machine)}.{busy}\n\n{tokens_grid(report).markdown()}\n\nTokens per process and step "
        "(under `fsdp`, and part) from on which the arithmetic lets sending hide behind computing, not a measurement: "
        "the size `gpt2` under autocast on 8 processes, gradients and parameters sent in float32, for "
        f"{RATE / 1e12:g} TFLOP/s a process and links of these nominal rates. *any*: nothing that is sent is "
        "independent of the batch, and the activations take less time than the computation; *never*: they take longer."
    )


def write_plot(report: ScaleReport, path: Path) -> None:
    """Losses' differences, what a process keeps and sends, and times of a step, as a PNG."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    (losses, memory), (sent, times) = figure.subplots(2, 2)
    names = list(report.runs)
    single = report.runs[SINGLE][0].losses
    for place, name in enumerate(n for n in names if n != SINGLE):
        differences = [abs(x - y) / y for x, y in zip(report.runs[name][0].losses, single, strict=True)]
        losses.plot(range(1, len(single) + 1), differences, color=f"C{place}", marker=".", label=name,
                    ls=("-", "--", "-.", ":")[place])
    losses.axhline(2.0**-23, color="0.6", lw=0.8, label="epsilon of float32")
    losses.set(xlabel="step", ylabel="relative difference of the loss", title="Losses against one process")
    losses.set_ylim(bottom=0)
    losses.legend(fontsize=8)
    rows = range(len(names))
    worst = {kind: [max(getattr(r, kind) for r in report.runs[name]) / 2**20 for name in names]
             for kind in ("weights", "states", "sent")}
    memory.barh(rows, worst["weights"], color="C0", label="weights")
    memory.barh(rows, worst["states"], left=worst["weights"], color="C1", label="optimiser")
    memory.set(xlabel="MiB, of the process that keeps most", title="Kept by a process")
    memory.legend(fontsize=8)
    sent.barh(rows, worst["sent"], color="C2", label="counted")
    sent.plot([max(report.predicted.get(name, [0.0])) / 2**20 for name in names], rows, "k|", ms=16, label="by formula")
    sent.set(xlabel="MiB a step, of the process that sends most", title="Sent by a process")
    sent.legend(fontsize=8)
    times.boxplot([[1e3 * s for s in report.runs[name][0].seconds] for name in names], orientation="horizontal",
                  positions=rows, widths=0.6)
    times.set(xlabel="ms a step", title="Time of a step")
    times.set_xlim(left=0)
    for axes in (memory, sent, times):
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
    for axes in (losses, memory, sent, times):
        axes.grid(alpha=0.2)
    figure.suptitle(environment.describe(report.machine), fontsize=7, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
