"""The peers as a user of a GPU would run them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from torus_kernels import Stream, TorusLattice

from .candidates import DIRECTIONS, PEERS, Candidate
from .peers import composition, flex_attention
from .workloads import Inputs


def to_device(found: Any, device: torch.device | str, seen: set[int] | None = None) -> Any:
    """``found`` with every tensor in it on the device; objects are changed in place, tuples are made anew."""
    seen = set() if seen is None else seen
    if isinstance(found, Tensor):
        return found.to(device)
    if isinstance(found, (list, tuple)):
        parts = [to_device(part, device, seen) for part in found]
        return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)
    if hasattr(found, "__dict__") and type(found).__module__ == composition.__name__ and id(found) not in seen:
        seen.add(id(found))
        for name, value in vars(found).items():
            setattr(found, name, to_device(value, device, seen))
    return found


@functools.lru_cache(maxsize=16)
def _plans_on(lattice: TorusLattice, batch: int, heads: int, seq_len: int, dtype: torch.dtype, device: torch.device):
    return to_device(composition._plans.__wrapped__(lattice, batch, heads, seq_len, dtype), device)


def _composed(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`compose` with its indices and masks on the device of the tokens."""

    def compose(q, k, v, weights, decay, state, alpha, lattice: TorusLattice) -> Tensor:
        plans = _plans_on(lattice, *q.shape[:3], decay.dtype, q.device)
        return composition._mix(attend, plans, q, k, v, weights, decay, state, alpha)

    return compose


compose = _composed(composition._attend_sdpa)
compose_matmul = _composed(composition._attend_matmul)


def _dense_attention(kernel: SDPBackend) -> Callable[..., Tensor]:
    """One dense attention by one of SDPA's kernels; weights, decay, state and alpha are not used."""

    def attention(q, k, v, weights, decay, state, alpha, lattice: TorusLattice) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, is_causal=lattice.is_causal)

    return attention


Numbering = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a query and a key: the number of their displacement, and whether there is one."""


def _displacements(lattice: TorusLattice) -> tuple[tuple[Tensor, ...], Numbering]:
    """All displacements, as the lattice's geometry takes them, and how they are numbered."""
    major, minor, sites = lattice.n_major, lattice.n_minor, lattice.num_sites
    if lattice.is_causal:
        def lag(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            tau = query - key
            return tau.clamp(0, sites - 1), (tau >= 0) & (tau < sites)

        return (torch.arange(sites),), lag
    is_open = lattice.topology == "cylinder"
    a = torch.arange(1 - major if is_open else 0, major)

    def difference(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        rows = query // minor - key // minor
        rows = rows + (major - 1) if is_open else (rows + major) % major
        columns = (query % minor - key % minor + minor) % minor
        return rows * minor + columns, query >= 0

    return (a[:, None], torch.arange(minor)), difference


@functools.lru_cache(maxsize=1)
def _flex_streams(lattice: TorusLattice, seq_len: int, device: torch.device) -> tuple:
    """Of each stream the block mask, and its squared distance from a table of displacements."""
    where, number = _displacements(lattice)
    geometry = lattice.lag_geometry if lattice.is_causal else lattice.displacement_geometry
    streams = []
    for stream in Stream:
        visible, rho_squared = (x.flatten().to(device) for x in geometry(stream, *where))
        rho_squared = rho_squared.float()

        def is_visible(b, h, query, key, visible=visible):
            place, exists = number(query, key)
            return exists & visible[place]

        def distance(query, key, rho_squared=rho_squared):
            return rho_squared[number(query, key)[0]]

        on_gpu = device.type == "cuda"  # where, compiled, it makes no table of all pairs
        mask = create_block_mask(is_visible, None, None, seq_len, seq_len, device=device, _compile=on_gpu)
        streams.append((distance, mask))
    return tuple(streams)


def flex(q, k, v, weights, decay, state, alpha, lattice: TorusLattice, attend: Callable | None = None) -> Tensor:
    """Torus attention by eight ``flex_attention`` calls, compiled ones by default. No table of all pairs is made."""
    attend = flex_attention._compiled() if attend is None else attend
    y = 0
    for stream, (distance, mask) in enumerate(_flex_streams(lattice, q.shape[2], q.device)):
        strength = -0.5 * decay[:, stream]

        def with_bias(score, b, h, query, key, strength=strength, distance=distance):
            return score + strength[h] * distance(query, key)

        o = attend(q, k, v, score_mod=with_bias, block_mask=mask)
        y = y + weights[:, stream, None, None] * o.to(weights.dtype)
    return torch.lerp(state.to(alpha.dtype), y, alpha[:, None, None]).to(q.dtype)


FLASH, CUDNN = "flash", "cudnn"

GPU_PEERS = {
    candidate.name: candidate
    for candidate in (
        Candidate("compose", PEERS["compose"].label, compose),
        Candidate("compose_matmul", PEERS["compose_matmul"].label, compose_matmul),
        Candidate(FLASH, "one dense SDPA (flash)", _dense_attention(SDPBackend.FLASH_ATTENTION),
                  computes_operator=False),
        Candidate(CUDNN, "one dense SDPA (cuDNN)", _dense_attention(SDPBackend.CUDNN_ATTENTION),
                  computes_operator=False),
        Candidate("flex", PEERS["flex"].label, flex, directions=DIRECTIONS, compiles=True),
    )
}


def inputs_on(inputs: Inputs, device: torch.device | str) -> Inputs:
    """The same inputs on a device."""
    moved = {name: value.to(device) for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    return Inputs(inputs.lattice, **moved)
