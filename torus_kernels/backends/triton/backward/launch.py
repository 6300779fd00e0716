"""Host side of the backward pass: block sizes, chunks of heads, workspaces and the launches for each chunk."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ....lattice import NUM_STREAMS, TorusLattice
from ..launching import (
    MAX_GRID_Y,
    Blocks,
    Flow,
    capability,
    chunk_heads,
    cross_flows,
    family_mask,
    is_light,
    l2_bytes,
    on_device,
    parts_of,
    rows,
)
from ..primitives.lattice import FAMILY_STREAMS, OPEN_PAST, LineFamily, halfway, line_families, line_programs
from ..primitives.tiles import MIN_BLOCK, block_d, input_precision
from .cross import cross_by_queries
from .cross_keys import cross_by_keys
from .line_queries import lines_by_queries
from .lines import lines_by_keys
from .operands import HAS_STATE, PARAMETER_SUMS, ROW_NUMBERS, TOKEN_ALPHA, TOKEN_WEIGHTS, Operands, Results, Strided
from .parameters import reduce_parameters


class LineLaunch(NamedTuple):
    """Line families that share their launches."""

    families: tuple[LineFamily, ...]
    keys: Blocks  # of `lines_by_keys`
    queries: Blocks | None  # of `lines_by_queries`; None where a block of keys holds a whole line

    @property
    def whole_line(self) -> bool:
        return self.queries is None

    @property
    def row_block(self) -> int:
        """Positions of a program that owns query rows."""
        return self.keys.block_n if self.queries is None else self.queries.block_m


class CrossLaunch(NamedTuple):
    """Tiles of a cross flow, of sites across and along the steps of the walk around them."""

    across: int
    along: int
    block: int  # the other side of a score tile: sites of one step
    num_warps: int
    num_stages: int
    parts: int = 1  # of the channels, each with sums of its own
    pairs: bool = False  # of rows in a turn of the loop, where they come in pairs


def _power(n: int, limit: int) -> int:
    return max(MIN_BLOCK, min(limit, triton.next_power_of_2(n)))


def _alike(limit: int, by_queries: Blocks, by_keys: Blocks):
    """An entry of the tables below with the same blocks for loops and for spirals."""
    return limit, (by_queries, by_keys), (by_queries, by_keys)


# By (16-bit, BLOCK_D): the longest line that one block of keys holds, and the blocks of longer ones, queries first and
# keys first, of loops and of spirals. Chosen among those that compile without spills, by instructions per score.
_LINES = {
    (True, 64): (
        64,
        (Blocks(64, 32, 4, 2, summed=2), Blocks(64, 128, 8, 2)),
        (Blocks(64, 64, 4, 2), Blocks(64, 128, 8, 2)),
    ),
    (True, 128): (
        32,
        (Blocks(64, 64, 4, 1, parts=2), Blocks(32, 64, 4, 1, parts=2)),
        (Blocks(64, 64, 4, 2, parts=2), Blocks(32, 64, 4, 2, parts=2)),
    ),
    (True, 256): _alike(16, Blocks(32, 32, 4, 2, parts=4), Blocks(32, 32, 4, 1, parts=4)),
    (False, 64): _alike(32, Blocks(32, 32, 4, 2), Blocks(16, 32, 4, 2)),
    (False, 128): _alike(16, Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1)),
    (False, 256): _alike(16, Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}
# Where mma.sync needs more registers than wgmma.
_EARLY_LINES = {
    (True, 64): (
        64,
        (Blocks(64, 32, 4, 2, parts=2, summed=2), Blocks(64, 128, 8, 2)),
        (Blocks(64, 32, 4, 2, parts=2, summed=2), Blocks(64, 128, 8, 2, parts=2)),
    ),
    (True, 128): _alike(32, Blocks(64, 32, 4, 2, parts=2), Blocks(64, 64, 8, 1)),
}


def _fills_long_blocks(families: tuple[LineFamily, ...], head_dim: int, dtype: torch.dtype) -> bool:
    """Whether twice the queries, which share the cost of a block of keys, leave no row idle and have the registers.
    Where time is open, more queries to a block are more scores that nobody sees."""
    return is_light(head_dim, dtype) and all(
        family.form != OPEN_PAST.value and family.length % 128 == 0 for family in families
    )


def _fitting(blocks: Blocks, walks_queries: bool, longest: int, dtype: torch.dtype) -> Blocks:
    """Blocks no longer than the longest line, and one stage where it is walked in a single step."""
    block_m, block_n = _power(longest, blocks.block_m), _power(longest, blocks.block_n)
    share = blocks.block_m * blocks.block_n // (block_m * block_n)
    num_warps = blocks.num_warps if dtype == torch.float32 else max(1, blocks.num_warps // share)
    step = block_m if walks_queries else block_n
    if longest <= step:
        return Blocks(block_m, block_n, num_warps, 1, parts=blocks.parts)
    return blocks._replace(block_m=block_m, block_n=block_n, num_warps=num_warps)


def _long_launch(
    families: tuple[LineFamily, ...], by_queries: Blocks, by_keys: Blocks, head_dim: int, dtype: torch.dtype
) -> LineLaunch:
    if _fills_long_blocks(families, head_dim, dtype):
        by_queries = by_queries._replace(block_m=2 * by_queries.block_m, num_warps=2 * by_queries.num_warps)
    by_queries, by_keys = (
        blocks._replace(parts=parts_of(blocks.parts, head_dim)) for blocks in (by_queries, by_keys)
    )
    longest = max(family.length for family in families)
    return LineLaunch(
        families, _fitting(by_keys, True, longest, dtype), _fitting(by_queries, False, longest, dtype)
    )


def line_launches(
    lattice: TorusLattice, seq_len: int, head_dim: int, dtype: torch.dtype, group: int, capability: tuple[int, int]
) -> tuple[LineLaunch, ...]:
    """Families whose lines fit a block of keys, then the longer ones, loops apart from spirals where blocks differ."""
    tiles = _LINES if capability >= (9, 0) else _LINES | _EARLY_LINES
    limit, of_loops, of_spirals = tiles[dtype != torch.float32, max(64, block_d(head_dim))]
    if group > 1:
        limit = 0  # a tile that is a whole line leaves no registers for sums over heads
    families = line_families(lattice, seq_len)
    short = tuple(family for family in families if family.length <= limit)
    launches = []
    if short:
        block = _power(max(family.length for family in short), limit)
        warps = 4 if dtype == torch.float32 else block // 16
        _, _, _, num_stages, parts, _ = of_spirals[1]
        parts = parts_of(parts, head_dim) if block_d(head_dim) <= 64 else 1
        launches.append(LineLaunch(short, Blocks(block, block, warps, num_stages, parts), None))
    long = {}
    for family in families:
        if family.length > limit:
            loops = len(FAMILY_STREAMS[family.family]) == 2
            by_queries, by_keys = of_loops if loops else of_spirals
            past = family.form == OPEN_PAST.value
            if past and is_light(head_dim, dtype) and capability < (9, 0):
                by_keys = by_keys._replace(parts=2)
            if dtype == torch.float32 and not past and capability >= (9, 0):
                by_queries = by_queries._replace(num_stages=1)  # a second block of keys takes the registers
            if group > 1:
                # Sums over heads take the registers of larger tiles.
                by_keys = by_keys._replace(block_m=min(by_keys.block_m, 32))
            long.setdefault((by_queries, by_keys), []).append(family)
    launches += [_long_launch(tuple(members), *blocks, head_dim, dtype) for blocks, members in long.items()]
    return tuple(launches)


def cross_launches(
    flow: Flow, lattice: TorusLattice, head_dim: int, dtype: torch.dtype, group: int, capability: tuple[int, int]
) -> tuple[CrossLaunch, CrossLaunch]:
    """Tiles of queries and tiles of keys: 16 sites long, and steps as long as a tile with its halo, or half."""
    wide, along, causal = block_d(head_dim), 16, lattice.is_causal
    if dtype == torch.float32:
        across, limit = 1 if wide > 128 else 2, 32 if wide <= 64 else 16
    else:
        across, limit = 2 if wide > 128 else 4, 32
    light = is_light(head_dim, dtype)
    queries = CrossLaunch(across, along, _power(flow.walked(along), limit), 4, 2 if wide <= 64 else 1)
    keys = queries
    if light and causal:
        queries = keys = queries._replace(num_stages=1)  # comparisons of time take the registers of a second stage
    if dtype == torch.float32:
        keys = queries._replace(num_warps=8)  # each with half the products to unroll
        queries = keys if wide > 32 else queries._replace(num_stages=1)
        if wide == 64 and (not causal or capability >= (9, 0)):
            keys = keys._replace(num_warps=4)  # fewer instructions, where there are registers for them
        if group > 1 and capability >= (9, 0):
            keys = keys._replace(num_stages=1)
    elif wide > 128:
        queries = keys = queries._replace(num_stages=2, parts=4)  # loads need no registers while they wait
    elif 64 < wide <= 128 and capability >= (9, 0):
        queries = queries._replace(num_stages=2, parts=2)
        keys = keys._replace(block=16, parts=2)  # a step of 32 spills beside two sums of 128 channels
    elif 64 < wide <= 128:
        queries = queries._replace(block=16, parts=2)
    elif wide == 64 and capability < (9, 0):
        queries = keys = queries._replace(parts=2)
        if group > 1 and not causal:
            keys = keys._replace(num_stages=3)  # loads need no registers while they wait
    if light and (capability >= (9, 0) or (group == 1 and lattice.topology == "periodic")):
        keys = keys._replace(pairs=True)  # addresses and barriers of a turn are shared, where there are registers
    return queries, keys


def _constants(blocks: Blocks) -> dict[str, int]:
    return {"BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n, "num_warps": blocks.num_warps,
            "num_stages": blocks.num_stages, "PARTS": blocks.parts}


def _strided(x: Tensor | None) -> Strided:
    return Strided(None, 0, 0, 0) if x is None else Strided(x, *x.stride()[:3])


def _chunk(pairs: int, group: int, contributions: int, seq_len: int, head_dim: int, device: torch.device):
    """``(slots, key/value heads)`` of a chunk's workspaces, which are to stay in the L2 cache.

    Where there is room every line family, and the first of two cross flows, has sums of its own, and all lines run at
    once; otherwise they run one after another and share one slot.
    """
    slot_bytes = 4 * (group + 2) * seq_len * head_dim
    slots = contributions if contributions * slot_bytes <= 0.75 * l2_bytes(device) else min(contributions, 1)
    return slots, min(chunk_heads(pairs, slots * slot_bytes, device), max(1, MAX_GRID_Y // group))


def _line_visits(
    launches: tuple[LineLaunch, ...], apart: bool
) -> Iterator[tuple[LineLaunch, tuple[LineFamily, ...], int, bool]]:
    """``(launch, families of its grid, mask of the families that have slots, accumulate)`` in order, where the families
    have slots ``apart`` from each other or share one."""
    all_families = [family for launch in launches for family in launch.families]
    if apart:
        for launch in launches:
            yield launch, launch.families, family_mask(all_families), False
        return
    for launch in launches:
        for family in launch.families:
            yield launch, (family,), family_mask([family]), family is not all_families[0]


class _Plan(NamedTuple):
    """What calls with the same sizes share: the shapes of workspaces, and grids, numbers and constants of launches."""

    slots: int
    chunk: int  # key/value heads
    programs: int  # that leave decay sums
    tiles: int  # that leave parameter sums
    lines: tuple[tuple[object, bool, int, tuple[int, int], dict[str, object]], ...]
    """Kernel, whether it owns queries, programs of a head, ``(first_program, num_programs)``, constants."""
    crosses: tuple[tuple[object, bool, int, tuple[int | float, ...], dict[str, object]], ...]
    """The same, with the window among the numbers."""


@functools.lru_cache(maxsize=256)
def _plan(
    lattice: TorusLattice, batch: int, kv_heads: int, group: int, seq_len: int, head_dim: int, dtype: torch.dtype,
    device: torch.device, precision: str, gates: int, has_first_key: bool,
) -> _Plan:
    launches = line_launches(lattice, seq_len, head_dim, dtype, group, capability(device))
    flows = cross_flows(lattice, seq_len)
    crosses = [cross_launches(flow, lattice, head_dim, dtype, group, capability(device)) for flow in flows]
    tiles = [flow.tiles(queries.across, queries.along) for flow, (queries, _) in zip(flows, crosses, strict=True)]
    num_families = sum(len(launch.families) for launch in launches)
    line_part = sum(line_programs(launch.families, launch.row_block, 1) for launch in launches)
    programs = line_part + (sum(tiles) if flows[0].stream >= 0 else 0)
    contributions = num_families + len(flows) - 1
    slots, chunk = _chunk(batch * kv_heads, group, contributions, seq_len, head_dim, device)
    apart = slots == contributions
    shared = {
        "TOPOLOGY": lattice.spec[0], "STREAMS": lattice.spec[6], "GATES": gates, "HAS_FIRST_KEY": has_first_key,
        "PRECISION": precision, "D": head_dim, "BLOCK_D": block_d(head_dim),
    }

    line_calls, first_program = [], 0
    for launch, visited, families, accumulate in _line_visits(launches, apart):
        longest = max(family.length for family in visited)
        options = {**shared, "FAMILIES": families, "GRID_FAMILIES": family_mask(visited), "ACCUMULATE": accumulate}
        numbers = (first_program, programs)
        if launch.queries is not None:
            queries = launch.queries
            summed_n = queries.summed * queries.block_n
            line_calls.append((lines_by_queries, True, line_programs(visited, queries.block_m, 1), numbers, {
                "ONE_TILE": longest <= queries.block_n and not lattice.is_causal,
                "SUMMED_N": summed_n,
                "FULL_BLOCKS": all(family.length % summed_n == 0 for family in visited),
                "HALFWAY": all(
                    halfway(family, queries.block_m, block_n) for family in visited
                    for block_n in (queries.block_n, summed_n)
                ),
                **_constants(queries), **options,
            }))
        line_calls.append((lines_by_keys, False, line_programs(visited, launch.keys.block_n, 1), numbers, {
            "WHOLE_LINE": launch.whole_line,
            "FULL_BLOCKS": all(family.length % launch.keys.block_n == 0 for family in visited),
            "GROUPED": group > 1,
            "FULL_ROWS": not lattice.is_causal and all(family.length % launch.keys.block_m == 0 for family in visited),
            "HALFWAY": not launch.whole_line and all(
                halfway(family, launch.keys.block_m, launch.keys.block_n) for family in visited
            ),
            **_constants(launch.keys), **options,
        }))
        first_program += line_programs(visited, launch.row_block, 1)

    cross_calls = []
    for kernel, owns_queries, block in ((cross_by_queries, True, "BLOCK_N"), (cross_by_keys, False, "BLOCK_M")):
        for place, (flow, tile) in enumerate(zip(flows, crosses, strict=True)):
            cross = tile[0] if owns_queries else tile[1]
            tile_u, tile_v = flow.tile(cross.across, cross.along)
            numbers = (line_part + sum(tiles[:place]), programs) if owns_queries else ()
            num_tiles = flow.tiles(cross.across, cross.along)
            rows_a_step = flow.rows_a_step(cross.across, lattice, 2 if cross.pairs else 1, False)
            of_keys = {} if owns_queries else {
                "GROUPED": group > 1, "ONE_BLOCK": flow.walked(cross.along) <= cross.block, "ROWS": rows_a_step,
            }
            cross_calls.append((kernel, owns_queries, num_tiles, (*numbers, *flow.arguments), {
                "FLOW": flow.stream, "BY_ROWS": flow.by_rows, "FINISH": place == len(flows) - 1,
                "SLOT": num_families if apart else 0, "NUM_SLOTS": slots, "ACCUMULATE": not apart and num_families > 0,
                "TILE_U": tile_u, "TILE_V": tile_v, "num_warps": cross.num_warps, "num_stages": cross.num_stages,
                "PARTS": cross.parts, block: cross.block, **of_keys, **shared,
            }))
    return _Plan(slots, chunk, programs, tiles[-1], tuple(line_calls), tuple(cross_calls))


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
    """Writes all gradients; probabilities are recomputed from ``lse`` ``[B, H, T, 8]``."""
    batch, heads, seq_len, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    d_out, q, k, v = rows(d_out), rows(q), rows(k), rows(v)
    if ema_state is not None:
        ema_state, ema_alpha = rows(ema_state), ema_alpha.contiguous()
    stream_weights, decay, lse = stream_weights.contiguous(), decay.contiguous(), lse.contiguous()
    first_key = None if first_key is None else first_key.contiguous()
    token_weights = stream_weights.dim() == 4
    token_alpha = ema_alpha is not None and ema_alpha.dim() == 3
    gates = TOKEN_WEIGHTS.value * token_weights + TOKEN_ALPHA.value * token_alpha
    if ema_state is not None:
        gates += HAS_STATE.value

    plan = _plan(lattice, batch, kv_heads, group, seq_len, head_dim, q.dtype, q.device, input_precision(q.dtype), gates,
                 first_key is not None)
    slots, chunk = plan.slots, plan.chunk

    def workspace(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    operands = Operands(
        _strided(d_out), _strided(q), _strided(k), _strided(v), _strided(ema_state), stream_weights, ema_alpha,
        decay, lse, first_key,
        row_numbers=workspace(chunk * group, seq_len, NUM_STREAMS, ROW_NUMBERS.value),
        decay_sums=workspace(batch * heads, plan.programs, NUM_STREAMS),
        d_q=workspace(slots, chunk * group, seq_len, head_dim), d_k=workspace(slots, chunk, seq_len, head_dim),
        d_v=workspace(slots, chunk, seq_len, head_dim),
    )
    parameter_sums = workspace(batch * heads, plan.tiles, PARAMETER_SUMS.value)
    results = Results(
        _strided(d_q), _strided(d_k), _strided(d_v), _strided(d_state), d_weights if token_weights else None,
        d_alpha if token_alpha else None, parameter_sums,
    )
    cross_sizes = (heads, group, seq_len, lattice.n_major, lattice.n_minor, float(scale))
    sizes = (*cross_sizes[:-1], lattice.winding, float(scale))
    with on_device(q):
        for first in range(0, batch * kv_heads, chunk):
            pairs = min(chunk, batch * kv_heads - first)
            for kernel, owns_queries, programs, numbers, constants in plan.lines:
                members = group if owns_queries else 1
                kernel[programs, pairs * members](operands, *sizes, first * members, *numbers, **constants)
            for kernel, owns_queries, tiles, numbers, constants in plan.crosses:
                members = group if owns_queries else 1
                kernel[tiles, pairs * members](
                    operands, results, *cross_sizes, first * members, *numbers, **constants)
        reduce_parameters[heads,](
            parameter_sums, operands.decay_sums, d_weights, d_decay, d_alpha, batch, heads, plan.tiles, plan.programs,
            PER_HEAD_WEIGHTS=not token_weights, PER_HEAD_ALPHA=ema_alpha is not None and not token_alpha, BLOCK=32,
        )
