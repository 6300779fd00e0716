"""Smaller models: linear layers pruned by magnitude, weights in int8, and both as few bytes in a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

SCOPES = ("global", "layer")

_INT8, _SCALE, _MASK = ".int8", ".scale", ".mask"
"""Endings of what stands for a weight: ``q``, ``s``, and the places of the values of a sparse one."""


class CompressionError(RuntimeError):
    """A model cannot be compressed, or a compressed one not be used; the message says why."""


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    """All but routers, in which a small difference sends a token elsewhere."""
    return [module for module in model.modules() if type(module) is nn.Linear]


def prune(model: nn.Module, amount: float, scope: str = "global") -> None:
    """Sets the weights of linear layers that are smallest in magnitude to 0 (Han et al. 2015, section 3), by
    ``torch.nn.utils.prune``.

    Args:
        amount: part of the weights, between 0 and 1: of ``|w_ij|`` the ``amount`` smallest.
        scope: compare the weights of all layers (``"global"``), or those of each layer with each other (``"layer"``).

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < amount < 1:
        raise ValueError(f"amount must be between 0 and 1, got {amount}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    layers = _linear_layers(model)
    if scope == "global":
        torch_prune.global_unstructured([(x, "weight") for x in layers], torch_prune.L1Unstructured, amount=amount)
    for layer in layers:
        if scope == "layer":
            torch_prune.l1_unstructured(layer, "weight", amount=amount)
        torch_prune.remove(layer, "weight")


def quantize(model: nn.Module) -> None:
    """Gives linear layers and embeddings weights in int8, by torchao's ``Int8WeightOnlyConfig``.

    One scale for each row of a weight W, an output channel or a token, symmetric about 0 (Jacob et al. 2018, section
    2.1, with the zero point 0)::

        s_i = max_j |W_ij| / 127.5        q_ij = clamp(round(W_ij / s_i), -128, 127)        W_ij ~ s_i q_ij

    Activations, gains, gates' biases, decay, alpha and routers stay as they are. The model is then for inference.

    Raises:
        CompressionError: torchao is missing.
    """
    quantize_, config = _import_torchao()
    quantize_(model, config(), filter_fn=lambda module, name: type(module) in (nn.Linear, nn.Embedding))


def _import_torchao() -> tuple[Any, Any]:
    logging.disable(logging.WARNING)  # it names the kernels for other devices that it does not find
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise CompressionError("weights in int8 need the package torchao: pip install 'torus-kernels[quantize]'") \
            from error
    finally:
        logging.disable(logging.NOTSET)
    return quantize_, Int8WeightOnlyConfig


def sparsity(model: nn.Module) -> float:
    """Part of the weights of linear layers that is 0."""
    weights = [_stored(layer.weight) for layer in _linear_layers(model)]
    return sum(int((x == 0).sum()) for x in weights) / sum(x.numel() for x in weights)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight is in int8."""
    return any(_is_int8(x) for x in model.state_dict().values())


def _is_int8(weight: Any) -> bool:
    """Whether it is torchao's ``Int8Tensor``, which is importable only where torchao is."""
    return hasattr(weight, "qdata")


def _stored(weight: Any) -> Tensor:
    return weight.qdata if _is_int8(weight) else weight


def pack(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict in few bytes.

    A quantised weight becomes ``NAME.int8`` and ``NAME.scale``. Where it is smaller, a tensor is a vector of the values
    that are not 0, and their places, one bit each, are ``NAME.mask``.
    """
    packed = {}
    for name, weight in state.items():
        value, key = _stored(weight).detach().cpu(), name
        if _is_int8(weight):
            key = name + _INT8
            packed[name + _SCALE] = weight.scale.cpu()
        kept = value != 0
        mask = torch.from_numpy(np.packbits(kept.numpy().reshape(-1)))
        values = value[kept]
        if mask.nbytes + values.nbytes < value.nbytes:
            packed[name + _MASK] = mask
            value = values
        packed[key] = value
    return packed


def unpack(model: nn.Module, packed: Mapping[str, Tensor]) -> None:
    """Fills a model, of the class and configuration of the one that was packed, with the tensors of `pack`; those of a
    model that is not compressed are their own. Quantised weights stay in int8.

    Raises:
        CompressionError: torchao is needed and missing.
        RuntimeError: the tensors do not fit the model.
    """
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    plain = {name: x for name, x in packed.items() if not name.endswith((_SCALE, _MASK))}
    for name, mask in packed.items():
        if name.endswith(_MASK):
            name = name.removesuffix(_MASK)
            key = name if name in plain else name + _INT8
            plain[key] = _dense(plain[key], mask, shapes[name])
    quantized = {name.removesuffix(_INT8): plain.pop(name) for name in list(plain) if name.endswith(_INT8)}
    if quantized:
        quantize(model)
        weights = model.state_dict()
        if found := {name for name, x in weights.items() if _is_int8(x)} ^ quantized.keys():
            raise RuntimeError(f"not the same weights are in int8: {', '.join(sorted(found))}")
        for name, value in quantized.items():
            weights[name].qdata.copy_(value)
            weights[name].scale.copy_(packed[name + _SCALE])
    missing, unexpected = model.load_state_dict(plain, strict=False)
    if wrong := [*(set(missing) - quantized.keys()), *unexpected]:
        raise RuntimeError(f"missing or unexpected tensors: {', '.join(sorted(wrong))}")


def _dense(values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    kept = np.unpackbits(mask.numpy(), count=shape.numel()).astype(bool).reshape(shape)
    dense = values.new_zeros(shape)
    dense[torch.from_numpy(kept)] = values
    return dense


def bytes_of(state: Mapping[str, Tensor]) -> int:
    """Bytes of the values of tensors that `pack` returns, or of plain ones."""
    return sum(x.nbytes for x in state.values())
