"""Torus attention in Hugging Face transformers, by name::

    from torus_kernels.integrations.transformers import register

    register()
    config = LlamaConfig(..., torus={"n_major": 64, "n_minor": 64})
    model = LlamaForCausalLM._from_config(config, attn_implementation="torus")

Decoder-only models that attend through ``AttentionInterface`` run unchanged: their projections, their rotary
positions, grouped-query heads and caches stay as they are; attention is `torus_attention` in the causal topology with
the default stream weights and decay. A token sees the last ``N = n_major * n_minor`` tokens. A cache that grows may
therefore be exchanged for one of constant size: with ``config.sliding_window = N`` transformers keeps N - 1 tokens.

Padding on the left and, in a batch that is not continued, on the right costs one comparison (``first_key``), as do
documents packed by ``position_ids`` (under transformers' own conditions: no ``attention_mask`` and no cache). No T x T
mask is built. What cannot be represented raises: masks of other forms, caches with unwritten slots (``StaticCache``),
dropout, attention weights as output, soft-capping, sinks, position biases.

Needs transformers >= 5.4 (the extra ``hf``).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from .. import checks
from ..api import _autocast_tokens, fill_defaults, torus_attention
from ..backends import AUTO, check_name
from ..lattice import TorusLattice
from ..ops._library import refuse_transforms
from ..ops.decode import decode_op
from ..padding import leading_padding

_REFUSED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "keys chosen by an indexer",
    "block_indices": "keys chosen by an indexer",
    "position_bias": "a bias on the scores",
    "head_mask": "masked heads",
    "cache": "a paged cache",
}
"""What attention functions of transformers may be given beyond the tensors, and torus attention does not have."""


def register(lattice: TorusLattice | None = None, *, name: str = "torus", backend: str | None = None) -> None:
    """Makes torus attention known to transformers, as ``attn_implementation=name``.

    A model's lattice is ``config.torus``, a mapping of `TorusLattice` arguments (``n_major``, ``n_minor`` and, if
    need be, ``winding``, ``cross_radius`` and ``streams``) that is saved with the model.

    Args:
        lattice: the lattice of models whose configuration has no ``torus``; its topology must be causal.
        name: what models call it, none of transformers' own names; registering a name again replaces it.
        backend: as in `torus_attention`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """
    if lattice is not None:
        _check_causal(checks.check_lattice(lattice))
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be an identifier, got {name!r}")
    taken = AttentionInterface().get(name)
    if name == "eager" or not (taken is None or _is_ours(taken)):
        raise ValueError(f"name must not be that of another attention of transformers, got {name!r}")
    backend = AUTO if backend is None else check_name(backend)
    AttentionInterface.register(name, functools.partial(_attention, lattice, backend))
    AttentionMaskInterface.register(name, functools.partial(_first_keys, lattice))


def _is_ours(attention: object) -> bool:
    return isinstance(attention, functools.partial) and attention.func is _attention


def _check_causal(lattice: TorusLattice) -> TorusLattice:
    if not lattice.is_causal:
        raise ValueError(f"lattice must be causal, got a {lattice.topology} lattice")
    return lattice


def _lattice_of(config: object, default: TorusLattice | None) -> TorusLattice:
    arguments = getattr(config, "torus", None)
    if arguments is None:
        if default is None:
            raise ValueError("torus attention needs a lattice: set config.torus = {'n_major': ..., 'n_minor': ...}, or "
                             "register(lattice)")
        return default
    if not isinstance(arguments, Mapping):
        raise TypeError(f"config.torus must be a mapping of TorusLattice arguments, got {type(arguments).__name__}")
    hashable = tuple((name, tuple(x) if isinstance(x, (list, set, frozenset)) else x) for name, x in arguments.items())
    return _configured_lattice(hashable)


def _configured_lattice(arguments: tuple[tuple[str, Any], ...]) -> TorusLattice:
    try:
        return _check_causal(TorusLattice(**{"topology": "causal"} | dict(arguments)))
    except (TypeError, ValueError) as error:
        raise type(error)(f"config.torus = {dict(arguments)}: {error}") from error


def _first_keys(
    default: TorusLattice | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: object = None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **unused: Any,
) -> Tensor | None:
    """What transformers hands to every layer as its mask: the first visible key of every query, or None for 0.

    It is made once per forward pass, ``[B, 1, Tq]`` int32 by place among the keys. Three dimensions tell it from the
    masks that users prepare themselves, which have two or four.
    """
    # mypy takes __hash__ of a class for that of its instances.
    if not torch.compiler.is_compiling() and not _attends_by_name(type(config)):  # type: ignore[arg-type]
        raise NotImplementedError(f"the model of {type(config).__name__} computes its attention itself and would "
                                  "ignore torus attention: it does not use AttentionInterface")
    if q_offset + q_length != kv_offset + kv_length:
        raise NotImplementedError(
            f"torus attention needs a cache that ends with the newest token, got {kv_length} keys from position "
            f"{kv_offset} on for {q_length} queries from position {int(q_offset)} on: use DynamicCache, not a cache "
            "with unwritten slots, and no prefix without cache"
        )
    sites, sliding_window = _lattice_of(config, default).num_sites, getattr(config, "sliding_window", None)
    if sliding_window is not None and sliding_window < sites:
        raise NotImplementedError(f"torus attention sees the last {sites} tokens (N of its lattice), more than this "
                                  f"model's sliding_window of {sliding_window}: set config.sliding_window to {sites}")
    first = None
    if mask_function is not causal_mask_function:
        first = _document_starts(mask_function, use_vmap, batch_size, kv_offset, kv_offset + kv_length, device)
        first = first[:, kv_length - q_length :]  # [B, Tq]
    if attention_mask is not None:
        length = kv_offset + kv_length
        if attention_mask.dim() != 2 or attention_mask.shape[1] != length:
            raise NotImplementedError(f"torus attention needs an attention_mask [B, {length}], one entry for each "
                                      f"token so far, got {list(attention_mask.shape)}")
        padding = leading_padding("attention_mask", attention_mask.bool())  # [B, 1] or None
        first = first if padding is None else padding if first is None else torch.maximum(first, padding)
    if first is None:
        return None
    return (first - kv_offset).clamp(min=0).to(torch.int32).expand(batch_size, q_length)[:, None]


@functools.cache
def _attends_by_name(config_type: type) -> bool:
    """Whether the causal model of a configuration takes its attention from ``AttentionInterface``.

    A model that does not gets the mask function's None all the same and would attend without any mask.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as models

    if config_type not in models:
        return True
    # The classes of transformers itself are in files of their own; a class derived from one attends as its base does.
    modules = {cls.__module__ for cls in models[config_type].__mro__} - {"transformers.modeling_utils"}
    return any(hasattr(sys.modules[module], "ALL_ATTENTION_FUNCTIONS") for module in modules)


