"""Host side of the forward pass: block sizes, chunks of heads, and a few launches for each chunk."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ....lattice import TorusLattice
from ..launching import capability, chunk_heads, cross_flows, on_device, rows
from ..primitives.lattice import (
    FAMILY_STREAMS,
    MAX_TOKENS,
    OPEN_BOTH,
    OPEN_PAST,
    LineFamily,
    line_families,
    line_programs,
)
from ..primitives.softmax import LOG2E
from ..primitives.tiles import MIN_BLOCK, block_d, input_precision
from .cross import cross_kernel
from .lines import lines_kernel


class LineLaunch(NamedTuple):
    """Families that share a launch, and its configuration."""

    families: tuple[LineFamily, ...]
    family_mask: int
    whole: bool
    fold: bool
    even: bool  # every block of positions is full
    lines: int  # lines that a program handles
    block_m: int
    block_n: int
    block_c: int  # columns of a folded loop
    num_warps: int
    num_stages: int

    @property
    def programs(self) -> int:
        return line_programs(self.families, self.block_m, self.lines)


class CrossLaunch(NamedTuple):
    """Tiles of a cross flow, of sites across and along the steps in which keys are walked."""

    across: int
    along: int
    block_n: int
    num_warps: int
    num_stages: int


_MAX_WHOLE = 128
_BLOCKED_N = 64
_MIN_FOLD = 32  # columns
_SMALL_TILE = 32 * 32  # scores


def _span(family: LineFamily, block_m: int) -> int:
    """Keys that a block of queries of the longest line may see."""
    if family.form == OPEN_PAST.value:
        return min(family.length, block_m + family.max_step)
    return family.length


def _block_m(families: tuple[LineFamily, ...], head_dim: int, dtype: torch.dtype) -> int:
    longest = max(family.length for family in families)
    light = block_d(head_dim) <= 64 and dtype != torch.float32 and families[0].form != OPEN_PAST.value
    return max(MIN_BLOCK, min(64 if light else 32, triton.next_power_of_2(longest)))


def _folds(family: LineFamily, block_m: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `folded_steps` takes the family, and pays."""
    half = family.loop // 2
    if block_d(head_dim) > 64 and dtype != torch.float32:
        return False  # it takes more registers than there are
    if len(FAMILY_STREAMS[family.family]) == 1 or family.form == OPEN_BOTH.value or family.loop % 2 or half < _MIN_FOLD:
        return False
    if family.form == OPEN_PAST.value:
        return block_m <= half and family.length > half
    return block_m <= half


