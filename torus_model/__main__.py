"""``python -m torus_model train``, ``generate`` and ``field``."""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from torus_kernels import BackendError, Stream
from torus_kernels.backends import AUTO, BACKENDS, Problem, select

from . import checkpoint
from .checkpoint import CheckpointError
from .data import DataError
from .field import cli as field_cli
from .field.data import FieldDataError
from .field.navier_stokes import SolverError
from .generate import beam_search, check_request, generate, generate_batch
from .lm import ModelConfig
from .options import add_option as add
from .options import stream_names
from .sampling import Sampling
from .train import TrainConfig, TrainingError, resumable_config, train

DEFAULT_SECONDS = 120.0
DEFAULT_RUN_DIR = "runs/model"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    """Options that are fields of a configuration: absent from the result where they are not given."""
    run, model = TrainConfig(steps=1), ModelConfig()
    budget = parser.add_argument_group("budget").add_mutually_exclusive_group()
    add(budget, "--seconds", "train for this long, validations included", DEFAULT_SECONDS, type=float)
    add(budget, "--steps", "train for this many steps; such a run is reproducible", type=int)
    text = parser.add_argument_group("text")
    add(text, "--data", "file, or folder of text files (default: the Python standard library's sources)")
    add(text, "--max-bytes", "cut the text there", run.max_bytes, type=int)
    add(text, "--validation-fraction", "part of the text, at its end, to validate on", run.validation_fraction,
        type=float)
    training = parser.add_argument_group("training")
    add(training, "--seq-len", "bytes per sequence", run.seq_len, type=int)
    add(training, "--batch-size", "sequences per step", run.batch_size, type=int)
    add(training, "--learning-rate", "peak of the schedule", run.learning_rate, type=float)
    add(training, "--warmup", "part of the budget for the linear warm-up", run.warmup, type=float)
    add(training, "--final-learning-rate", "where the schedule begins and ends, as a part of the peak",
        run.final_learning_rate, type=float)
    add(training, "--weight-decay", "of AdamW, on matrices only", run.weight_decay, type=float)
    add(training, "--clip", "largest norm of the gradient", run.clip, type=float)
    add(training, "--validations", "how many times to validate and save", run.validations, type=int)
    add(training, "--validation-windows", "sequences in the validation set", run.validation_windows, type=int)
    add(training, "--seed", "of weights, batches and dropout", run.seed, type=int)
    add(training, "--backend", "kernels to use (default: the best that can run)", choices=BACKENDS)
    architecture = parser.add_argument_group("model")
    add(architecture, "--width", "size of the embedding", model.width, type=int)
    add(architecture, "--layers", "number of blocks", model.layers, type=int)
    add(architecture, "--heads", "query heads", model.heads, type=int)
    add(architecture, "--kv-heads", "key and value heads (default: as many as query heads)", type=int)
    add(architecture, "--ff-width", "hidden size of the feed-forward layers (default: 4 * width)", type=int)
    add(architecture, "--n-major", "sites of the lattice along the major loop", model.n_major, type=int)
    add(architecture, "--n-minor", "sites of the lattice along the minor loop", model.n_minor, type=int)
    add(architecture, "--winding", "minor steps of the spirals per major step", model.winding, type=int)
    add(architecture, "--cross-radius", "half-widths of the cross flows' windows", "{} {}".format(*model.cross_radius),
        type=int, nargs=2, metavar=("NARROW", "BROAD"))
    add(architecture, "--streams", f"streams to use, out of {','.join(s.name for s in Stream)} (default: all)",
        type=stream_names, metavar="NAME,NAME,...")
    add(architecture, "--token-gated", "stream weights from each token, or one set per head",
        "--token-gated", action=argparse.BooleanOptionalAction)
    add(architecture, "--dropout", "probability on the output of each branch", model.dropout, type=float)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m torus_model", description="Models on torus attention: bytes of text, and fields.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,generate,field}")

    training = commands.add_parser(
        "train", help="train on bytes of text",
        description="Trains on bytes of text. Writes checkpoint.safetensors, history.json and validation.png.",
    )
    training.add_argument("--output", default=DEFAULT_RUN_DIR, metavar="DIR",
                          help="folder of the run (default: %(default)s)")
    existing = training.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true",
        help="continue the run in DIR as it was configured; of the other options, those of the budget, --data, "
             "--max-bytes, --validations and --backend may be given anew",
    )
    existing.add_argument("--overwrite", action="store_true", help="start anew although DIR holds a run")
    _add_config_options(training)

    sampling = commands.add_parser("generate", help="write text", description="Continues a text with a trained model.")
    sampling.add_argument("--checkpoint", required=True, metavar="PATH", help="checkpoint, or folder of a run")
    sampling.add_argument("--prompt", required=True, action="append",
                          help="text to continue; given several times, all are continued together")
    sampling.add_argument("--bytes", type=int, default=200, help="how many to write at most (default: %(default)s)")
    sampling.add_argument("--temperature", type=float, default=0.8,
                          help="0 for the likeliest byte every time (default: %(default)s)")
    sampling.add_argument("--top-k", type=int, help="sample from the k likeliest bytes (default: all)")
    sampling.add_argument("--top-p", type=float,
                          help="sample from the fewest likeliest bytes whose probabilities reach this (default: all)")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0,
                          help="above 1, bytes that the text already has become less likely (default: %(default)s)")
    sampling.add_argument("--stop", action="append", default=[], metavar="BYTE",
                          help="character of one byte after which to stop; may be given several times")
    sampling.add_argument("--beams", type=int,
                          help="search for the likeliest text with so many beams, instead of sampling")
    sampling.add_argument("--length-penalty", type=float, default=1.0,
                          help="of the beam search: 0 compares sums of log-probabilities, 1 means "
                               "(default: %(default)s)")
    sampling.add_argument("--no-cache", dest="use_cache", action="store_false",
                          help="run the whole text for every byte, instead of keeping keys and values")
    sampling.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    sampling.add_argument("--backend", choices=BACKENDS, help="kernels to use (default: the best that can run)")

    field_cli.add_arguments(commands.add_parser(
        "field", help=field_cli.HELP, description="Models of fields: data, training, scores and pictures.",
    ))
    return parser


