"""Attention on a torus: eight streams, their mixing and EMA compounding, as kernels.

The operator is `torus_attention`; `TorusLattice` says who sees whom.
"""

from . import nn
from .api import (
    TorusStats,
    ema_compound,
    ema_compound_multiscale,
    lattice_rope,
    torus_attention,
    torus_attention_with_stats,
)
from .backends import BackendError, available_backends, backend_report
from .decode import TorusKVCache, torus_attention_decode
from .lattice import DEFAULT_DECAY, Stream, TorusLattice

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_DECAY",
    "BackendError",
    "Stream",
    "TorusKVCache",
    "TorusLattice",
    "TorusStats",
    "available_backends",
    "backend_report",
    "ema_compound",
    "ema_compound_multiscale",
    "lattice_rope",
    "nn",
    "torus_attention",
    "torus_attention_decode",
    "torus_attention_with_stats",
]
