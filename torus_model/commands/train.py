"""Trains on text. Writes checkpoint.safetensors, history.json and validation.png, and keeps the checkpoint before."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torus_kernels import Stream
from torus_kernels.backends import BACKENDS

from .. import checkpoint
from ..attention import ROTARY
from ..checkpoint import CheckpointError
from ..config import SIZES
from ..lm import ModelConfig, TorusLM
from ..options import add_option as add
from ..options import stream_names
from ..parallel import LAYOUTS, check_layout, processes
from ..tensorboard import import_writer
from ..tokenizer import load_tokenizer
from ..train import COHERENCE_PLOT, TrainConfig, resumable_config, train
from ..transfer import freeze
from .dynamics_options import add_dynamics_options
from .options import check_backend
from .transfer_options import add_transfer_options

HELP = "train on text"

DEFAULT_SECONDS = 120.0
DEFAULT_RUN_DIR = "runs/model"
_DEFAULT_SIZE = "tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and the fields of its configuration, which are absent from the result where they are not given."""
    parser.add_argument("--output", default=DEFAULT_RUN_DIR, metavar="DIR",
                        help="folder of the run (default: %(default)s)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true",
        help="continue the run in DIR as it was configured; of the other options, those of the budget, --data, "
             "--max-bytes, --activation-checkpointing, --validations, --patience, --tensorboard, --coherence-every, "
             "--teacher and --backend may be given anew",
    )
    existing.add_argument("--overwrite", action="store_true", help="start anew although DIR holds a run")
    add(parser, "--parallel",
        "layout on the processes of torchrun (torchrun --nproc-per-node 2 -m torus_model train --parallel ...): ddp: "
        "each has a copy of the model and a share of the batch; fsdp: also of every parameter; pipeline: a share of "
        "the blocks, through which the --accumulate parts travel; sequence: a share of the tokens and, within "
        "attention, of the heads. A run may continue under another layout (default: one process)", choices=LAYOUTS)
    run, model = TrainConfig(steps=1), SIZES[_DEFAULT_SIZE]
    budget = parser.add_argument_group("budget").add_mutually_exclusive_group()
    add(budget, "--seconds", "train for this long, validations included", DEFAULT_SECONDS, type=float)
    add(budget, "--steps", "train for this many steps; such a run is reproducible", type=int)
    _add_text_options(parser.add_argument_group("text"), run)
    _add_training_options(parser.add_argument_group("training"), run)
    add_dynamics_options(parser.add_argument_group("dynamic training"), run)
    add_transfer_options(parser.add_argument_group("transfer"), run)
    _add_model_options(parser.add_argument_group("model"), model)


def _switch(group: Any, flag: str, help_text: str, default: bool) -> None:
    add(group, flag, help_text, flag if default else f"--no-{flag[2:]}", action=argparse.BooleanOptionalAction)


def _add_text_options(text: Any, run: TrainConfig) -> None:
    add(text, "--data", "file, or folder of text files (default: the Python standard library's sources)")
    add(text, "--max-bytes", "cut the text there", run.max_bytes, type=int)
    add(text, "--tokenizer", "file that 'tokenizer train' wrote (default: every byte is a token)", metavar="FILE")
    _switch(text, "--pack-documents", "keep files apart: no token sees another file than its own", run.pack_documents)
    add(text, "--validation-fraction", "part of the text to validate on", run.validation_fraction, type=float)
    add(text, "--test-fraction", "part of the text, at its end, that is kept for 'evaluate --split test'",
        run.test_fraction, type=float)


def _add_training_options(training: Any, run: TrainConfig) -> None:
    add(training, "--seq-len", "tokens per sequence (default: the sites of the lattice of --size)", type=int)
    add(training, "--batch-size", "sequences per step", run.batch_size, type=int)
    add(training, "--accumulate", "parts of a step's sequences that run one after the other, with less memory",
        run.accumulate, type=int, metavar="PARTS")
    _switch(training, "--autocast", "run the steps in bfloat16", run.autocast)
    _switch(training, "--activation-checkpointing", "compute activations twice, with less memory",
            run.activation_checkpointing)
    add(training, "--learning-rate", "peak of the schedule", run.learning_rate, type=float)
    add(training, "--warmup", "part of the budget for the linear warm-up", run.warmup, type=float)
    add(training, "--final-learning-rate", "where the schedule begins and ends, as a part of the peak",
        run.final_learning_rate, type=float)
    add(training, "--weight-decay", "of AdamW, on matrices only", run.weight_decay, type=float)
    add(training, "--clip", "largest norm of the gradient", run.clip, type=float)
    add(training, "--validations", "how many times to validate and save", run.validations, type=int)
    add(training, "--validation-windows", "sequences in the validation set", run.validation_windows, type=int)
    add(training, "--patience", "stop after so many validations without an improvement, and keep the best checkpoint "
        f"in {checkpoint.BEST_FILE_NAME} (default: never)", type=int, metavar="VALIDATIONS")
    _switch(training, "--tensorboard", "write logs for TensorBoard into DIR/tensorboard", run.tensorboard)
    add(training, "--coherence-every", "measure the coherence of the layers every so many steps, and draw it in "
        f"{COHERENCE_PLOT} (default: never)", type=int, metavar="STEPS")
    add(training, "--seed", "of weights, batches and dropout", run.seed, type=int)
    add(training, "--backend", "kernels to use (default: the best that can run)", choices=BACKENDS)


