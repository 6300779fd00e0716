"""Text: torus attention beside a dense transformer of equal size, trained alike at long contexts."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from torus_model.config import recommended_model
from torus_model.dense import dense_config
from torus_model.field.commands.options import check_device
from torus_model.files import replacing
from torus_model.lm import ModelConfig

from . import arguments, environment, language_plots
from .language_report import ABLATIONS, BUDGETS, KIND, LABELS, OURS, LanguageReport, grid
from .language_runs import DENSE, FIRST, Runs, Trained, Training
from .progress import Say, silent, steps
from .report import ReportError
from .timing import Timing, time_side_by_side, timings_of

TIMINGS = "timings.json"
"""Where a folder of runs keeps the times of training steps."""


@dataclass(frozen=True)
class Settings:
    """A comparison. The defaults end within 40 minutes on two cores.

    Attributes:
        model: sizes; lattice and options of the torus come from `recommended_model`.
        contexts: tokens per window, each a power of two.
        tokens: that every network trains on.
        training: of all networks.
        seeds: of initial weights and batches.
        networks: names of `LABELS`; all but torus and dense attention are compared at the first context alone.
        budgets: of dense attention: ``"tokens"``, ``"seconds"`` or both.
    """

    model: ModelConfig = ModelConfig(width=64, heads=2)  # noqa: RUF009 (frozen)
    contexts: tuple[int, ...] = (2048, 4096)
    tokens: int = 600 * 2048
    training: Training = Training()  # noqa: RUF009 (frozen)
    seeds: tuple[int, ...] = (0, 1)
    networks: tuple[str, ...] = tuple(LABELS)
    budgets: tuple[str, ...] = BUDGETS


def add_parser(commands) -> None:
    """The command ``language``."""
    default = Settings()
    parser = commands.add_parser(
        "language", help="torus attention and a dense transformer on text: bits per byte at equal tokens and time",
        description="Trains a TorusLM and a dense causal transformer with equally many parameters on the same windows "
                    "of bytes in the same order: as many tokens for both, and again as many seconds, which the median "
                    "time of a step, measured side by side, turns into steps. Then the torus with parts left out. "
                    "Reports bits per byte on a part of the text that is looked at once. Writes a report (JSON) and "
                    "plots (PNG). At most 40 minutes on 2 cores. Runs that are complete in --runs are not repeated.",
    )
    positive = functools.partial(arguments.at_least, 1)
    parser.add_argument("--runs", type=Path, default=Path("runs/language-comparison"), metavar="DIR",
                        help="folder for the runs (default: %(default)s)")
    parser.add_argument("--data", metavar="PATH",
                        help="file or folder of text (default: the sources of Python's standard library)")
    arguments.add_choice(parser, "--networks", LABELS, default.networks, "networks to train")
    arguments.add_choice(parser, "--budgets", BUDGETS, default.budgets,
                         "what dense attention gets as much of as the torus")
    parser.add_argument("--contexts", type=positive, nargs="+", default=default.contexts, metavar="N",
                        help=f"tokens per window, powers of two (default: {' '.join(map(str, default.contexts))})")
    parser.add_argument("--tokens", type=positive, default=default.tokens, metavar="N",
                        help="that every network trains on (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=len(default.seeds), metavar="N",
                        help="how many (default: %(default)s)")
    for name in ("width", "layers", "heads"):
        parser.add_argument(f"--{name}", type=positive, default=getattr(default.model, name), metavar="N",
                            help="of the models (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=default.training.batch_size, metavar="N",
                        help="windows per step (default: %(default)s)")
    rates = default.training.other_learning_rates
    for flag, of, rate in (("--learning-rate", "the torus", default.training.learning_rate),
                           ("--dense-learning-rate", LABELS[DENSE], rates[DENSE])):
        parser.add_argument(flag, type=float, default=rate, metavar="RATE",
                            help=f"peak of the schedule of {of} (default: %(default)s)")
    parser.add_argument("--device", default=default.training.device, help="where to train (default: %(default)s)")
    parser.add_argument("--retime", action="store_true",
                        help="time training steps anew, although --runs holds their times; a dense run on the budget "
                             "of seconds is repeated only where its steps would change by more than 5 %%")
    parser.add_argument("--complete-only", action="store_true",
                        help="train nothing: report the runs that are complete in --runs")
    arguments.add_seconds(parser, 60.0)
    arguments.add_output(parser, KIND)
    parser.set_defaults(run=_run)


def settings_of(given: argparse.Namespace) -> Settings:
    """What the command line asks for.

    Raises:
        TypeError, ValueError: a value does not fit; the message names it.
    """
    if OURS not in given.networks:
        raise ValueError(f"--networks must hold {OURS}, whose seconds are the budget of the others")
    training = dataclasses.replace(
        Training(), batch_size=given.batch_size, learning_rate=given.learning_rate,
        other_learning_rates=Training().other_learning_rates | {DENSE: given.dense_learning_rate}, data=given.data,
        device=check_device(given.device),
    )
    model = dataclasses.replace(Settings().model, width=given.width, layers=given.layers, heads=given.heads)
    networks = tuple(name for name in LABELS if name in given.networks)
    budgets = tuple(budget for budget in BUDGETS if budget in given.budgets)
    return Settings(model, tuple(given.contexts), given.tokens, training, tuple(range(given.seeds)), networks, budgets)


def _run(given: argparse.Namespace, console: Console) -> None:
    try:
        comparison = Comparison(settings_of(given), given.runs)
    except (TypeError, ValueError) as error:
        raise ReportError(str(error)) from error
    environment.restart_with_warm_memory()
    run(comparison, seconds=given.seconds, retime=given.retime, complete_only=given.complete_only, output=given.output,
        console=console)


@dataclass(frozen=True)
class Planned:
    """A run to make: a network at a context with its budget, ``"tokens"`` or ``"seconds"``, from a seed."""

    network: str
    context: int
    budget: str
    seed: int


class Comparison:
    """Times and trains networks into a report.

    Args:
        settings: what to compare.
        runs: folder for one run of each network, context, budget and seed; complete ones are not repeated.

    Raises:
        DataError: there is too little text.
        ValueError: a context is no power of two from 4 on, or longer than ``settings.tokens``.
    """

    def __init__(self, settings: Settings, runs: Path) -> None:
        for context in settings.contexts:
            if context * settings.training.batch_size > settings.tokens:
                raise ValueError(f"tokens must be at least one step of {context * settings.training.batch_size}, "
                                 f"got {settings.tokens}")
        self.settings = settings
        self.runs = Runs(settings.training, runs)
        self.models = {
            (network, context): self._config(network, context)
            for context in settings.contexts for network in settings.networks if self._is_compared(network, context)
        }
        self.report = LanguageReport(
            environment.machine(), training=dataclasses.asdict(settings.training), tokens=settings.tokens,
            models=[{"network": network, "context": context} | config.to_dict()
                    for (network, context), config in self.models.items()],
            text={"bytes": self.runs.corpus.bytes, "files": self.runs.corpus.files},
        )

    def _is_compared(self, network: str, context: int) -> bool:
        return network in (OURS, DENSE) or context == self.settings.contexts[0]

    def _config(self, network: str, context: int) -> ModelConfig:
        """The architecture of a network at a context."""
        ours = recommended_model(self.settings.model, context)
        if network == DENSE:
            return dense_config(ours)
        if network == FIRST:
            return first_model(self.settings.model, context)
        return dataclasses.replace(ours, **ABLATIONS.get(network, {}))

    def planned(self) -> list[Planned]:
        """The runs, those that answer the question first."""
        runs = [Planned(network, context, budget, seed)
                for seed in self.settings.seeds for (network, context) in self.models
                for budget in (self.settings.budgets if network == DENSE else ("tokens",))]
        return sorted(runs, key=lambda run: run.network not in (OURS, DENSE))

    def steps(self, run: Planned) -> int:
        """Training steps of a run: its budget's seconds count in median steps, its tokens in windows."""
        context = run.context
        by_tokens = self.settings.tokens // (context * self.settings.training.batch_size)
        if run.budget == "tokens":
            return by_tokens
        ours, theirs = (self.report.step(name, context).spread.median for name in (OURS, run.network))
        return max(1, round(by_tokens * ours / theirs))

    def time_steps(self, seconds: float, say: Say, *, retime: bool = False) -> None:
        """Times a training step of every network, those of a context in the same rounds; or takes the times that the
        folder of the runs holds."""
        file = self.runs.folder / TIMINGS
        key = json.dumps([[network, context, config.to_dict()] for (network, context), config in self.models.items()]
                         + [self.settings.training.batch_size, self.settings.training.device])
        if not retime and (kept := _kept_timings(file, key)) is not None:
            self.report.timings, self.report.machine = kept
            return
        for context in self.settings.contexts:
            candidates = {}
            for (network, of), config in self.models.items():
                if of == context:
                    endless = self.runs.steps_of(network, config, context, seed=0, steps=10**6)
                    candidates[network] = functools.partial(_next, endless, self.settings.training.device)
            found = time_side_by_side(candidates, seconds=seconds / len(self.settings.contexts),
                                      on_round=lambda done, at=context: say(f"context {at}, round {done}"))
            self.report.timings |= {f"{network}@{context}": timing for network, timing in found.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps({
                "key": key, "machine": self.report.machine,
                "timings": {name: dataclasses.asdict(timing) for name, timing in self.report.timings.items()},
            }))

    def _arguments(self, run: Planned) -> tuple[str, ModelConfig, int, str, int, int]:
        config = self.models[run.network, run.context]
        return run.network, config, run.context, run.budget, run.seed, self.steps(run)

    def is_complete(self, run: Planned) -> bool:
        """Whether the folder of the runs holds the result."""
        return self.runs.find(*self._arguments(run)) is not None

    def train(self, run: Planned, say: Say = silent) -> Trained:
        """The result of one run, which is added to the report."""
        trained = self.runs.train(*self._arguments(run), say)
        self.report.trained.append(trained)
        return trained


