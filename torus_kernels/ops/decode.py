"""``torus_kernels::attention_decode``: the newest token of a causal sequence against a ring of cached keys."""

from __future__ import annotations

from torch import Tensor

from ..backends import Problem, select
from ..lattice import TorusLattice
from ._library import define, empty_tokens
from .attention import OPERANDS


def _decode(
    q, keys, values, stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale, length, backend
) -> Tensor:
    module = select(backend, Problem(q.device.type, q.dtype, q.shape[-1], "decode"))
    out = empty_tokens(q)
    if q.numel() > 0:
        module.attention_decode(
            q, keys, values, stream_weights, decay, ema_state, ema_alpha, first_key, TorusLattice.from_spec(lattice),
            scale, length, out,
        )
    return out


def _decode_fake(
    q, keys, values, stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale, length, backend
) -> Tensor:
    return empty_tokens(q)


# Symbolic, so that a traced decode step serves every length.
decode_op = define(
    "attention_decode", f"Tensor q, Tensor keys, Tensor values, {OPERANDS}, SymInt length, str backend", "Tensor",
    _decode, _decode_fake,
)
