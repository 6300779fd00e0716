"""The CUDA C++ kernels of ``csrc/cuda``: float16 and bfloat16 on NVIDIA GPUs from sm_80 on, deterministic, memory O(T).

Under ``TORUS_CUDA_EMULATE=1`` the same kernels, compiled for the CPU, run slowly on CPU tensors. They have not been run
on a GPU, so that ``auto`` does not choose them.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from .. import building
from ..lattice import TorusLattice
from . import Problem
from .native import define_operators, packed, why_not_loaded

name = "cuda"

MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16)

_ALIGNMENT = 16  # bytes that a lane reads at once
_EMULATED_CACHE = 1 << 16  # so small that the heads of most problems are worked off in several chunks

define_operators("cuda", backward_reads=", Tensor lse", further=", int stream, int cache_bytes")


@functools.cache
def emulating() -> bool:
    """Whether the kernels run on the CPU: ``TORUS_CUDA_EMULATE`` as it was when this was first asked."""
    return os.environ.get("TORUS_CUDA_EMULATE", "0") not in ("", "0")


@functools.cache
def unavailable() -> str | None:
    """Builds the library if that has not been done, loads it, and keeps the reason where either fails."""
    if emulating():
        return why_not_loaded(building.cuda_emulation())
    if not torch.cuda.is_available():
        return "no CUDA device (TORUS_CUDA_EMULATE=1 runs the kernels on the CPU, slowly)"
    if torch.version.hip is not None:
        return "these kernels are for NVIDIA GPUs"
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if best < MIN_CAPABILITY:
        return f"it needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer, got {best}"
    try:
        return why_not_loaded(building.cuda())
    except building.BuildError as error:  # of the variable with the architectures
        return str(error)


def can_run(problem: Problem) -> str | None:
    device = "cpu" if emulating() else "cuda"
    if problem.device != device:
        where = "the CPU under TORUS_CUDA_EMULATE=1" if device == "cpu" else "CUDA devices"
        return f"it runs on {where}, and these tensors are on {problem.device}"
    if problem.operator == "rope":
        return "it has no rotary positions"
    if problem.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, and these tensors are {str(problem.dtype).removeprefix('torch.')}"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"its heads have up to {MAX_HEAD_DIM} channels, and these have {problem.head_dim}"
    if problem.head_dim % 8:
        return f"its heads have a multiple of 8 channels, and these have {problem.head_dim}"
    return None


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def _run(operator: str, x: Tensor, *arguments: Any) -> None:
    """Calls a native operator on the device of ``x``, on its current stream."""
    call = getattr(torch.ops.torus_kernels, f"cuda_{operator}")
    if not x.is_cuda:
        call(*arguments, 0, _EMULATED_CACHE)
        return
    with torch.cuda.device(x.device):
        call(*arguments, torch.cuda.current_stream().cuda_stream, _cache_bytes(x.device))


def _rows(x: Tensor | None) -> Tensor | None:
    """Tokens whose rows are contiguous and begin at multiples of 16 bytes; others are copied."""
    if x is None:
        return None
    starts = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    aligned = x.stride(-1) == 1 and not any(start % _ALIGNMENT for start in starts)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _operands(
    stream_weights: Tensor, decay: Tensor, ema_state: Tensor | None, ema_alpha: Tensor | None,
    first_key: Tensor | None, lattice: TorusLattice, scale: float,
) -> tuple[Any, ...]:
    if first_key is not None:
        first_key = first_key.to(torch.int64).contiguous()
    return (packed(stream_weights), packed(decay), _rows(ema_state), packed(ema_alpha), first_key, lattice.spec, scale)


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
    _run("attention_forward", q, _rows(q), _rows(k), _rows(v), *operands, out, lse, entropy)


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
    """Writes all gradients, from the forward's ``lse``."""
    operands = _operands(stream_weights, decay, ema_state, ema_alpha, first_key, lattice, scale)
    _run("attention_backward", q, _rows(d_out), _rows(q), _rows(k), _rows(v), lse.contiguous(), *operands,
         d_q, d_k, d_v, d_weights, d_decay, d_state, d_alpha)


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
    _run("attention_decode", q, _rows(q), _rows(keys), _rows(values), *operands, length, out)


def ema_compound(
    x: Tensor, state: Tensor, alpha: Tensor, beta: Tensor | None, velocity: Tensor | None,
    out: Tensor, new_velocity: Tensor | None,
) -> None:
    """Writes ``state + alpha * step`` and, with momentum, the new velocity."""
    _run("ema_compound", x, _rows(x), _rows(state), packed(alpha), packed(beta), _rows(velocity), out, new_velocity)


def ema_compound_backward(
    d_out: Tensor, d_new_velocity: Tensor | None,
    x: Tensor, state: Tensor, alpha: Tensor, beta: Tensor | None, velocity: Tensor | None,
    d_x: Tensor, d_state: Tensor, d_alpha: Tensor, d_beta: Tensor | None, d_velocity: Tensor | None,
) -> None:
    """Writes the gradients of `ema_compound`."""
    _run("ema_compound_backward", x, _rows(d_out), _rows(d_new_velocity), _rows(x), _rows(state), packed(alpha),
         packed(beta), _rows(velocity), d_x, d_state, d_alpha, d_beta, d_velocity)


def ema_multiscale(
    x: Tensor, states: Tensor, alphas: Tensor, scale_weights: Tensor, mixed: Tensor, new_states: Tensor
) -> None:
    """Writes the new states of all scales and their weighted sum."""
    _run("ema_multiscale", x, _rows(x), _rows(states), packed(alphas), packed(scale_weights), mixed, new_states)


def ema_multiscale_backward(
    d_mixed: Tensor, d_new_states: Tensor,
    x: Tensor, states: Tensor, alphas: Tensor, scale_weights: Tensor,
    d_x: Tensor, d_states: Tensor, d_alphas: Tensor, d_scale_weights: Tensor,
) -> None:
    """Writes the gradients of `ema_multiscale`."""
    _run("ema_multiscale_backward", x, _rows(d_mixed), _rows(d_new_states), _rows(x), _rows(states), packed(alphas),
         packed(scale_weights), d_x, d_states, d_alphas, d_scale_weights)
