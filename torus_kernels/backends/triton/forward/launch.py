"""Host side of the forward pass: block sizes, chunks of heads, and a few launches for each chunk."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ....lattice import TorusLattice
from ..launching import (
    Blocks,
    Flow,
    capability,
    chunk_heads,
    cross_flows,
    family_mask,
    is_light,
    on_device,
    parts_of,
    rows,
)
from ..primitives.lattice import (
    CLOSED,
    FAMILY_STREAMS,
    MAX_TOKENS,
    OPEN_PAST,
    LineFamily,
    halfway,
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
    halfway: bool  # of lines in bands, see `from_half`
    lines: int  # lines that a program handles
    block_m: int
    block_n: int
    block_c: int  # columns of a folded loop
    num_warps: int
    num_stages: int
    parts: int = 1  # of the channels of lines in bands, each with sums of its own

    @property
    def programs(self) -> int:
        return line_programs(self.families, self.block_m, self.lines)


class CrossLaunch(NamedTuple):
    """Tiles of a cross flow, of sites across and along the steps in which keys are walked."""

    across: int
    along: int
    rows: int  # of keys in a step
    block_n: int
    num_warps: int
    num_stages: int
    parts: int = 1  # of the channels, each with sums of its own


def _alike(blocks: Blocks) -> tuple[Blocks, Blocks]:
    """An entry of the tables below with the same blocks for loops and for spirals."""
    return blocks, blocks


_MAX_WHOLE = 128
_MIN_FOLD = 32  # columns
_SMALL_TILE = 32 * 32  # scores
_MAX_ROWS = 32 * 128  # numbers in a block of float32 queries, of which loops that are not folded make two sums

# By (16-bit, BLOCK_D), of loops and of spirals whose lines one block of keys holds, with the longest of them. Chosen,
# as those below, among those that compile without spills, by instructions for each query.
_WHOLE = {
    (True, 64): (Blocks(64, 128, 4, 2), Blocks(64, 128, 4, 2, 2)),
    (True, 128): _alike(Blocks(64, 64, 4, 1, 2)),
    (True, 256): _alike(Blocks(64, 64, 4, 2, 8)),
    (False, 64): _alike(Blocks(32, 64, 8, 2)),
    (False, 128): _alike(Blocks(32, 64, 8, 2)),
    (False, 256): _alike(Blocks(32, 64, 8, 2)),
}
# The same of lines that are visited in bands.
_BANDS = {
    (True, 64): _alike(Blocks(64, 64, 4, 2, 2)),
    (True, 128): _alike(Blocks(64, 64, 4, 2, 2)),
    (True, 256): (Blocks(64, 64, 4, 2, 8), Blocks(64, 64, 4, 1, 4)),
    (False, 64): _alike(Blocks(32, 32, 8, 2)),
    (False, 128): _alike(Blocks(32, 32, 8, 1)),
    (False, 256): _alike(Blocks(32, 16, 8, 1)),
}
# Where mma.sync needs more registers than wgmma.
_EARLY_WHOLE = {
    (True, 64): _alike(Blocks(64, 128, 4, 2, 2)), (True, 128): _alike(Blocks(64, 64, 4, 2, 4)),
    (True, 256): _alike(Blocks(32, 64, 4, 2, 4)),
}
_EARLY_BANDS = {
    (True, 64): (Blocks(64, 64, 4, 1, 2), Blocks(64, 64, 4, 2, 2)), (True, 128): _alike(Blocks(64, 64, 4, 2, 4)),
    (True, 256): _alike(Blocks(32, 64, 4, 1, 2)),
}


def _power(n: int) -> int:
    return max(MIN_BLOCK, triton.next_power_of_2(n))


def _folds(family: LineFamily, block_m: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `folded_steps` takes the family, and pays."""
    if family.form != CLOSED.value or len(FAMILY_STREAMS[family.family]) == 1 or family.loop % 2:
        return False
    if not is_light(head_dim, dtype) and dtype != torch.float32:
        return False  # it takes more registers than there are
    return family.loop // 2 >= max(_MIN_FOLD, block_m)


def _of_one_length(family: LineFamily, seq_len: int) -> bool:
    """Whether no line lacks its last token, as where time is open some may."""
    return family.form != OPEN_PAST.value or seq_len % family.num_lines == 0


def _whole_blocks(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Blocks, Blocks]:
    tiles = _WHOLE if capability >= (9, 0) else _WHOLE | _EARLY_WHOLE
    return tiles[dtype != torch.float32, max(64, block_d(head_dim))]


