"""The torus lattice and its eight streams: the one Triton statement of who sees whom, and how far away it is.

Line streams are stated as four families of lines: after a change of coordinates every query attends along its own
line, and a displacement is a signed number of steps (positive: the key is behind the query). Cross flows are stated
as a window of displacements ``(a, b)``. The host half says how many lines there are and how long; the device half
says which token sits where and what sees what.

Conventions of the device half: family and topology numbers are those below; ``n_major, n_minor, winding, seq_len``
are integer scalars; positions along a line are int32, and so are tokens counted from the start of a line, so that their
products with strides are single instructions (T is at most `MAX_TOKENS`); all other tokens are int64; steps are float32
tiles, exact below 2**24.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl

from ....lattice import NUM_STREAMS, Stream, Topology, TorusLattice

MAX_TOKENS = 2**29
"""Longest sequence: tokens are computed in 32-bit integers, those of padding within three times the length."""

PERIODIC = tl.constexpr(Topology.periodic.value)
CAUSAL = tl.constexpr(Topology.causal.value)
CYLINDER = tl.constexpr(Topology.cylinder.value)

# Families of lines. The loops have two streams each, their arcs; a spiral has one.
MAJOR = tl.constexpr(0)
MINOR = tl.constexpr(1)
CLOCKWISE = tl.constexpr(2)
COUNTER_CLOCKWISE = tl.constexpr(3)
NUM_FAMILIES = 4
FAMILY_STREAMS = (
    (Stream.major_forward, Stream.major_backward),
    (Stream.minor_forward, Stream.minor_backward),
    (Stream.spiral_cw,),
    (Stream.spiral_ccw,),
)

# How steps along a line are related to visibility.
CLOSED = tl.constexpr(0)  # steps count modulo the loop
OPEN_PAST = tl.constexpr(1)  # causal: keys behind the query only
OPEN_BOTH = tl.constexpr(2)  # the cylinder's major axis: keys on either side

NUM_STREAMS = tl.constexpr(NUM_STREAMS)


class LineFamily(NamedTuple):
    """A family of lines as the host plans it; `line_family` is the same on the device."""

    family: int
    form: int  # CLOSED, OPEN_PAST or OPEN_BOTH
    loop: int  # L, steps once around
    num_lines: int  # causal: residue classes that hold a token
    length: int  # positions on the longest line
    max_step: int  # no visible key is more steps away


@functools.lru_cache(maxsize=256)
def line_families(lattice: TorusLattice, seq_len: int) -> tuple[LineFamily, ...]:
    """The families with a stream that takes part, in the fixed order in which results are summed."""
    families = []
    for family, streams in enumerate(FAMILY_STREAMS):
        if not lattice.streams.intersection(streams):
            continue
        loop, stride = lattice.loop_length(streams[0]), lattice.stride(streams[0])
        if lattice.is_causal:
            length = -(-seq_len // stride)
            reach = min(loop - 1, (lattice.num_sites - 1) // stride, length - 1)
            families.append(LineFamily(family, OPEN_PAST.value, loop, min(stride, seq_len), length, reach))
        else:
            form = CLOSED if lattice.topology == "periodic" or family == MINOR.value else OPEN_BOTH
            num_lines = lattice.n_major if family == MINOR.value else lattice.n_minor
            families.append(LineFamily(family, form.value, loop, num_lines, loop, loop - 1))
    return tuple(families)


def line_programs(families: tuple[LineFamily, ...], block: int, lines: int) -> int:
    """Size of the grid that `line_program` reads: runs of ``lines`` lines times blocks of positions."""
    return sum(-(-family.num_lines // lines) * -(-family.length // block) for family in families)


class CrossWindow(NamedTuple):
    """Displacements of the cross flows: key ``(u - a, v - b)`` of query ``(u, v)``, one ``(a, b)`` for each key.

    A flow sees those with ``|a| <= radius_u`` and ``|b| <= radius_v``. The window covers the flows that take part;
    the causal topology cuts it by lag and by token besides.
    """

    a_lo: int
    a_hi: int
    b_lo: int
    b_hi: int
    num_rows: int  # of the grid of queries
    num_cols: int
    radii: tuple[int, int, int, int]  # (radius_u, radius_v) of cross_u_to_v, then of cross_v_to_u; at most the window
    inverse_squares: tuple[float, float, float, float]  # radius**-2 in the same order, 0 where the radius is 0


@functools.lru_cache(maxsize=256)
def cross_window(lattice: TorusLattice, seq_len: int) -> CrossWindow | None:
    """The window of the cross flows that take part, or None where neither does."""
    flows = (Stream.cross_u_to_v, Stream.cross_v_to_u)
    present = [lattice.radii(flow) for flow in flows if flow in lattice.streams]
    if not present:
        return None
    reach_u, reach_v = (max(reaches) for reaches in zip(*present, strict=True))
    n_major, n_minor = lattice.n_major, lattice.n_minor
    if lattice.topology == "periodic":
        a_lo, a_hi = -min(reach_u, (n_major - 1) // 2), min(reach_u, n_major // 2)
    elif lattice.topology == "cylinder":
        a_lo, a_hi = -min(reach_u, n_major - 1), min(reach_u, n_major - 1)
    else:
        a_lo, a_hi = 0, min(reach_u, n_major, -(-seq_len // n_minor))
    b_lo, b_hi = -min(reach_v, (n_minor - 1) // 2), min(reach_v, n_minor // 2)
    if lattice.is_causal:
        b_lo, b_hi = max(b_lo, -seq_len), min(b_hi, seq_len)  # no key is further away than the sequence is long
        num_rows, num_cols = -(-seq_len // n_minor), min(n_minor, seq_len)
    else:
        num_rows, num_cols = n_major, n_minor
    limits = (max(-a_lo, a_hi), max(-b_lo, b_hi))
    radii = tuple(min(reach, limit) for flow in flows for reach, limit in zip(lattice.radii(flow), limits, strict=True))
    inverse_squares = tuple(float(radius) ** -2 if radius else 0.0 for flow in flows for radius in lattice.radii(flow))
    return CrossWindow(a_lo, a_hi, b_lo, b_hi, num_rows, num_cols, radii, inverse_squares)


@triton.jit
def line_family(family, n_major, n_minor, winding, seq_len, TOPOLOGY: tl.constexpr):
    """A family on the device: ``(loop, stride, slope, num_lines, length, max_step)``, as in `LineFamily`.

    ``stride`` is tokens per step and ``slope`` the lines that a strand crosses per step, in [0, num_lines); in the
    causal topology the stride does both.
    """
    is_minor = family == MINOR
    loop = tl.where(is_minor, n_minor, n_major)
    stride = tl.where(is_minor, 1, n_minor)
    slope = tl.where(family == CLOCKWISE, winding, tl.where(family == COUNTER_CLOCKWISE, n_minor - winding, 0))
    if TOPOLOGY == CAUSAL:
        stride = tl.where(family == COUNTER_CLOCKWISE, slope, stride + slope)
        slope = slope * 0
        num_lines = tl.minimum(stride, seq_len)
        length = tl.cdiv(seq_len, stride)
        # Of at most MAX_TOKENS: 64 bits would be divided by a subroutine.
        window = tl.minimum(n_major.to(tl.int64) * n_minor, seq_len).to(tl.int32)
        max_step = tl.minimum(loop - 1, (window - 1) // stride)
    else:
        num_lines = tl.where(is_minor, n_major, n_minor)
        length = loop
        max_step = loop - 1
    return loop, stride, slope, num_lines, length.to(tl.int32), max_step.to(tl.int32)


@triton.jit
def line_program(
    program, n_major, n_minor, winding, seq_len,
    TOPOLOGY: tl.constexpr, FAMILIES: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
):
    """What a program of a grid of `line_programs` owns: ``(family, first line, block of positions)``.

    Bit f of ``FAMILIES`` is set where family f is in the grid. Lines come in runs of ``LINES``; the last may be short.
    """
    family = -1
    rest = program
    for candidate in tl.static_range(4):
        if (FAMILIES >> candidate) & 1:
            _, _, _, num_lines, length, _ = line_family(candidate, n_major, n_minor, winding, seq_len, TOPOLOGY)
            programs = (tl.cdiv(num_lines, LINES) * tl.cdiv(length, BLOCK)).to(tl.int32)
            family = tl.where((family < 0) & (rest < programs), candidate, family)
            rest = tl.where(family < 0, rest - programs, rest)
    _, _, _, num_lines, _, _ = line_family(family, n_major, n_minor, winding, seq_len, TOPOLOGY)
    runs = tl.cdiv(num_lines, LINES)
    return family, rest % runs * LINES, (rest // runs).to(tl.int32)


@triton.jit
def line_start(family, line, n_minor, STRAIGHT: tl.constexpr, TOPOLOGY: tl.constexpr):
    """Token (int64) that the tokens of `tokens_along` count from.

    Lines are ``STRAIGHT`` where the tokens of a family's lines differ by a constant: all but the spirals of the grids.
    """
    if not STRAIGHT:
        start = line * 0
    elif TOPOLOGY == CAUSAL:
        start = line
    else:
        start = tl.where(family == MINOR, line * n_minor, line)
    return start.to(tl.int64)


@triton.jit
def tokens_along(line, position, stride, slope, num_lines, STRAIGHT: tl.constexpr):
    """Tokens (int32, counted from `line_start`) at positions of a line; past its end, of no meaning."""
    token = position * stride
    if not STRAIGHT:
        # Without a sign: a division of signed numbers takes more.
        crossed = ((position * slope).to(tl.uint32) % num_lines.to(tl.uint32)).to(tl.int32) + line
        token += tl.where(crossed >= num_lines, crossed - num_lines, crossed)
    return token.to(tl.int32)


@triton.jit
def line_length(line, length, stride, seq_len, TOPOLOGY: tl.constexpr):
    """Positions on a line, of a family whose longest line has ``length``: where time is open some lack the last."""
    if TOPOLOGY == CAUSAL:
        return tl.cdiv(seq_len - line, stride).to(tl.int32)
    else:
        return length


@triton.jit
def before_end(position, length, EVEN: tl.constexpr):
    """Whether a position >= 0 is on a line of that length; where ``EVEN``, every block is full and there is no
    question."""
    if EVEN:
        return tl.full(position.shape, True, tl.int1)
    else:
        return position < length


@triton.jit
def on_line(position, token, length, seq_len, TOPOLOGY: tl.constexpr, EVEN: tl.constexpr):
    """`before_end` of a line of a family whose longest line has ``length``, by the token at the position."""
    valid = before_end(position, length, EVEN)
    if TOPOLOGY == CAUSAL and not EVEN:
        valid = valid & (token < seq_len)
    return valid


@triton.jit
def line_steps(query_position, key_position, QUERIES_FIRST: tl.constexpr):
    """Signed steps from keys to queries, float32, positive where the key is behind the query: ``[BLOCK_M, BLOCK_N]``,
    or ``[BLOCK_N, BLOCK_M]``."""
    query, key = query_position.to(tl.float32), key_position.to(tl.float32)
    if QUERIES_FIRST:
        return query[:, None] - key[None, :]
    else:
        return query[None, :] - key[:, None]


def halfway(family: LineFamily, block_m: int, block_n: int) -> bool:
    """Whether `from_half` has a turn for all blocks of queries and of keys of a line, of those that are closed."""
    half, unit = family.loop // 2, math.gcd(block_m, block_n)
    furthest = -(-(block_n - half) // unit) * unit - unit  # ahead of the keys are queries a turn behind them
    return family.form != CLOSED.value or furthest + block_m - 1 <= half


@triton.jit
def from_half(query_begin, key_begin, loop, BLOCK_N: tl.constexpr, HALFWAY: tl.constexpr):
    """What to add to the steps between two blocks of a closed line where `halfway`: less half a loop, and a turn more
    where queries come before keys, they are between -L and L, and cheaper to take around the loop. Otherwise 0."""
    if HALFWAY:
        return tl.where(query_begin - key_begin < BLOCK_N - loop // 2, loop, 0).to(tl.float32) - loop * 0.5
    else:
        return 0


@triton.jit
def _around_loop(steps, loop, SCALE: tl.constexpr):
    """``(side, distance)`` of keys on a closed line: which arc sees a key, and the steps to it the shorter way round.

    Half a loop away the sign of steps changes sides: ``step * (|step| - L/2)`` is negative on the forward arc, positive
    on the backward arc, and zero on both ends, which belong to both. SCALE, a power of two, multiplies it.
    """
    half = loop.to(tl.float32) * 0.5
    beyond = tl.abs(steps) * SCALE - half * SCALE
    return steps * beyond, half - tl.abs(beyond) * (1.0 / SCALE)


@triton.jit
def _within(steps, low, high):
    """Whether ``low <= steps <= high``, by one comparison: those less their mean are at most half as many."""
    return tl.abs(steps - (high + low) * 0.5) <= (high - low) * 0.5


@triton.jit
def up_to(steps, count):
    """Whether ``0 <= steps < count``, by one comparison: without a sign floats are in the order of their bits, those
    below zero last. ``steps`` are differences that are not -0."""
    return steps.to(tl.uint32, bitcast=True) < (count + tl.zeros_like(steps)).to(tl.uint32, bitcast=True)


@triton.jit
def arcs(steps, loop, max_step, FORM: tl.constexpr):
    """What the two arcs of a loop see, and the squared distance in steps: ``(forward, backward, squared)``.

    ``max_step`` broadcasts against ``steps`` and limits OPEN_PAST. Where the line is CLOSED, ``|steps| < loop`` is
    the caller's to ensure. Multiply ``squared`` by `squared_step` for rho^2.
    """
    if FORM == CLOSED:
        side, distance = _around_loop(steps, loop, 1.0)
        forward = side <= 0
        backward = side >= 0
    elif FORM == OPEN_PAST:
        forward = _within(steps, 0, tl.minimum(loop // 2, max_step))
        backward = _within(steps, loop - loop // 2, max_step) | (steps == 0)
        distance = steps
    else:
        forward = steps >= 0
        backward = steps <= 0
        distance = steps
    return forward, backward, distance * distance


@triton.jit
def _ceiling(steps, low, high):
    """`_within` as a ceiling: at least 1024 where it holds, at most -1024 elsewhere, for whole steps below 2**23."""
    return (high - low) * 2048.0 + 1024.0 - tl.abs(steps - (high + low) * 0.5) * 4096.0


@triton.jit
def arc_ceilings(steps, loop, max_step, FORM: tl.constexpr):
    """`arcs` without comparisons: ``(forward, backward, squared)``, where an exponent (base 2) that is cut to
    ``forward`` stays as it is, or infinite, where the arc sees the key, and gives zero elsewhere. Not for OPEN_BOTH."""
    if FORM == CLOSED:
        side, distance = _around_loop(steps, loop, 4096.0)  # at least 2048 from zero, or zero at the ends of the arcs
        forward = 1024.0 - side
        backward = 1024.0 + side
    else:
        distance = steps
        forward = _ceiling(steps, 0, tl.minimum(loop // 2, max_step))
        backward = tl.maximum(_ceiling(steps, loop - loop // 2, max_step), _ceiling(steps, 0, 0))
    return forward, backward, distance * distance


@triton.jit
def strand(steps, loop, max_step, FORM: tl.constexpr, HALFWAY: tl.constexpr = False):
    """What a spiral sees along its strand, and the squared distance in steps: ``(visible, squared)``; see `arcs`. Where
    the line is closed steps may be moved by `from_half`, HALFWAY."""
    if FORM == CLOSED:
        if HALFWAY:
            distance = loop * 0.5 - tl.abs(steps)  # below zero beyond a turn
        else:
            _, distance = _around_loop(steps, loop, 1.0)
        visible = tl.full(steps.shape, True, tl.int1)
    elif FORM == OPEN_PAST:
        distance = steps
        visible = _within(steps, 0, max_step)
    else:
        distance = steps
        visible = tl.abs(steps) < loop.to(tl.float32)
    return visible, distance * distance


@triton.jit
def folded_steps(offset, column, half):
    """The two arcs of a closed loop of even length L = 2H, folded: ``(steps, partner_steps)``, ``[M, N]`` from queries
    ``[M]`` to columns ``[N]``.

    Step k of the forward arc and step H - k of the backward arc are congruent modulo H. So of the keys at positions
    ``block + column`` and ``block + column - H`` the query at ``block + offset`` sees one on either arc, ``steps`` and
    ``partner_steps`` away, both from 1 to H. The first, the nearer one, is the forward key where ``offset > column``
    and the backward key where ``offset < column``. Where they are equal it is the query's own key, which both arcs see
    and which is the caller's to add, and the other lies half a loop away on both.

    Offsets lie in [0, H); a column beyond H has no meaning.
    """
    ahead = line_steps(offset, column, True)
    near = tl.abs(ahead)
    far = half - near
    return tl.where(ahead > 0, near, far), tl.where(ahead < 0, near, far)


@triton.jit
def squared_step(loop, FORM: tl.constexpr):
    """rho^2 of one step: (2 pi / L)^2 around a closed loop, (pi / L)^2 along an open one."""
    turn: tl.constexpr = 6.283185307179586 if FORM == CLOSED else 3.141592653589793
    angle = (1.0 / loop.to(tl.float32)) * turn
    return angle * angle


@triton.jit
def oldest_key(first_key_ptr, batch, token, valid, seq_len):
    """``min(first_key, t)`` (int64, at least 0) of tokens ``[BLOCK_M]``: the oldest that packed documents let them
    see."""
    first = tl.load(first_key_ptr + batch * seq_len + token, mask=valid, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(first, 0), token)


@triton.jit
def reach_of(oldest, line, stride, query_position, max_step):
    """Largest step ``[BLOCK_M]`` (int32) from a query of a causal line to a key that is not older than ``oldest``."""
    oldest_position = (tl.maximum(oldest - line, 0) + stride - 1) // stride
    return tl.minimum(max_step, query_position - oldest_position.to(tl.int32))
