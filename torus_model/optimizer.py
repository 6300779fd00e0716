"""The optimiser of a run, and the groups that its parameters form."""

from __future__ import annotations

import re

from torch import nn
from torch.optim import AdamW, Optimizer

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def depth_below_top(name: str, layers: int) -> int:
    """How many blocks lie above a parameter: 0 in the last of ``layers`` blocks and for what follows it, ``layers`` for
    the embedding."""
    if block := _BLOCK.search(name):
        return layers - 1 - int(block[1])
    return layers if name.startswith("embedding.") else 0


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding),
    layer_decay: float = 1.0,
) -> Optimizer:
    """AdamW of what is not frozen. It decays the matrices of these kinds of modules, by default linear layers and the
    embedding, but no gain, bias, stream logit, raw decay or raw alpha.

    With a ``layer_decay`` below 1 a parameter's learning rate is ``learning_rate * layer_decay**depth``, its depth that
    of `depth_below_top` (discriminative fine-tuning, Howard & Ruder 2018, section 3.2; as a decay for each layer, Clark
    et al. 2020, appendix A). The embedding has the smallest, also where it is the output layer. There are then groups
    for each depth, the embedding's first.
    """
    matrices = {
        id(parameter)
        for module in model.modules() if isinstance(module, kinds)
        for parameter in module.parameters(recurse=False) if parameter.ndim > 1
    }
    named = list(model.named_parameters())
    layers = 1 + max((int(block[1]) for name, _ in named if (block := _BLOCK.search(name))), default=-1)
    learning = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    by_depth: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in learning:
        depth = depth_below_top(name, layers) if layer_decay != 1 else 0
        by_depth.setdefault(depth, []).append((name, parameter))
    groups = []
    for depth, members in sorted(by_depth.items(), reverse=True):
        for decay, is_decayed in ((weight_decay, True), (0.0, False)):
            chosen = [(name, p) for name, p in members if (id(p) in matrices) == is_decayed]
            # Without layer-wise rates there have always been both groups, which a checkpoint repeats.
            if chosen or (layer_decay == 1 and len(learning) == len(named)):
                groups.append({"params": chosen, "weight_decay": decay, "lr": learning_rate * layer_decay**depth})
    return AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
