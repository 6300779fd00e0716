"""Tiny models of both kinds, and what a step of training finds in them."""

from collections.abc import Callable, Sequence

import torch

from torus_model import ModelConfig, TorusLM
from torus_model.field import FieldConfig, TorusField

LANGUAGE = ModelConfig(vocab_size=13, width=32, layers=2, heads=4, kv_heads=2, n_major=3, n_minor=4, winding=2)
FIELDS = {
    "periodic": FieldConfig(grid=(8, 8), patch=2, width=32, layers=2, heads=4, history=2),
    "cylinder": FieldConfig(grid=(6, 8), patch=2, width=32, layers=2, heads=2, history=1, channels=2,
                            static_channels=1, topology="cylinder", token_gated=False),
}


def language() -> TorusLM:
    torch.manual_seed(0)
    return TorusLM(LANGUAGE)


def field(config: FieldConfig) -> TorusField:
    torch.manual_seed(0)
    model = TorusField(config)
    torch.nn.init.normal_(model.network.head.weight)  # it starts as zero, which has no gradient beyond
    return model


def tokens(batch: int, seq_len: int) -> torch.Tensor:
    return torch.randint(LANGUAGE.vocab_size, (batch, seq_len))


def frames(config: FieldConfig, batch: int) -> list[torch.Tensor]:
    made = [torch.randn(batch, config.history, config.channels, *config.grid)]
    if config.static_channels:
        made.append(torch.randn(1, config.static_channels, *config.grid))
    return made


def outputs_and_gradients(model: torch.nn.Module, inputs: Sequence[torch.Tensor], call: Callable | None = None) -> dict:
    """The output and the gradient of every parameter, by its name; ``call`` stands for the model where it is given."""
    model.zero_grad()
    out = (model if call is None else call)(*inputs)
    out.square().mean().backward()
    return {"out": out.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}
