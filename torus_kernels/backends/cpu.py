"""The C++ kernels of ``csrc/cpu``: all dtypes and topologies on the CPU, memory O(T), bit-exact from run to run."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import building
from ..lattice import TorusLattice
from ..ops._library import LIBRARY
from . import Problem
from .native import define_operators, packed, why_not_loaded

name = "cpu"

define_operators("cpu")
LIBRARY.define("cpu_rope(Tensor x, int[] lattice, int offset, bool inverse, Tensor(a!) out) -> ()")
LIBRARY.define("cpu_instruction_set() -> int")


INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "amx")
"""What the kernels are compiled for, each a superset of the one before; the variable TORUS_CPU_ISA forces one."""


@functools.cache
def unavailable() -> str | None:
    """Builds the library if that has not been done, loads it, and keeps the reason where either fails."""
    if reason := why_not_loaded(building.CPU):
        return reason
    try:
        instruction_set()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def can_run(problem: Problem) -> str | None:
    return None if problem.device == "cpu" else f"it runs on the CPU, and these tensors are on {problem.device}"


def instruction_set() -> str:
    """The instruction set of the kernels in use, one of `INSTRUCTION_SETS`."""
    return INSTRUCTION_SETS[torch.ops.torus_kernels.cpu_instruction_set()]


def _rows(x: Tensor | None) -> Tensor | None:
    """Tokens whose last dimension is contiguous; any other strides are read as they are."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _operands(
    stream_weights: Tensor, decay: Tensor, ema_state: Tensor | None, ema_alpha: Tensor | None,
    first_key: Tensor | None, lattice: TorusLattice, scale: float,
) -> tuple[Any, ...]:
    if first_key is not None:
        first_key = first_key.to(torch.int64).contiguous()
    return (packed(stream_weights), packed(decay), _rows(ema_state), packed(ema_alpha), first_key, lattice.spec,
            scale)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stream_weights: Tensor,
    decay: Tensor,
    ema_state: Tensor | None,
    ema_alpha: Tensor | None,
    first_key: Tensor | None,
    lattice: TorusLattice,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    entropy: Tensor | None,
) -> None:
    """Writes ``out`` ``[B, H, T, D]`` and, where given, ``lse`` and ``entropy`` ``[B, H, T, 8]``."""
    operands = _operands(stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale)
    torch.ops.torus_kernels.cpu_attention_forward(_rows(q), _rows(k), _rows(v), *operands, out, lse, entropy)


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    stream_weights: Tensor,
    decay: Tensor,
    ema_state: Tensor | None,
    ema_alpha: Tensor | None,
    first_key: Tensor | None,
    lattice: TorusLattice,
    scale: float,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_weights: Tensor,
    d_decay: Tensor,
    d_state: Tensor | None,
    d_alpha: Tensor | None,
) -> None:
    """Writes all gradients; a tile holds whole softmaxes, so ``lse`` is not needed."""
    operands = _operands(stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale)
    torch.ops.torus_kernels.cpu_attention_backward(
        _rows(d_out), _rows(q), _rows(k), _rows(v), *operands, d_q, d_k, d_v, d_weights, d_decay, d_state, d_alpha
    )


def attention_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    stream_weights: Tensor,
    decay: Tensor,
    ema_state: Tensor | None,
    ema_alpha: Tensor | None,
    first_key: Tensor | None,
    lattice: TorusLattice,
    scale: float,
    length: int,
    out: Tensor,
) -> None:
    """Writes ``out`` ``[B, H, 1, D]``, the newest of ``length`` tokens against rings ``[B, Hkv, N, D]``."""
    operands = _operands(stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale)
    torch.ops.torus_kernels.cpu_attention_decode(_rows(q), _rows(keys), _rows(values), *operands, length, out)


def ema_compound(
    x: Tensor, state: Tensor, alpha: Tensor, beta: Tensor | None, velocity: Tensor | None,
    out: Tensor, new_velocity: Tensor | None,
) -> None:
    """Writes ``state + alpha * step`` and, with momentum, the new velocity."""
    torch.ops.torus_kernels.cpu_ema_compound(
        _rows(x), _rows(state), packed(alpha), packed(beta), _rows(velocity), out, new_velocity
    )


def ema_compound_backward(
    d_out: Tensor, d_new_velocity: Tensor | None,
    x: Tensor, state: Tensor, alpha: Tensor, beta: Tensor | None, velocity: Tensor | None,
    d_x: Tensor, d_state: Tensor, d_alpha: Tensor, d_beta: Tensor | None, d_velocity: Tensor | None,
) -> None:
    """Writes the gradients of `ema_compound`."""
    torch.ops.torus_kernels.cpu_ema_compound_backward(
        _rows(d_out), _rows(d_new_velocity), _rows(x), _rows(state), packed(alpha), packed(beta), _rows(velocity),
        d_x, d_state, d_alpha, d_beta, d_velocity,
    )


def ema_multiscale(
    x: Tensor, states: Tensor, alphas: Tensor, scale_weights: Tensor, mixed: Tensor, new_states: Tensor
) -> None:
    """Writes the new states of all scales and their weighted sum."""
    torch.ops.torus_kernels.cpu_ema_multiscale(
        _rows(x), _rows(states), packed(alphas), packed(scale_weights), mixed, new_states
    )


def ema_multiscale_backward(
    d_mixed: Tensor, d_new_states: Tensor,
    x: Tensor, states: Tensor, alphas: Tensor, scale_weights: Tensor,
    d_x: Tensor, d_states: Tensor, d_alphas: Tensor, d_scale_weights: Tensor,
) -> None:
    """Writes the gradients of `ema_multiscale`."""
    torch.ops.torus_kernels.cpu_ema_multiscale_backward(
        _rows(d_mixed), _rows(d_new_states), _rows(x), _rows(states), packed(alphas), packed(scale_weights),
        d_x, d_states, d_alphas, d_scale_weights,
    )


def rope(x: Tensor, lattice: TorusLattice, offset: int, inverse: bool, out: Tensor) -> None:
    """Writes ``x`` turned by its lattice positions, or back where ``inverse``."""
    torch.ops.torus_kernels.cpu_rope(_rows(x), lattice.spec, offset, inverse, out)
