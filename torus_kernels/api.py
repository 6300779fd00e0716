"""The public functions. They check arguments, fill in defaults and call the registered operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends import AUTO, check_name
from .lattice import DEFAULT_DECAY, NUM_STREAMS, TorusLattice
from .ops import attention as attention_ops
from .ops import compounding as compounding_ops
from .ops import rope as rope_ops
from .ops._library import DEVICES

_AUTOCAST_DEVICES = tuple(device.lower() for device in DEVICES)


class TorusStats(NamedTuple):
    """Statistics of each stream's softmax, ``[B, H, T, 8]`` float32, without gradient.

    ``lse`` is the log-sum-exp of the scores, scale and bias included; ``entropy`` is in nats and never negative.
    A stream that the lattice leaves out has lse -inf and entropy 0.
    """

    lse: Tensor
    entropy: Tensor


def torus_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lattice: TorusLattice,
    *,
    stream_weights: Tensor | None = None,
    decay: Tensor | None = None,
    scale: float | None = None,
    ema_state: Tensor | None = None,
    ema_alpha: Tensor | None = None,
    first_key: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention on a torus: eight streams, each its own softmax, mixed by weights and compounded into a state.

    For stream ``s`` with visible keys ``t'`` at geodesic distance ``rho``::

        O_s[t] = sum_t' softmax_t'(scale * q[t].k[t'] - 0.5 * decay[h, s] * rho^2) v[t']
        y[t]   = sum_s stream_weights[.., s] * O_s[t]
        out    = y                                  without a state
        out    = state + alpha * (y - state)        with one: EMA compounding

    Head ``h`` reads key/value head ``h // (H / Hkv)``. Sums are float32 or better with one final rounding.

    Args:
        q: queries ``[B, H, T, D]``, float32, float16, bfloat16 or float64; D a multiple of 8 up to 256.
        k: keys ``[B, Hkv, T, D]``, H a multiple of Hkv, dtype of q. Any strides, as for all tensors.
        v: values ``[B, Hkv, T, D]``, dtype of q.
        lattice: who sees whom. T must be ``lattice.num_sites`` unless the topology is causal.
        stream_weights: mixing weights, ``[H, 8]`` or per token ``[B, H, T, 8]``, any real values, float32
            (float64 with float64 tokens, as for all parameters); 1/8 each by default.
        decay: strength of the geodesic bias ``[H, 8]``; 0 for the loops, 1 for the spirals, 4 for the cross flows
            by default.
        scale: factor of the scores, not differentiable; ``D ** -0.5`` by default.
        ema_state: output of the previous layer or step, shape and dtype of the output. Needs ``ema_alpha``.
        ema_alpha: rate of compounding, ``[H]`` or ``[B, H, T]``. Needs ``ema_state``.
        first_key: causal topology only, ``[B, T]`` int32 or int64: a key is visible only from position
            ``min(first_key[b, t], t)`` on (packed documents, left padding).
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; by default the variable ``TORUS_BACKEND``
            and, without it, the best that can run. A backend that is asked for never gives way to another.

    Returns:
        ``[B, H, T, D]`` in q's dtype, differentiable once with respect to q, k, v, stream_weights, decay,
        ema_state and ema_alpha. Under autocast, q, k, v and ema_state are cast to the autocast dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        BackendError: the backend asked for cannot run here.
    """
    out, _, _ = _attention(
        q, k, v, lattice, stream_weights, decay, scale, ema_state, ema_alpha, first_key, backend, with_stats=False
    )
    return out


def torus_attention_with_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lattice: TorusLattice,
    *,
    stream_weights: Tensor | None = None,
    decay: Tensor | None = None,
    scale: float | None = None,
    ema_state: Tensor | None = None,
    ema_alpha: Tensor | None = None,
    first_key: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, TorusStats]:
    """`torus_attention` and the log-sum-exp and entropy of every stream's softmax."""
    out, lse, entropy = _attention(
        q, k, v, lattice, stream_weights, decay, scale, ema_state, ema_alpha, first_key, backend, with_stats=True
    )
    return out, TorusStats(lse.detach().float(), entropy.detach().float())


