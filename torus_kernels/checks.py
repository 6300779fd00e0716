"""Argument checks of the public API: every message names the argument, what it got and what it needs.

Checks read metadata only (never values), so they cost no synchronisation and trace under torch.compile.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .lattice import NUM_STREAMS, TorusLattice

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_DIM = 256


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of weights, decay, alpha, velocity and statistics-in-flight for tokens of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in x.shape) + "]"


def check_tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else f'layout {x.layout}'}")
    return x


def check_dtype(name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if x.dtype not in allowed:
        raise TypeError(f"{name} must have dtype {' or '.join(str(d) for d in allowed)}, got {x.dtype}")


def check_shape(name: str, x: Tensor, layouts: Mapping[str, tuple[int, ...]]) -> None:
    """``layouts`` maps the symbolic form shown to the user to the sizes it stands for here."""
    shape = x.shape
    for sizes in layouts.values():
        # Lengths first: a tuple compares elements before, and a tracer would guard on whether B is H.
        if len(shape) == len(sizes) and shape == sizes:
            return
    wanted = " or ".join(f"{form} = {list(sizes)}" for form, sizes in layouts.items())
    raise ValueError(f"{name} must have shape {wanted}, got {_shape(x)}")


def check_size(name: str, value: object, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value}")
    return value


def check_device(name: str, x: Tensor, device: torch.device, owner: str) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {owner}'s device {device}, got {x.device}")


def check_operand(
    name: str,
    x: object,
    layouts: Mapping[str, tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    like: Tensor,
    owner: str = "q",
) -> None:
    """One tensor that accompanies ``like``: type, dtype, shape and device."""
    x = check_tensor(name, x)
    check_dtype(name, x, dtypes)
    check_shape(name, x, layouts)
    check_device(name, x, like.device, owner)


def check_both_or_neither(first: str, a: object, second: str, b: object) -> None:
    if (a is None) != (b is None):
        given, missing = (second, first) if a is None else (first, second)
        raise ValueError(f"{first} and {second} go together: got {given} without {missing}")


def check_tokens(name: str, x: object, form: str) -> Tensor:
    """A four-dimensional tensor of tokens in a supported dtype."""
    x = check_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape {form}, got {_shape(x)}")
    check_dtype(name, x, DTYPES)
    return x


def check_lattice(lattice: object) -> TorusLattice:
    if not isinstance(lattice, TorusLattice):
        raise TypeError(f"lattice must be a TorusLattice, got {type(lattice).__name__}")
    return lattice


def check_scale(scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    try:
        number = float(scale)
    except OverflowError:  # an integer or a fraction beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"scale must be finite in float64, got {number}")
    return number


def check_head_dim(what: str, head_dim: int) -> int:
    """``what`` begins the message: the argument and its verb."""
    if head_dim % 8 != 0 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{what} a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}")
    return head_dim


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    q = check_tokens("q", q, "[B, H, T, D]")
    batch, heads, seq_len, head_dim = q.shape
    if heads < 1:
        raise ValueError(f"q must have at least one head, got shape {_shape(q)}")
    if seq_len < 1:
        raise ValueError(f"q must have at least one token, got shape {_shape(q)}")
    check_head_dim("q must have a head dimension that is", head_dim)
    k = check_tokens("k", k, "[B, Hkv, T, D]")
    kv_heads = k.shape[1]
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ValueError(f"k must have a number of heads that divides q's {heads}, got {kv_heads}")
    form = {"[B, Hkv, T, D]": (batch, kv_heads, seq_len, head_dim)}
    check_operand("k", k, form, (q.dtype,), q)
    check_operand("v", v, form, (q.dtype,), q)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lattice: TorusLattice,
    stream_weights: Tensor | None,
    decay: Tensor | None,
    ema_state: Tensor | None,
    ema_alpha: Tensor | None,
    first_key: Tensor | None,
) -> None:
    """Everything that can be wrong with the arguments of `torus_attention`, before any kernel starts."""
    check_lattice(lattice)
    check_qkv(q, k, v)
    lattice.check_length(q.shape[2])
    check_options(q, lattice, stream_weights, decay, ema_state, ema_alpha, first_key)


def check_options(
    q: Tensor,
    lattice: TorusLattice,
    stream_weights: Tensor | None,
    decay: Tensor | None,
    ema_state: Tensor | None,
    ema_alpha: Tensor | None,
    first_key: Tensor | None,
) -> None:
    """The tensors that accompany queries ``q`` ``[B, H, T, D]``."""
    batch, heads, seq_len, head_dim = q.shape
    parameters = (parameter_dtype(q.dtype),)
    if stream_weights is not None:
        layouts = {"[H, 8]": (heads, NUM_STREAMS), "[B, H, T, 8]": (batch, heads, seq_len, NUM_STREAMS)}
        check_operand("stream_weights", stream_weights, layouts, parameters, q)
    if decay is not None:
        check_operand("decay", decay, {"[H, 8]": (heads, NUM_STREAMS)}, parameters, q)
    check_both_or_neither("ema_state", ema_state, "ema_alpha", ema_alpha)
    if ema_state is not None:
        check_operand("ema_state", ema_state, {"[B, H, T, D]": (batch, heads, seq_len, head_dim)}, (q.dtype,), q)
        check_operand("ema_alpha", ema_alpha, gate_layouts(q), parameters, q)
    if first_key is not None:
        if not lattice.is_causal:
            raise ValueError(f"first_key belongs to the causal topology, got a {lattice.topology} lattice")
        check_operand("first_key", first_key, {"[B, T]": (batch, seq_len)}, (torch.int32, torch.int64), q)


def gate_layouts(x: Tensor) -> dict[str, tuple[int, ...]]:
    """Accepted shapes of alpha and beta for tokens ``x`` ``[B, H, T, D]``."""
    batch, heads, seq_len, _ = x.shape
    return {"[H]": (heads,), "[B, H, T]": (batch, heads, seq_len)}