def line_launches(
    lattice: TorusLattice, seq_len: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[LineLaunch, ...]:
    """Families whose visible keys fit one block, then those that take two passes over blocks."""
    families = line_families(lattice, seq_len)
    if not families:
        return ()
    default_m = _block_m(families, head_dim, dtype)
    light = block_d(head_dim) <= 64 and dtype != torch.float32
    max_whole = _MAX_WHOLE if light else _MAX_WHOLE // 2
    groups = {}
    for family in families:
        fold = _folds(family, default_m, head_dim, dtype)
        whole = family.loop <= max_whole if fold else _span(family, default_m) <= max_whole
        loops = len(FAMILY_STREAMS[family.family]) == 2
        # Loops and spirals with long lines are launched apart: together they would take more registers.
        heavy = _span(family, default_m) > 64
        groups.setdefault((whole, heavy and loops, loops and not fold), []).append((family, fold))
    launches = []
    for (whole, heavy_loops, _), members in groups.items():
        unfolded = [family for family, fold in members if not fold]
        folded = [family for family, fold in members if fold]
        block_m, num_warps = default_m, 4 if dtype != torch.float32 else 8
        if capability < (9, 0) and whole and not folded and max(block_m, *(_span(f, block_m) for f in unfolded)) > 64:
            block_m, num_warps = 32, 2  # mma.sync would take more registers than there are
        block_n = block_c = _BLOCKED_N if light else _BLOCKED_N // 2
        if whole:
            spans = (max(MIN_BLOCK, triton.next_power_of_2(_span(family, block_m))) for family in unfolded)
            block_n = max(spans, default=MIN_BLOCK)
            block_c = max((triton.next_power_of_2(f.loop // 2) for f in folded), default=MIN_BLOCK)
            if light and not folded and block_m * block_n <= _SMALL_TILE:
                num_warps = 2  # what a line costs beside its scores is paid by every warp
        even = whole and not lattice.is_causal and all(
            family.length % block_m == 0 and (family.loop // 2 == block_c if fold else family.length == block_n)
            for family, fold in members
        )
        launches.append(LineLaunch(
            tuple(family for family, _ in members), sum(1 << family.family for family, _ in members), whole,
            bool(folded), even, 4 if whole else 1, block_m, block_n, block_c, num_warps,
            1 if heavy_loops and (whole or not light) else 2,
        ))
    return tuple(launches)


def cross_launch(width: int, head_dim: int, dtype: torch.dtype) -> CrossLaunch:
    """Tiles 16 sites long, and blocks of keys as long as a tile with its halo, where the window is ``width`` long."""
    light = block_d(head_dim) <= 64 and dtype != torch.float32
    along = 16
    block_n = max(MIN_BLOCK, min(64, triton.next_power_of_2(along + width - 1)))
    wide_rows = block_d(head_dim) * dtype.itemsize > 256
    return CrossLaunch(4 if light else 2, along, block_n, 8 if wide_rows else 4, 2)


def _axes(lattice: TorusLattice) -> tuple[int, int]:
    """``(n_major, n_minor)``, cut to where an axis is longer than any sequence: no key is seen beyond."""
    return min(lattice.n_major, 2 * MAX_TOKENS), min(lattice.n_minor, 2 * MAX_TOKENS)


class _Plan(NamedTuple):
    """What calls with the same sizes share: grids, numbers and constants of every launch."""

    slots: int  # partial sums of a head
    chunk: int  # heads
    chunks: tuple[tuple[int, int], ...]  # first head and number of heads
    sizes: tuple[int, ...]
    lines: tuple[tuple[int, dict[str, object]], ...]  # programs of a head, constants
    cross_sizes: tuple[int, ...]
    crosses: tuple[tuple[int, tuple[int | float, ...], dict[str, object]], ...]  # tiles of a head, numbers, constants


@functools.lru_cache(maxsize=256)
def _plan(
    lattice: TorusLattice, batch: int, heads: int, seq_len: int, head_dim: int, dtype: torch.dtype,
    device: torch.device, precision: str, token_weights: bool, has_first_key: bool, has_state: bool, token_alpha: bool,
    with_lse: bool, with_entropy: bool,
) -> _Plan:
    launches = line_launches(lattice, seq_len, head_dim, dtype, capability(device))
    families = sum(launch.family_mask for launch in launches)
    num_partials = families.bit_count()
    flows = cross_flows(lattice, seq_len)
    slots = num_partials + len(flows) - 1
    chunk = chunk_heads(batch * heads, slots * seq_len * head_dim * 4, device)
    chunks = tuple((first, min(chunk, batch * heads - first)) for first in range(0, batch * heads, chunk))
    shared = {
        "TOPOLOGY": lattice.spec[0], "STREAMS": lattice.spec[6], "D": head_dim, "BLOCK_D": block_d(head_dim),
        "TOKEN_WEIGHTS": token_weights, "HAS_FIRST_KEY": has_first_key, "WITH_LSE": with_lse,
        "WITH_ENTROPY": with_entropy, "PRECISION": precision,
    }
    lines = tuple((launch.programs, {
        "FAMILIES": families, "GRID_FAMILIES": launch.family_mask, "WHOLE": launch.whole, "EVEN": launch.even,
        "FOLD": launch.fold, "LINES": launch.lines, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n,
        "BLOCK_C": launch.block_c, "num_warps": launch.num_warps, "num_stages": launch.num_stages, **shared,
    }) for launch in launches)
    crosses = []
    for place, flow in enumerate(flows):
        cross = cross_launch(flow.width, head_dim, dtype)
        tile_u, tile_v = flow.tile(cross.across, cross.along)
        crosses.append((flow.tiles(cross.across, cross.along), flow.arguments, {
            "FLOW": flow.stream, "BY_ROWS": flow.by_rows, "FINISH": place == len(flows) - 1,
            "NUM_PARTIALS": num_partials + place, "TILE_U": tile_u, "TILE_V": tile_v, "BLOCK_N": cross.block_n,
            "HAS_STATE": has_state, "TOKEN_ALPHA": token_alpha, "num_warps": cross.num_warps,
            "num_stages": cross.num_stages, **shared,
        }))
    return _Plan(slots, chunk, chunks, (lattice.n_major, lattice.n_minor, lattice.winding, seq_len), lines,
                 (*_axes(lattice), seq_len), tuple(crosses))


def _strides(state: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if state is None else state.stride()[:3]


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
    batch, heads, seq_len, head_dim = q.shape
    if seq_len > MAX_TOKENS:
        raise ValueError(f"q has sequence length {seq_len}, and the triton backend takes at most {MAX_TOKENS}")
    q, k, v = rows(q), rows(k), rows(v)
    stream_weights, decay = stream_weights.contiguous(), decay.contiguous()
    if ema_state is not None:
        ema_state, ema_alpha = rows(ema_state), ema_alpha.contiguous()
    if first_key is not None:
        first_key = first_key.contiguous()

    plan = _plan(
        lattice, batch, heads, seq_len, head_dim, q.dtype, q.device, input_precision(q.dtype),
        stream_weights.dim() == 4, first_key is not None, ema_state is not None,
        ema_alpha is not None and ema_alpha.dim() == 3, lse is not None, entropy is not None,
    )
    partials = torch.empty(plan.slots * plan.chunk * seq_len * head_dim, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    cross_strides = (*strides, *_strides(ema_state), *out.stride()[:3])
    group, base2_scale = heads // k.shape[1], scale * LOG2E.value
    with on_device(q):
        for first_head, count in plan.chunks:
            numbers = (first_head, heads, group, base2_scale)
            for programs, constants in plan.lines:
                lines_kernel[programs, count](
                    q, k, v, stream_weights, decay, first_key, partials, lse, entropy, *strides, *plan.sizes, *numbers,
                    **constants,
                )
            for tiles, window, constants in plan.crosses:
                cross_kernel[tiles, count](
                    q, k, v, stream_weights, decay, first_key, ema_state, ema_alpha, partials, out, lse, entropy,
                    *cross_strides, *plan.cross_sizes, *numbers, *window, **constants,
                )