def _attention(
    q: Tensor, k: Tensor, v: Tensor, lattice: TorusLattice, stream_weights: Tensor | None, decay: Tensor | None,
    scale: float | None, ema_state: Tensor | None, ema_alpha: Tensor | None, first_key: Tensor | None,
    backend: str | None, *, with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = AUTO if backend is None else check_name(backend)
    for name, tokens in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, tokens)
    q, k, v, ema_state = _autocast_tokens(q, k, v, ema_state)
    stream_weights, decay, ema_alpha = _autocast_parameters(q, stream_weights, decay, ema_alpha)
    checks.check_attention(q, k, v, lattice, stream_weights, decay, ema_state, ema_alpha, first_key)
    stream_weights, decay, scale = fill_defaults(q, stream_weights, decay, scale)
    return attention_ops.attention(
        q, k, v, stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale,
        with_stats=with_stats, backend=backend,
    )


def fill_defaults(
    q: Tensor, stream_weights: Tensor | None, decay: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, float]:
    """Stream weights, decay and scale for queries ``[B, H, T, D]``, with defaults for those that are not given."""
    heads, head_dim = q.shape[1], q.shape[3]
    if stream_weights is None:
        stream_weights = q.new_full((heads, NUM_STREAMS), 1 / NUM_STREAMS, dtype=checks.parameter_dtype(q.dtype))
    if decay is None:
        decay = default_decay(heads, checks.parameter_dtype(q.dtype), q.device)
    return stream_weights, decay, head_dim**-0.5 if scale is None else checks.check_scale(scale)


def default_decay(
    heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The default geodesic decay ``[H, 8]``, filled in place: no copy from the host, so CUDA graphs can hold it."""
    decay = torch.zeros(heads, NUM_STREAMS, dtype=dtype, device=device)
    for first in range(0, NUM_STREAMS, 2):
        if DEFAULT_DECAY[first] != 0:
            decay[:, first : first + 2] = DEFAULT_DECAY[first]  # partners share their default
    return decay


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    # Elsewhere, as on "meta", asking is an error. (`torch.amp.is_autocast_available` does not trace in torch 2.11.)
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _autocast_tokens(*tokens: Any) -> tuple[Any, ...]:
    """Tokens in the autocast dtype, where autocast is on; float64 is left alone, as by PyTorch's own operators."""
    dtype = _autocast_dtype(tokens[0].device.type)
    if dtype is None:
        return tokens
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in castable else x for x in tokens)


def _autocast_parameters(owner: Tensor, *parameters: Any) -> tuple[Any, ...]:
    """Parameters in float32 where autocast is on: a gate computed by a layer under autocast has its dtype."""
    if _autocast_dtype(owner.device.type) is None:
        return parameters
    low = (torch.float16, torch.bfloat16)
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype in low else x for x in parameters)