def _whole_launch(
    members: list[tuple[LineFamily, bool]], block_m: int, seq_len: int, head_dim: int, dtype: torch.dtype,
    capability: tuple[int, int],
) -> LineLaunch:
    """Families whose lines fit one block of keys, loops folded or not."""
    light = is_light(head_dim, dtype)
    families = tuple(family for family, _ in members)
    halves = [family.loop // 2 for family, fold in members if fold]
    block_n = _power(max((family.length for family, fold in members if not fold), default=1))
    block_c = _power(max(halves, default=1))
    loops = families[0].family < 2
    of_loops, of_spirals = _whole_blocks(head_dim, dtype, capability)
    _, _, num_warps, num_stages, parts, _ = of_loops if loops else of_spirals
    if dtype == torch.float32 and block_m * head_dim > _MAX_ROWS and loops:
        block_m //= 2
    if light and not halves and block_m * block_n <= _SMALL_TILE:
        num_warps = 2  # what a line costs beside its scores is paid by every warp
    if loops and families[0].length > 64:
        num_stages = 1
    even = all(
        _of_one_length(family, seq_len) and family.length % block_m == 0
        and (family.loop // 2 == block_c if fold else family.length == block_n)
        for family, fold in members
    )
    return LineLaunch(families, family_mask(families), True, bool(halves), even, False, 4, block_m, block_n, block_c,
                      num_warps, num_stages, parts_of(parts, head_dim))


def _band_launch(
    families: tuple[LineFamily, ...], seq_len: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> LineLaunch:
    """Families whose streams are visited one by one, over many blocks of keys."""
    tiles = _BANDS if capability >= (9, 0) else _BANDS | _EARLY_BANDS
    of_loops, of_spirals = tiles[dtype != torch.float32, max(64, block_d(head_dim))]
    loops = families[0].family < 2
    block_m, block_n, num_warps, num_stages, parts, _ = of_loops if loops else of_spirals
    past, light = all(family.form == OPEN_PAST.value for family in families), is_light(head_dim, dtype)
    if past and light:
        num_stages = 1  # of two or three steps nothing is gained by more, and they take registers
    closed = all(family.form == CLOSED.value for family in families)
    if closed and light and not loops and all(family.length % 128 == 0 for family in families):
        block_n = 128  # all of the line is visited: no more scores, of which more share what a step costs
    # Blocks of keys are counted from the block of queries, or of spirals from the line's begin.
    even = all(family.length % block_m == 0 and _of_one_length(family, seq_len) for family in families)
    if past:
        even = even and block_m % block_n == 0 and all(
            family.loop - family.loop // 2 >= block_n for family in families if loops
        )
    elif loops:
        even = even and closed and block_m % block_n == 0 and all(
            family.loop // 2 % block_n == 0 for family in families
        )
    else:
        even = even and closed and all(family.length % block_n == 0 for family in families)
    turns = all(halfway(family, block_m, block_n) for family in families)
    return LineLaunch(families, family_mask(families), False, False, even, turns, 1, block_m, block_n, MIN_BLOCK,
                      num_warps, num_stages, parts_of(parts, head_dim))


def line_launches(
    lattice: TorusLattice, seq_len: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[LineLaunch, ...]:
    """Families whose lines fit one block of keys, then those that are visited in bands."""
    families = line_families(lattice, seq_len)
    if not families:
        return ()
    light = is_light(head_dim, dtype)
    limit = _whole_blocks(head_dim, dtype, capability)[0].block_m
    block_m = min(limit, _power(max(family.length for family in families)))
    whole, bands = {}, {}
    for family in families:
        loops = len(FAMILY_STREAMS[family.family]) == 2
        fold = _folds(family, block_m, head_dim, dtype)
        # Longer than half the longest, only a line that fills its block leaves registers, which need not mask it, and
        # of loops one that folds.
        simple = fold if loops else family.form != OPEN_PAST.value
        if family.length > _MAX_WHOLE // 2 and not (light and simple and family.length == _MAX_WHOLE):
            bands.setdefault(loops, []).append(family)
            continue
        # Loops and spirals with long lines are launched apart: together they would take more registers.
        whole.setdefault((loops and family.length > 64, loops and not fold), []).append((family, fold))
    return (
        *(_whole_launch(members, block_m, seq_len, head_dim, dtype, capability) for members in whole.values()),
        *(_band_launch(tuple(members), seq_len, head_dim, dtype, capability) for members in bands.values()),
    )


def cross_launch(
    flow: Flow, lattice: TorusLattice, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> CrossLaunch:
    """Tiles 16 sites long, and blocks of keys as long as a tile with its halo."""
    wide, early, narrow = block_d(head_dim), capability < (9, 0), dtype != torch.float32
    block_n = max(MIN_BLOCK, min(64, triton.next_power_of_2(flow.walked(16))))
    across, num_warps, num_stages, parts = 4, 4, 2, 1
    if not narrow:
        across = 2
        num_warps = 8 if wide > 64 else 4
        num_stages = 2 if early and not lattice.is_causal else 1  # a second stage takes registers
    elif wide > 128:
        across, num_stages, parts = 2 if early else 4, 1, 4
    elif wide > 64:
        num_stages, parts = (2, 4) if early else (1, 1)
    elif early:
        num_stages, parts = 3 if lattice.is_causal else 2, 2  # a third spares registers there
    most = 1
    if wide <= 128 and narrow:
        most = 2 if early or wide > 64 else 5
    rows = flow.rows_a_step(across, lattice, most, True)
    return CrossLaunch(across, 16, rows, block_n, num_warps, num_stages, parts_of(parts, head_dim))


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
        "HALFWAY": launch.halfway,
        "FOLD": launch.fold, "LINES": launch.lines, "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n, "BLOCK_C": launch.block_c, "num_warps": launch.num_warps,
        "num_stages": launch.num_stages, "PARTS": launch.parts, **shared,
    }) for launch in launches)
    crosses = []
    for place, flow in enumerate(flows):
        cross = cross_launch(flow, lattice, head_dim, dtype, capability(device))
        tile_u, tile_v = flow.tile(cross.across, cross.along)
        crosses.append((flow.tiles(cross.across, cross.along), flow.arguments, {
            "FLOW": flow.stream, "BY_ROWS": flow.by_rows, "FINISH": place == len(flows) - 1,
            "NUM_PARTIALS": num_partials + place, "TILE_U": tile_u, "TILE_V": tile_v, "ROWS": cross.rows,
            "BLOCK_N": cross.block_n, "PARTS": cross.parts,
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