def _document_starts(
    mask_function: Callable[..., Tensor], is_custom: bool, batch_size: int, begin: int, end: int,
    device: torch.device | None,
) -> Tensor:
    """The first token that each of the tokens ``begin <= t < end`` may see, or 0, ``[B, end - begin]``.

    Of transformers' own masks those that are a conjunction with the causal one bound the past by a document, a chunk
    or a sliding window. The first two begin where a token does not see the one before.
    """
    if is_custom or mask_function.__name__ != "and_mask":  # its __qualname__ does not trace in torch 2.11
        raise NotImplementedError("torus attention takes causal masks with padding or packed documents, got a mask of "
                                  "another form")
    t = torch.arange(begin, end, device=device)
    rows = torch.arange(batch_size, device=device)[:, None]
    sees_previous = mask_function(rows, 0, t, (t - 1).clamp(min=0))  # [B, end - begin]
    return torch.where(sees_previous, 0, t).expand(batch_size, -1).cummax(dim=1).values


def _attention(
    default: TorusLattice | None,
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: ``query`` ``[B, H, Tq, D]``, ``key`` and ``value`` ``[B, Hkv, Tk, D]`` with the cached
    ones first, ``attention_mask`` from `_first_keys`. Returns ``[B, Tq, H, D]`` and, for the weights, None."""
    lattice = _lattice_of(getattr(module, "config", None), default)
    _check_call(module, attention_mask, dropout, kwargs)
    q_len, kv_len, sites = query.shape[2], key.shape[2], lattice.num_sites
    if key.shape != value.shape or kv_len < q_len:
        raise NotImplementedError(
            "torus attention needs keys and values of one shape that end with the queries' own, got query "
            f"{list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}"
        )
    query, key, value = _autocast_tokens(query, key, value)
    kept = min(kv_len, sites - 1 + q_len)  # the oldest query sees N - 1 tokens before itself
    key, value = key[:, :, kv_len - kept :], value[:, :, kv_len - kept :]
    first_key = None
    if attention_mask is not None:
        first_key = (attention_mask[:, 0] - (kv_len - kept)).clamp(min=0)  # [B, Tq], counted from the first key kept
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if q_len == 1 and not differentiated:
        checks.check_qkv(query, key[:, :, -1:], value[:, :, -1:])
        weights, decay, scale = fill_defaults(query, None, None, scaling)
        refuse_transforms("torus_attention_decode")
        # Lags are all that matters, so that the keys kept are a ring in which the first of them has position 0.
        out = decode_op(query, key, value, weights, decay, None, None, first_key, lattice.spec, scale, kept, backend)
        return out.transpose(1, 2), None
    before = kept - q_len
    if before > 0:  # rows for the tokens that only serve as keys
        query = nn.functional.pad(query, (0, 0, before, 0))
        if first_key is not None:
            first_key = nn.functional.pad(first_key, (before, 0))
    out = torus_attention(query, key, value, lattice, scale=scaling, first_key=first_key, backend=backend)
    return out[:, :, before:].transpose(1, 2), None


def _check_call(
    module: nn.Module, mask: Tensor | None, dropout: float, kwargs: Mapping[str, Any]
) -> None:
    """Raises for everything that would silently be computed wrongly."""
    if dropout:
        raise NotImplementedError(f"torus attention has no dropout, got {dropout}: set config.attention_dropout = 0")
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"torus attention does not take {what} ({name})")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("torus attention does not make a matrix of weights: output_attentions must be False")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(f"torus attention is causal here, and {type(module).__name__} is not")
    if mask is None:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise NotImplementedError("torus attention takes packed documents by position_ids, with use_cache=False "
                                      "and without attention_mask, got cu_seq_lens_q")
    elif not isinstance(mask, Tensor) or mask.dim() != 3 or mask.dtype != torch.int32:
        form = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(f"torus attention takes an attention_mask [B, T] of padding, got one prepared {form}")
