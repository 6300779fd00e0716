"""Fine-tuning, distillation, compression and experts of small language models: loss and size before and after."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from torus_model import ModelConfig, TorusLM, checkpoint, data
from torus_model.checkpoint import load_model, save_compressed
from torus_model.compression import bytes_of, prune, quantize
from torus_model.config import TrainConfig
from torus_model.evaluation import score
from torus_model.moe import MixtureOfExperts
from torus_model.run import Run

from . import arguments, environment
from .progress import steps
from .transfer_report import (
    COMPRESSION,
    DISTILLATION,
    EXPERTS,
    TUNING,
    Curve,
    Outcome,
    TransferReport,
    grid,
    write_plot,
)

MODEL = ModelConfig(width=64, layers=4, heads=4)
SPARSITIES = (0.2, 0.4, 0.6, 0.8)
TUNED_SPARSITIES = (0.6, 0.8)
NUMBER_OF_EXPERTS = 4
POINTS = 8
"""How often a run is validated, the end included, the beginning not."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Attributes:
        steps: of the base model, of students and of mixtures of experts.
        tune_steps: of fine-tuning.
        seeds: of students.
        max_bytes: of each text.
    """

    model: ModelConfig = MODEL
    steps: int = 400
    tune_steps: int = 160
    seeds: int = 2
    seq_len: int = 256
    batch_size: int = 2
    windows: int = 32
    max_bytes: int = 4 * 2**20
    backend: str | None = None

    @property
    def student(self) -> ModelConfig:
        """Half as wide and half as deep as the model."""
        return dataclasses.replace(self.model, width=self.model.width // 2, layers=self.model.layers // 2,
                                   heads=self.model.heads // 2)


def write_prose(path: Path) -> int:
    """Writes the descriptions of the installed packages, in the order of their names; returns how many there are."""
    found = {package.metadata["Name"].lower(): str(package.metadata.get_payload() or package.metadata["Description"])
             for package in importlib.metadata.distributions()}
    path.write_text("\n".join(text for _, text in sorted(found.items())), encoding="utf-8", errors="replace")
    return len(found)


class Study:
    """Runs experiments into a report.

    Args:
        settings: sizes.
        folder: where checkpoints go.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.prose = folder / "prose.txt"
        packages = write_prose(self.prose)
        s = settings
        self.report = TransferReport(
            environment.machine(),
            f"Base model: width {s.model.width}, {s.model.layers} layers, {s.model.heads} heads, lattice "
            f"{s.model.n_major} x {s.model.n_minor}, {s.steps} steps of {s.batch_size} sequences of {s.seq_len} bytes "
            f"of the standard library's sources (its first {s.max_bytes / 2**20:.0f} MiB). Prose: the descriptions of "
            f"{packages} installed packages ({self.prose.stat().st_size:,} bytes). Students: width {s.student.width}, "
            f"{s.student.layers} layers, temperature 2, {s.seeds} seeds. Experts: {NUMBER_OF_EXPERTS}, one for each "
            "token, each as large as the dense layer.",
            NUMBER_OF_EXPERTS,
        )
        self.base = folder / "base.safetensors"

    def config(self, **changes: Any) -> TrainConfig:
        s = self.settings
        fields = {"model": s.model, "steps": s.steps, "max_bytes": s.max_bytes, "seq_len": s.seq_len,
                  "batch_size": s.batch_size, "validation_windows": s.windows, "backend": s.backend}
        return TrainConfig(**fields | changes)

    def train(self, feature: str, variant: str, config: TrainConfig, path: Path | None = None) -> Run:
        """Trains, keeps the curve, and writes the checkpoint where there is a ``path``."""
        with torch.random.fork_rng(devices=[]):
            run = Run(config)
            mixtures = [x for x in run.model.modules() if isinstance(x, MixtureOfExperts)]
            run.validate()
            load = []
            for step in range(1, config.steps + 1):
                run.advance()
                if step * POINTS // config.steps > (step - 1) * POINTS // config.steps:
                    # The load of the step's own tokens: validating has others.
                    load += [sum(float(x.load.max()) for x in mixtures) / len(mixtures)] if mixtures else []
                    run.validate()
        points = run.history.validation[1:] if mixtures else run.history.validation
        self.report.curves.append(Curve(
            feature, variant, config.seed, tuple(p.step for p in points), tuple(p.bits_per_byte for p in points),
            tuple(load),
        ))
        if path is not None:
            run.save(path)
        return run

    def bits(self, run: Run, model: TorusLM) -> float:
        """Bits per byte of a model on the validation windows of a run."""
        s = self.settings
        windows = data.fixed_batches(run.validation, s.windows, s.batch_size, s.seq_len)
        return score(model, windows, run.tokenizer).bits_per_byte

    def add(self, feature: str, variant: str, before: float, after: tuple[float, ...], sizes: tuple[int, int],
            run: Run | None = None) -> None:
        learning = 0 if run is None else sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        self.report.outcomes.append(
            Outcome(feature, variant, before, after, *sizes, learning, 0 if run is None else run.step)
        )

    def train_base(self) -> None:
        self.base_run = self.train("base", "base", self.config(), self.base)
        self.base_bits = last_bits(self.base_run)
        self.base_size = size_of(self.base_run.model)

    def tune(self) -> None:
        """On prose: from random weights, all of the base model, and its upper half."""
        s = self.settings
        half = f"blocks.0-{s.model.layers // 2 - 1}"
        on_prose = {"data": str(self.prose), "steps": s.tune_steps}
        tuned = on_prose | {"initial": str(self.base), "learning_rate": 1e-3}
        variants = {
            "all layers": tuned, f"embedding and {half} frozen": tuned | {"freeze": ("embedding", half)},
            "from random weights": on_prose,
        }
        before = None
        for variant, changes in variants.items():
            run = self.train(TUNING, variant, self.config(**changes))
            before = run.history.validation[0].bits_per_byte if before is None else before
            self.add(TUNING, f"{variant}: prose", before, (last_bits(run),), (self.base_size,) * 2, run)
            if "initial" in changes:
                self.add(TUNING, f"{variant}: the code of before", self.base_bits,
                         (self.bits(self.base_run, run.model),), (self.base_size,) * 2, run)

    def distill(self) -> None:
        """The base model is the teacher."""
        for weight in (0.0, 0.5):
            variant = f"student, teacher's weight {weight:g}" if weight else "student without a teacher"
            teacher = {"teacher": str(self.base), "distill_weight": weight} if weight else {}
            runs = [self.train(DISTILLATION, variant, self.config(model=self.settings.student, seed=seed, **teacher))
                    for seed in range(self.settings.seeds)]
            self.add(DISTILLATION, variant, self.base_bits, tuple(map(last_bits, runs)),
                     (self.base_size, size_of(runs[0].model)), runs[0])

    def _compressed(self, variant: str, source: Path, amount: float = 0.0, int8: bool = False,
                    run: Run | None = None) -> Path:
        """Compresses a checkpoint, and measures what is read back from the file."""
        model = load_model(source, self.settings.backend)
        path = self.folder / f"{variant.replace(' ', '-')}.safetensors"
        if amount:
            prune(model, amount)
        if int8:
            quantize(model)
        size = save_compressed(path, model, source)
        found = self.bits(self.base_run, load_model(path, self.settings.backend))
        self.add(COMPRESSION, variant, self.base_bits, (found,), (self.base_size, size), run)
        return path

    def compress(self) -> None:
        """In int8; pruned; pruned and trained on, beside the base model trained on for as long."""
        self._compressed("int8", self.base, int8=True)
        pruned = {amount: self._compressed(f"pruned {amount:.0%}", self.base, amount) for amount in SPARSITIES}
        more = {"steps": self.settings.tune_steps, "learning_rate": 1e-3, "seed": 1}
        starts = {"trained on": self.base} | {f"pruned {x:.0%}, trained on": pruned[x] for x in TUNED_SPARSITIES}
        for variant, start in starts.items():
            path = self.folder / "tuned.safetensors"
            run = self.train(COMPRESSION, variant,
                             self.config(initial=str(start), keep_zeros=start != self.base, **more), path)
            self._compressed(variant, path, run=run)
            if start != self.base:
                self._compressed(f"{variant}, int8", path, int8=True, run=run)

    def mix(self) -> None:
        """Experts with and without the load-balancing loss."""
        for weight in (0.01, 0.0):
            model = dataclasses.replace(self.settings.model, experts=NUMBER_OF_EXPERTS, experts_per_token=1,
                                        balance_weight=weight)
            variant = f"balance weight {weight:g}"
            run = self.train(EXPERTS, variant, self.config(model=model))
            self.add(EXPERTS, variant, self.base_bits, (last_bits(run),), (self.base_size, size_of(run.model)), run)