def ema_compound(
    x: Tensor, state: Tensor, alpha: Tensor, *, beta: Tensor | None = None, velocity: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """EMA compounding ``state + alpha * (x - state)``, with momentum where ``beta`` and ``velocity`` are given::

        velocity' = beta * velocity + (1 - beta) * (x - state)
        out       = state + alpha * velocity'

    Args:
        x: ``[B, H, T, D]``, any dtype of `torus_attention`.
        state: shape and dtype of x.
        alpha: ``[H]`` or ``[B, H, T]``, float32 (float64 with float64 tokens).
        beta: as alpha. Needs ``velocity``.
        velocity: shape of x, float32 (float64 with float64 tokens). Needs ``beta``.

    Returns:
        ``out`` in x's dtype, or ``(out, velocity')``; all differentiable once.

    Raises:
        TypeError, ValueError: as `torus_attention`.
    """
    checks.check_tensor("x", x)
    x, state = _autocast_tokens(x, state)
    alpha, beta, velocity = _autocast_parameters(x, alpha, beta, velocity)
    x = checks.check_tokens("x", x, "[B, H, T, D]")
    parameters = (checks.parameter_dtype(x.dtype),)
    same = {"[B, H, T, D]": tuple(x.shape)}
    checks.check_operand("state", state, same, (x.dtype,), x, "x")
    checks.check_operand("alpha", alpha, checks.gate_layouts(x), parameters, x, "x")
    checks.check_both_or_neither("beta", beta, "velocity", velocity)
    if beta is None:
        return compounding_ops.compound_op(x, state, alpha, None, None, AUTO)[0]
    checks.check_operand("beta", beta, checks.gate_layouts(x), parameters, x, "x")
    checks.check_operand("velocity", velocity, same, parameters, x, "x")
    return compounding_ops.compound_op(x, state, alpha, beta, velocity, AUTO)


def ema_compound_multiscale(
    x: Tensor, states: Tensor, alphas: Tensor, scale_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """EMA compounding with S time constants in one pass::

        new_states[s] = states[s] + alphas[s] * (x - states[s])
        mixed         = sum_s scale_weights[s] * new_states[s]

    Args:
        x: ``[B, H, T, D]``, any dtype of `torus_attention`.
        states: ``[S, B, H, T, D]``, dtype of x.
        alphas: ``[S, H]``, float32 (float64 with float64 tokens).
        scale_weights: ``[S]``, dtype of alphas.

    Returns:
        ``(mixed [B, H, T, D], new_states [S, B, H, T, D])`` in x's dtype, differentiable once.

    Raises:
        TypeError, ValueError: as `torus_attention`.
    """
    checks.check_tensor("x", x)
    x, states = _autocast_tokens(x, states)
    alphas, scale_weights = _autocast_parameters(x, alphas, scale_weights)
    x = checks.check_tokens("x", x, "[B, H, T, D]")
    states = checks.check_tensor("states", states)
    if states.dim() != 5 or states.shape[0] < 1:
        raise ValueError(f"states must have shape [S, B, H, T, D] with S >= 1, got {list(states.shape)}")
    scales, parameters = states.shape[0], (checks.parameter_dtype(x.dtype),)
    checks.check_operand("states", states, {"[S, B, H, T, D]": (scales, *x.shape)}, (x.dtype,), x, "x")
    checks.check_operand("alphas", alphas, {"[S, H]": (scales, x.shape[1])}, parameters, x, "x")
    checks.check_operand("scale_weights", scale_weights, {"[S]": (scales,)}, parameters, x, "x")
    return compounding_ops.multiscale_op(x, states, alphas, scale_weights, AUTO)


def lattice_rope(x: Tensor, lattice: TorusLattice, *, offset: int = 0) -> Tensor:
    """Rotary positions on the torus: scores of turned q and k depend on displacement alone and wrap without a seam.

    The first D/2 channels turn with the major loop, the rest with the minor; within each half the pairs are
    ``(i, i + D/4)``, and pair i turns with the integer harmonic ``1 + (i mod max(1, L // 2))`` of that loop. The open
    axis of a cylinder has no seam to hide: there a harmonic of 1 is half a turn from end to end, so that the two ends
    do not look like neighbours.

    Args:
        x: ``[B, H, T, D]``, any dtype of `torus_attention`, D a multiple of 4.
        lattice: T must be ``lattice.num_sites`` unless the topology is causal.
        offset: position of the first token, causal topology only; any integer >= 0.

    Returns:
        ``[B, H, T, D]`` in x's dtype, differentiable.

    Raises:
        TypeError, ValueError: as `torus_attention`; a nonzero offset off the causal topology is a ValueError.
    """
    x = checks.check_tokens("x", x, "[B, H, T, D]")
    lattice = checks.check_lattice(lattice)
    if x.shape[-1] % 4 != 0 or x.shape[-1] < 4:
        raise ValueError(f"x must have a head dimension that is a multiple of 4, got {x.shape[-1]}")
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset must be an integer, got {type(offset).__name__}")
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
    if lattice.is_causal:
        offset %= lattice.num_sites  # m divides N: one residue serves both halves
    else:
        if offset != 0:
            raise ValueError(f"offset belongs to the causal topology, got {offset} on a {lattice.topology} lattice")
        if x.shape[2] != lattice.num_sites:
            raise ValueError(f"x has sequence length {x.shape[2]}, but a {lattice.topology} lattice of "
                             f"{lattice.n_major} x {lattice.n_minor} needs exactly {lattice.num_sites} tokens")
    return rope_ops.rope_op(x, lattice.spec, offset, False, AUTO)