def _add_model_options(architecture: Any, model: ModelConfig) -> None:
    sizes = "; ".join(
        f"{name}: width {size.width}, {size.layers} layers, {size.heads} heads, lattice {size.n_major} x {size.n_minor}"
        for name, size in SIZES.items()
    )
    add(architecture, "--size", f"a named model, of which the options below change parts ({sizes})", _DEFAULT_SIZE,
        choices=SIZES)
    add(architecture, "--width", "size of the embedding", model.width, type=int)
    add(architecture, "--layers", "number of blocks", model.layers, type=int)
    add(architecture, "--heads", "query heads", model.heads, type=int)
    add(architecture, "--kv-heads", "key and value heads (default: as many as query heads)", type=int)
    add(architecture, "--ff-width", "hidden size of the feed-forward layers (default: 4 * width)", type=int)
    add(architecture, "--experts", "feed-forward layers in each block; of several, every token goes through a few",
        model.experts, type=int)
    add(architecture, "--experts-per-token", "how many of them", model.experts_per_token, type=int, metavar="K")
    add(architecture, "--balance-weight", "weight of the loss that keeps all experts in use", model.balance_weight,
        type=float)
    add(architecture, "--n-major", "sites of the lattice along the major loop", model.n_major, type=int)
    add(architecture, "--n-minor", "sites of the lattice along the minor loop", model.n_minor, type=int)
    add(architecture, "--winding", "minor steps of the spirals per major step", model.winding, type=int)
    add(architecture, "--cross-radius", "half-widths of the cross flows' windows", "{} {}".format(*model.cross_radius),
        type=int, nargs=2, metavar=("NARROW", "BROAD"))
    add(architecture, "--streams", f"streams to use, out of {','.join(s.name for s in Stream)} (default: all)",
        type=stream_names, metavar="NAME,NAME,...")
    _switch(architecture, "--token-gated", "stream weights from each token, or one set per head", model.token_gated)
    _switch(architecture, "--compounding", "blend the attention of a layer into that of the layer before",
            model.compounding)
    add(architecture, "--rotary", "positions: the harmonics of the lattice's loops, or those of a plain sequence",
        model.rotary, choices=ROTARY)
    _switch(architecture, "--graded-heads", "heads begin with windows of different widths, from flat to 2 tokens",
            model.graded_heads)
    add(architecture, "--qk-gain", "initial gain of the norm of queries", model.qk_gain, type=float)
    add(architecture, "--dropout", "probability on the output of each branch", model.dropout, type=float)
    _switch(architecture, "--sinusoidal-positions", "add sinusoidal positions to the embedding",
            model.sinusoidal_positions)
    _switch(architecture, "--ema-momentum", "compound from layer to layer with momentum", model.ema_momentum)
    add(architecture, "--ema-scales", "time constants of the compounding; more than one exclude momentum",
        model.ema_scales, type=int, metavar="S")
    _switch(architecture, "--adaptive-alpha", "scale the rate of compounding by the coherence of earlier steps; needs "
            "--coherence-every", model.adaptive_alpha)


def configure(run_dir: str, resume: bool, given: dict[str, Any]) -> TrainConfig:
    """The configuration of a run from the options that are given."""
    model_fields = {f.name for f in dataclasses.fields(ModelConfig)} | {"size"}
    of_model = {name: value for name, value in given.items() if name in model_fields}
    of_run = {name: value for name, value in given.items() if name not in model_fields}
    has_budget = "seconds" in given or "steps" in given
    if resume:
        if of_model:
            raise ValueError(f"a resumed run keeps its model, but got {', '.join(sorted(of_model))}")
        return resumable_config(run_dir, **({"seconds": None, "steps": None} if has_budget else {}) | of_run)
    budget = {} if has_budget else {"seconds": DEFAULT_SECONDS}
    if "initial" in given:
        if fixed := sorted(set(of_model) - {"dropout", "balance_weight"}):
            raise ValueError(f"--from takes the model of its checkpoint, but got {', '.join(fixed)}")
        model = dataclasses.replace(checkpoint.load_model_config(given["initial"]), **of_model)
        return TrainConfig(model=model, **{"seq_len": model.lattice.num_sites} | budget | of_run)
    size = SIZES[of_model.pop("size", _DEFAULT_SIZE)]
    tokenizer = load_tokenizer(given.get("tokenizer"), special_tokens=given.get("pack_documents", False))
    model = dataclasses.replace(size, vocab_size=tokenizer.vocab_size, **of_model)
    return TrainConfig(model=model, **{"seq_len": size.lattice.num_sites} | budget | of_run)


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Checks the configuration."""
    given = dict(vars(options))
    del given["command"]
    run_dir, resume, overwrite = given.pop("output"), given.pop("resume"), given.pop("overwrite")
    parallel, size = given.pop("parallel", None), processes.launched()
    config = configure(run_dir, resume, given)
    if parallel is not None and size is None:
        raise ValueError(f"--parallel {parallel} needs processes: torchrun --nproc-per-node 2 -m torus_model train ...")
    check_layout(parallel, size or 1, config)
    newest = Path(run_dir, checkpoint.FILE_NAME)
    if not resume and not overwrite and any(file.exists() for file in (newest, checkpoint.previous_of(newest))):
        raise CheckpointError(f"{run_dir} holds a run: --resume continues it, --overwrite starts anew")
    check_backend(config.backend, config.model)
    if config.autocast:
        check_backend(config.backend, config.model, torch.bfloat16)
    if config.tensorboard:
        import_writer()
    with torch.device("meta"):
        freeze(TorusLM(config.model), config.freeze)  # raises now, not in the run

    def run() -> None:
        result = train(config, run_dir, resume=resume, parallel=parallel)
        if processes.rank() > 0:
            return
        print(f"{result.bits_per_byte:.3f} bits per byte, perplexity {result.perplexity:.2f}, after "
              f"{len(result.history.losses)} steps{', stopped early' if result.stopped_early else ''}; "
              f"wrote {result.checkpoint}, {result.history_file} and {result.plot_file}")

    return run