def _next(losses, device: str) -> None:
    next(losses)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _kept_timings(file: Path, key: str) -> tuple[dict[str, Timing], dict] | None:
    try:
        fields = json.loads(file.read_text())
        if fields["key"] != key:
            return None
        return timings_of(fields["timings"]), fields["machine"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def first_model(sizes: ModelConfig, context: int) -> ModelConfig:
    """The same lattice with the settings that the model had before the comparison."""
    ours, first = recommended_model(sizes, context), ModelConfig()
    return dataclasses.replace(ours, rotary=first.rotary, graded_heads=first.graded_heads, qk_gain=first.qk_gain)


def run(
    comparison: Comparison, *, seconds: float, retime: bool, complete_only: bool, output: Path, console: Console
) -> LanguageReport:
    """Times and trains every network, prints the table and writes ``output`` and plots beside it.

    Raises:
        ReportError: of ``complete_only`` runs there is none.
        TrainingError: a loss is no longer finite.
        OSError: a file cannot be written.
    """
    report, planned = comparison.report, comparison.planned()
    console.print(environment.describe(report.machine), highlight=False)
    with steps(console, 1 + len(planned)) as start:
        comparison.time_steps(seconds, start("Timing training steps"), retime=retime)
        if complete_only:
            planned = [each for each in planned if comparison.is_complete(each)]
            if not planned:
                raise ReportError(f"--runs holds no complete run with these settings: {comparison.runs.folder}")
        for each in planned:
            comparison.train(each, start(f"{LABELS[each.network]}, context {each.context}, equal {each.budget}, "
                                         f"seed {each.seed}"))
            report.save(output)
    language_plots.write_curves(report, output.with_suffix(".png"))
    ablations = output.with_name(f"{output.stem}-ablations.png")
    language_plots.write_ablations(report, ablations)
    console.print(grid(report).rich())
    console.print(f"Written: {output}, {output.with_suffix('.png')} and {ablations}", highlight=False)
    return report
