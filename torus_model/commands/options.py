"""Options and checks that several commands share."""

from __future__ import annotations

import argparse

import torch

from torus_kernels.backends import AUTO, BACKENDS, Problem, select

from ..checkpoint import CheckpointError, load_model, load_tokenizer, locate
from ..lm import ModelConfig, TorusLM
from ..tokenizer import Tokenizer


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint`` and ``--backend``."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="checkpoint, or folder of a run")
    parser.add_argument("--backend", choices=BACKENDS, help="kernels to use (default: the best that can run)")


def load_model_and_tokenizer(options: argparse.Namespace) -> tuple[TorusLM, Tokenizer]:
    """What `add_model_options` names.

    Raises:
        CheckpointError, TokenizerError, BackendError: it cannot be used; the message says why.
    """
    path = locate(options.checkpoint)
    model, tokenizer = load_model(path, backend=options.backend), load_tokenizer(path)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise CheckpointError(f"{path} has a vocabulary of {model.config.vocab_size}, but a tokenizer of "
                              f"{tokenizer.vocab_size}")
    check_backend(options.backend, model.config)
    return model, tokenizer


def check_backend(backend: str | None, model: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Raises now, not in the first layer, where the backend asked for cannot run this model."""
    select(AUTO if backend is None else backend, Problem("cpu", dtype, model.width // model.heads))