def _configure(run_dir: str, resume: bool, given: dict[str, Any]) -> TrainConfig:
    model_fields = {f.name for f in dataclasses.fields(ModelConfig)}
    of_model = {name: value for name, value in given.items() if name in model_fields}
    of_run = {name: value for name, value in given.items() if name not in model_fields}
    has_budget = "seconds" in given or "steps" in given
    if resume:
        if of_model:
            raise ValueError(f"a resumed run keeps its model, but got {', '.join(sorted(of_model))}")
        return resumable_config(run_dir, **({"seconds": None, "steps": None} if has_budget else {}) | of_run)
    return TrainConfig(model=ModelConfig(**of_model), **({} if has_budget else {"seconds": DEFAULT_SECONDS}) | of_run)


def _prepare_train(options: argparse.Namespace) -> Callable[[], None]:
    given = dict(vars(options))
    del given["command"]
    run_dir, resume, overwrite = given.pop("output"), given.pop("resume"), given.pop("overwrite")
    config = _configure(run_dir, resume, given)
    if not resume and not overwrite and Path(run_dir, checkpoint.FILE_NAME).exists():
        raise CheckpointError(f"{run_dir} holds a run: --resume continues it, --overwrite starts anew")
    _check_backend(config.backend, config.model)

    def run() -> None:
        result = train(config, run_dir, resume=resume)
        print(f"{result.bits_per_byte:.3f} bits per byte after {len(result.history.losses)} steps; "
              f"wrote {result.checkpoint}, {result.history_file} and {result.plot_file}")

    return run


def _prepare_generate(options: argparse.Namespace) -> Callable[[], None]:
    model = checkpoint.load_model(options.checkpoint, backend=options.backend)
    if model.config.vocab_size != 256:
        raise CheckpointError(f"{options.checkpoint} has a vocabulary of {model.config.vocab_size}, not of 256 bytes")
    _check_backend(options.backend, model.config)
    # Bytes of the command line that are not UTF-8 go to the model as they are.
    prompts = [torch.tensor(list(p.encode(errors="surrogateescape")), dtype=torch.int64) for p in options.prompt]
    stops = [stop.encode(errors="surrogateescape") for stop in options.stop]
    if wrong := [stop for stop, code in zip(options.stop, stops, strict=True) if len(code) != 1]:
        raise ValueError(f"--stop must be a character of one byte, got {wrong[0]!r}")
    stop_tokens = {code[0] for code in stops}
    sampled = {
        "temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p,
        "repetition_penalty": options.repetition_penalty, "stop_tokens": stop_tokens, "use_cache": options.use_cache,
        "generator": torch.Generator().manual_seed(options.seed),
    }
    if options.beams is not None:
        check_request(prompts, options.bytes, options.beams)
        found = (
            beam_search(model, prompt, options.bytes, beams=options.beams, length_penalty=options.length_penalty,
                        stop_tokens=stop_tokens, use_cache=options.use_cache)
            for prompt in prompts
        )
        return lambda: _write_texts(prompts, found)
    if len(prompts) > 1:
        check_request(prompts, options.bytes)
        Sampling(options.repetition_penalty, options.temperature, options.top_k, options.top_p)  # checks them
        return lambda: _write_texts(prompts, generate_batch(model, prompts, options.bytes, **sampled))
    tokens = generate(model, prompts[0], options.bytes, **sampled)
    return lambda: _write_text(itertools.chain(prompts[0].tolist(), tokens))


def _write_text(tokens: Iterable[int]) -> None:
    """Writes bytes as they come: sampled ones need not be UTF-8, and a character may arrive in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        print(decoder.decode(bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


def _write_texts(prompts: list[Tensor], continuations: Iterable[Tensor]) -> None:
    for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        if number:
            print("---")
        _write_text(prompt.tolist() + continuation.tolist())


def _check_backend(backend: str | None, model: ModelConfig) -> None:
    """Raises now, not in the first layer, where the backend asked for cannot run this model."""
    select(AUTO if backend is None else backend, Problem("cpu", torch.float32, model.width // model.heads))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; a user's error becomes one line on stderr and exit status 2."""
    parser = _build_parser()
    options = parser.parse_args(arguments)
    commands = {"train": _prepare_train, "generate": _prepare_generate, "field": field_cli.prepare}
    prepare = commands[options.command]
    try:
        try:
            run = prepare(options)
        except (TypeError, ValueError) as error:  # the options; later they would be a defect of ours
            parser.error(str(error))
        run()
    except (
        BackendError, CheckpointError, DataError, FieldDataError, SolverError, TrainingError, OSError,
    ) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")


def restart_with_sleeping_threads() -> None:
    """Replaces this process by one whose idle OpenMP threads sleep; OpenMP reads its settings only at the start.

    A training step is made of about a thousand short parallel loops, and by default threads spin at the end of each.
    While another program holds a core, they spin for a thread that is not running, and a step takes tens of times
    longer. Sleeping makes it 10 to 20% longer on an idle machine. ``OMP_WAIT_POLICY=active`` brings the default back.
    """
    if sys.platform == "linux" and "OMP_WAIT_POLICY" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"OMP_WAIT_POLICY": "passive"})


if __name__ == "__main__":
    restart_with_sleeping_threads()
    main()