def last_bits(run: Run) -> float:
    """Bits per byte at the end of a run."""
    return run.history.validation[-1].bits_per_byte


def size_of(model: TorusLM) -> int:
    """Bytes of the weights."""
    return bytes_of(checkpoint.model_tensors(model))


def add_parser(commands) -> None:
    """The command ``transfer``."""
    parser = commands.add_parser(
        "transfer", help="fine-tuning, distillation, int8, pruning and experts: loss and size before and after",
        description="Trains a small language model on code, and then: fine-tunes it on prose, whole and with frozen "
                    "layers; distils it; compresses it, in int8 and by pruning; and trains mixtures of experts beside "
                    "it. Writes a report (JSON) and plots (PNG).",
    )
    default, at_least_1 = Settings(), functools.partial(arguments.at_least, 1)
    parser.add_argument("--steps", type=functools.partial(arguments.at_least, POINTS), default=default.steps,
                        metavar="N", help="of the base model, of students and of mixtures (default: %(default)s)")
    parser.add_argument("--tune-steps", type=functools.partial(arguments.at_least, POINTS), default=default.tune_steps,
                        metavar="N", help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least_1, default=default.seeds, metavar="N",
                        help="of students (default: %(default)s)")
    arguments.add_output(parser, "transfer")
    parser.set_defaults(run=lambda given, console: run(
        dataclasses.replace(default, steps=given.steps, tune_steps=given.tune_steps, seeds=given.seeds), given.output,
        console))


def run(settings: Settings, output: Path, console: Console) -> TransferReport:
    """Runs the study, prints the table and writes ``output`` and a plot beside it.

    Raises:
        OSError: a file cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        study = Study(settings, Path(folder))
        console.print(environment.describe(study.report.machine), highlight=False)
        parts = {"base model": study.train_base, "fine-tuning": study.tune, "distillation": study.distill,
                 "compression": study.compress, "experts": study.mix}
        with steps(console, len(parts)) as start:
            for name, part in parts.items():
                start(name)
                part()
    study.report.save(output)
    plot = output.with_suffix(".png")
    write_plot(study.report, plot)
    console.print(grid(study.report).rich())
    console.print(f"Written: {output} and {plot}", highlight=False)
    return study.report
