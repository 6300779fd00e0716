"""What the backends made of C++ share: schemas of their operators, and arguments as their kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import building
from ..ops._library import LIBRARY
from ..ops.attention import OPERANDS

_QKV = "Tensor q, Tensor k, Tensor v"
_COMPOUND = "Tensor x, Tensor state, Tensor alpha, Tensor? beta, Tensor? velocity"
_MULTISCALE = "Tensor x, Tensor states, Tensor alphas, Tensor scale_weights"


def define_operators(prefix: str, backward_reads: str = "", further: str = "") -> None:
    """Defines attention, decoding and compounding as ``torus_kernels::<prefix>_<name>``.

    ``backward_reads`` is what attention's gradient reads of the forward's results, behind v; ``further`` are arguments
    that follow all others.
    """
    operators = {
        "attention_forward": f"{_QKV}, {OPERANDS}, Tensor(a!) out, Tensor(b!)? lse, Tensor(c!)? entropy",
        "attention_backward": f"Tensor d_out, {_QKV}{backward_reads}, {OPERANDS}, Tensor(a!) d_q, Tensor(b!) d_k, "
                              "Tensor(c!) d_v, Tensor(d!) d_weights, Tensor(e!) d_decay, Tensor(f!)? d_state, "
                              "Tensor(g!)? d_alpha",
        "attention_decode": f"Tensor q, Tensor keys, Tensor values, {OPERANDS}, int length, Tensor(a!) out",
        "ema_compound": f"{_COMPOUND}, Tensor(a!) out, Tensor(b!)? new_velocity",
        "ema_compound_backward": f"Tensor d_out, Tensor? d_new_velocity, {_COMPOUND}, Tensor(a!) d_x, "
                                 "Tensor(b!) d_state, Tensor(c!) d_alpha, Tensor(d!)? d_beta, Tensor(e!)? d_velocity",
        "ema_multiscale": f"{_MULTISCALE}, Tensor(a!) mixed, Tensor(b!) new_states",
        "ema_multiscale_backward": f"Tensor d_mixed, Tensor d_new_states, {_MULTISCALE}, Tensor(a!) d_x, "
                                   "Tensor(b!) d_states, Tensor(c!) d_alphas, Tensor(d!) d_scale_weights",
    }
    for name, arguments in operators.items():
        LIBRARY.define(f"{prefix}_{name}({arguments}{further}) -> ()")


def packed(x: Tensor | None) -> Tensor | None:
    """A parameter without gaps."""
    return None if x is None else x.contiguous()


def why_not_loaded(library: building.Library) -> str | None:
    """Builds the library if that has not been done and loads it; the reason where either fails."""
    try:
        torch.ops.load_library(building.ensure_library(library))
    except (building.BuildError, OSError) as error:
        return f"{error}: {error.__cause__}" if error.__cause__ is not None else str(error)
    return None
