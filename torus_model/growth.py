"""Progressive growth: a deeper and wider model that computes the same function, and the optimiser's state for it.

Width grows by Net2WiderNet (Chen et al. 2015, section 2.3), as bert2BERT (Chen et al. 2022) does for transformers:
channels, heads and hidden units are repeated, and what reads them is split among the copies. Only whole multiples keep
the mean square that RMSNorm divides by. Depth grows by stacking copies of the blocks on top (StackBERT, Gong et al.
2019) whose branches end in zeros. They cannot go in between: every block compounds the state that the next one takes,
and alpha cannot be 0.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .lm import ModelConfig, TorusLM

_TILE, _SPLIT, _KEEP = "tile", "split", "keep"

_DIMENSIONS = {
    "embedding.weight": (_KEEP, _TILE),
    "norm.weight": (_SPLIT,),  # the embedding, which is the output layer too, is not split
    "blocks.*.attention_norm.weight": (_TILE,),
    "blocks.*.ff_norm.weight": (_TILE,),
    "blocks.*.attention.[qk]_norm.weight": (_KEEP,),  # of the channels of a head, whose number stays
    "blocks.*.attention.[qkv]_proj.weight": (_TILE, _SPLIT),
    "blocks.*.attention.out_proj.weight": (_TILE, _SPLIT),
    "blocks.*.attention.stream_gate.weight": (_TILE, _SPLIT),
    "blocks.*.attention.stream_gate.bias": (_TILE,),
    "blocks.*.attention.stream_logits": (_TILE, _KEEP),
    "blocks.*.attention.raw_decay": (_TILE, _KEEP),
    "blocks.*.attention.raw_alpha": (_TILE,),  # or one for each time constant and head
    "blocks.*.attention.memory.raw_beta": (_TILE,),
    "blocks.*.attention.memory.scale_logits": (_KEEP,),
    "blocks.*.attention.alpha_factor": (),
    "blocks.*.attention.scheduled_factor": (),
    "positions.gain": (),
    "blocks.*.ff.[02].weight": (_TILE, _SPLIT),
}
"""What becomes of the last dimensions of each parameter and buffer: repeated as a whole, repeated and split among the
copies, or kept, as those before them are."""

_BRANCH_ENDS = ("attention.out_proj.weight", "ff.2.weight")


def grown_config(config: ModelConfig, *, layers: int | None = None, width: int | None = None) -> ModelConfig:
    """The architecture that `grow` makes of one.

    Args:
        config: the architecture before.
        layers: number of blocks, at least as many as before; None for as many.
        width: a multiple of the width before; None for the same. Heads, key and value heads and the hidden size of the
            feed-forward layers grow with it, the channels of a head stay.

    Raises:
        ValueError: a size is not one that the model can grow to.
    """
    if config.experts > 1:
        raise ValueError(f"experts must be 1 in a model that grows, got {config.experts}")
    if config.sinusoidal_positions and width not in (None, config.width):
        raise ValueError("width cannot grow with sinusoidal_positions, whose frequencies depend on it")
    layers = config.layers if layers is None else layers
    width = config.width if width is None else width
    if layers < config.layers:
        raise ValueError(f"layers must be at least the {config.layers} that there are, got {layers}")
    if width < config.width or width % config.width != 0:
        raise ValueError(f"width must be a multiple of the present {config.width}, got {width}")
    copies = width // config.width
    return dataclasses.replace(
        config, layers=layers, width=width, heads=copies * config.heads,
        kv_heads=None if config.kv_heads is None else copies * config.kv_heads,
        ff_width=None if config.ff_width is None else copies * config.ff_width,
    )


def grow(
    model: TorusLM,
    *,
    layers: int | None = None,
    width: int | None = None,
    noise: float = 0.5,
    generator: torch.Generator | None = None,
) -> TorusLM:
    """A larger model with the same logits, up to rounding, and in evaluation mode: dropout takes copies apart.

    With k copies of every channel, a weight w that reads it becomes k weights ``w * (1 + noise * z_c) / k``, z_c
    uniform in [-1, 1) minus its mean over the copies c. They add up to w; without noise, copies would get the same
    gradients and remain copies.

    Args:
        model: stays as it is.
        layers, width: as in `grown_config`.
        noise: how far copies are taken apart; at least 0 and below 1.
        generator: of the noise, on the CPU; PyTorch's default one.

    Returns:
        The model, in the mode, dtype and device of ``model``, with tensors of its own.

    Raises:
        ValueError: the sizes do not fit, or the model has parameters that there is no rule for.
    """
    config = grown_config(model.config, layers=layers, width=width)
    if not 0 <= noise < 1:
        raise ValueError(f"noise must be at least 0 and below 1, got {noise}")
    attention: Any = model.blocks[0].get_submodule("attention")
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, but not used
        grown = TorusLM(config, attention.backend, activation_checkpointing=model.activation_checkpointing)
    before, after = model.state_dict(), grown.state_dict()
    dimensions = {name: _dimensions(name, x.ndim) for name, x in before.items()}
    copies = config.width // model.config.width
    state = {}
    for name, initial in after.items():
        source = _source(name, model.config.layers)
        if source is None:
            state[name] = torch.zeros_like(initial)
        elif source not in before:  # alpha of a copy of the first block, which has none
            state[name] = initial
        else:
            state[name] = _widen(before[source], dimensions[source], copies, noise, generator)
    example = next(model.parameters())
    grown = grown.to(example.device, example.dtype)
    grown.load_state_dict(state)
    return grown.train(model.training)


def grow_optimizer(
    optimizer: Optimizer, model: TorusLM, grown: TorusLM, make: Callable[[TorusLM], Optimizer]
) -> Optimizer:
    """The optimiser of the grown model, with AdamW's moments carried over.

    A copy among k of an output gets a k-th of its gradient, and what reads a copy all of it. So the first moment of a
    parameter is repeated and divided by k for each of its repeated dimensions, the second one by k squared; steps are
    kept. New blocks start with moments and steps of zero.

    Args:
        optimizer: of ``model``, with named parameters.
        model, grown: what went into `grow`, and what came out.
        make: makes an optimiser of ``grown``.
    """
    made = make(grown)
    if not optimizer.state:
        return made
    before, copies = dict(model.named_parameters()), grown.config.width // model.config.width
    for name, p in grown.named_parameters():
        if not p.requires_grad:
            continue
        if name not in before:
            made.state[p] = {"step": torch.zeros_like(next(iter(optimizer.state.values()))["step"]),
                             "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            continue
        old, dimensions = optimizer.state[before[name]], _dimensions(name, p.ndim)
        share = float(copies) ** -dimensions.count(_TILE)
        made.state[p] = {"step": old["step"].clone()} | {
            key: _repeat(old[key], dimensions, copies) * factor
            for key, factor in (("exp_avg", share), ("exp_avg_sq", share**2))
        }
    return made


def _source(name: str, layers: int) -> str | None:
    """The parameter among those of ``layers`` blocks that one of the grown model comes from; None where it is zero."""
    parts = name.split(".")
    if parts[0] != "blocks" or int(parts[1]) < layers:
        return name
    if name.endswith(_BRANCH_ENDS):
        return None
    return ".".join(["blocks", str(int(parts[1]) % layers), *parts[2:]])


def _dimensions(name: str, count: int) -> tuple[str, ...]:
    """What becomes of the dimensions of a parameter that has ``count`` of them.

    Raises:
        ValueError: there is no rule for it.
    """
    for pattern, dimensions in _DIMENSIONS.items():
        if fnmatch.fnmatchcase(name, pattern):
            return (_KEEP,) * (count - len(dimensions)) + dimensions
    raise ValueError(f"a model with {name} cannot grow: nothing says what becomes of it")


def _repeat(x: Tensor, dimensions: tuple[str, ...], copies: int) -> Tensor:
    return x.repeat([1 if kind == _KEEP else copies for kind in dimensions]) if dimensions else x.clone()


def _widen(
    x: Tensor, dimensions: tuple[str, ...], copies: int, noise: float, generator: torch.Generator | None
) -> Tensor:
    """A parameter repeated, its dimension that is split multiplied by shares that add up to 1 over the copies."""
    repeated = _repeat(x, dimensions, copies)
    if copies == 1 or _SPLIT not in dimensions:
        return repeated
    split = dimensions.index(_SPLIT)
    shape = repeated.unflatten(split, (copies, -1)).shape
    z = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    shares = (1 + noise * (z - z.mean(split, keepdim=True))) / copies
    return (repeated.double() * shares.flatten(split, split + 1).to(x.device)).to(x.dtype)
