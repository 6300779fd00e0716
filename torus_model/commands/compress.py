"""Makes a smaller checkpoint of a trained model, for 'evaluate', 'generate' and 'train --from', and says what it costs.

Weights are pruned, quantised, or pruned and then quantised. Bits per byte are measured before, and after with the file
that was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .. import checkpoint
from ..compression import SCOPES, bytes_of, is_quantized, prune, quantize, sparsity
from .options import add_model_options, load_model_and_tokenizer
from .part import add_part_options, load_part

HELP = "make a smaller checkpoint: int8 weights, pruning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to compress, how, and on what to measure the loss."""
    add_model_options(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="checkpoint to write, a .safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    parser.add_argument("--int8", action="store_true",
                        help="weights of linear layers and of the embedding in int8, one scale for each output channel "
                             "or token (extra 'quantize')")
    parser.add_argument("--prune", type=float, metavar="PART",
                        help="part of the weights of linear layers to set to 0, the smallest in magnitude")
    parser.add_argument("--prune-scope", choices=SCOPES, default=SCOPES[0],
                        help="compare weights of all layers, or those within each layer (default: %(default)s)")
    add_part_options(parser, "validation")


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Reads model and text, and compresses the model."""
    output = Path(options.output)
    if not options.int8 and options.prune is None:
        raise ValueError("there is nothing to do: give --int8, --prune or both")
    if options.prune is not None and not 0 < options.prune < 1:
        raise ValueError(f"--prune must be between 0 and 1, got {options.prune}")
    if output.is_dir():
        raise ValueError(f"--output must be a file, but {output} is a folder")
    if output.exists() and not options.overwrite:
        raise ValueError(f"{output} exists: --overwrite replaces it")
    model, tokenizer = load_model_and_tokenizer(options)
    if is_quantized(model):
        raise checkpoint.CheckpointError(f"{options.checkpoint} is in int8 already")
    part = load_part(options, tokenizer)

    def run() -> None:
        size, before = bytes_of(model.state_dict()), part.score(model).bits_per_byte
        if options.prune is not None:
            prune(model, options.prune, options.prune_scope)
        if options.int8:
            quantize(model)
        output.parent.mkdir(parents=True, exist_ok=True)
        packed = checkpoint.save_compressed(output, model, options.checkpoint)
        after = part.score(checkpoint.load_model(output, options.backend)).bits_per_byte
        print(f"before: {size:,} bytes of weights, {before:.4f} bits per byte ({options.split})")
        print(f"after: {packed:,} bytes of weights ({size / packed:.2f} times smaller), {after:.4f} bits per byte "
              f"({after - before:+.4f}), {sparsity(model):.1%} of the weights of linear layers are 0")
        print(f"wrote {output}, {output.stat().st_size:,} bytes")

    return run
