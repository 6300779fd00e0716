"""Rotary positions: one pass over the tokens, its angles shared by all batch elements and heads of a program."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...lattice import TorusLattice
from .launching import on_device, rows

_PAIRS_PER_PROGRAM = 512
_ROWS_PER_PROGRAM = 8
_ENOUGH_PROGRAMS = 1024
_WARPS = 4

# Minimax polynomials of sine and cosine on [-pi/4, pi/4], good to a unit in the last place of float32:
# S. L. Moshier, Cephes mathematical library, sinf.c. Triton's own reduce arguments of any size, through local memory.
_SIN_3 = tl.constexpr(-1.6666654611e-1)
_SIN_5 = tl.constexpr(8.3321608736e-3)
_SIN_7 = tl.constexpr(-1.9515295891e-4)
_COS_4 = tl.constexpr(4.166664568298827e-2)
_COS_6 = tl.constexpr(-1.388731625493765e-3)
_COS_8 = tl.constexpr(2.443315711809948e-5)
_QUARTER_TURN = tl.constexpr(math.pi / 2)


@triton.jit
def _cos_sin(steps, period):
    """Cosine and sine of ``2 pi steps / period`` for integers ``0 <= steps < period``: the nearest quarter turn is
    taken off in integers, so that what is left is as exact as float32 can be."""
    quarter = (4 * steps + period // 2) // period
    rest = (4 * steps - quarter * period).to(tl.float32)
    angle = tl.div_rn(rest, tl.zeros_like(rest) + period.to(tl.float32)) * _QUARTER_TURN
    square = angle * angle
    sine = angle + angle * square * (_SIN_3 + square * (_SIN_5 + square * _SIN_7))
    cosine = 1.0 - 0.5 * square + square * square * (_COS_4 + square * (_COS_6 + square * _COS_8))
    odd = (quarter & 1) != 0
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@triton.jit
def _turn(position, period, harmonics, pair, INVERSE: tl.constexpr):
    """Cosines and sines ``[BLOCK_T, PAIRS]`` of the tokens' positions on one loop."""
    harmonic = 1 + pair % harmonics  # [PAIRS]
    steps = (position % period)[:, None] * harmonic[None, :] % period
    cos, sin = _cos_sin(steps, period)
    return cos, -sin if INVERSE else sin


@triton.jit
def _rotate(source, target, cos, sin, visible, QUARTER: tl.constexpr):
    """Turns the pairs that begin at ``source``; all arguments are ``[BLOCK_T, PAIRS]``."""
    x1 = tl.load(source, mask=visible, other=0.0).to(tl.float32)
    x2 = tl.load(source + QUARTER, mask=visible, other=0.0).to(tl.float32)
    tl.store(target, (x1 * cos - x2 * sin).to(target.dtype.element_ty), mask=visible)
    tl.store(target + QUARTER, (x1 * sin + x2 * cos).to(target.dtype.element_ty), mask=visible)


@triton.jit(do_not_specialize=["rows", "seq_len", "shift_major", "shift_minor", "rows_per_program"])
def rope_kernel(
    x, x_strides, out, out_strides, heads, rows, seq_len, shift_major, shift_minor, n_minor, period_major,
    period_minor, harmonics_major, harmonics_minor, rows_per_program,
    CAUSAL: tl.constexpr, INVERSE: tl.constexpr, WIDE: tl.constexpr, QUARTER: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: BLOCK_T tokens of several rows (batch, head)."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    blocks = tl.cdiv(seq_len, BLOCK_T)
    block = tl.program_id(0) % blocks
    first_row = tl.program_id(0) // blocks * rows_per_program
    token = block.to(INDEX) * BLOCK_T + tl.arange(0, BLOCK_T)
    pair = tl.arange(0, PAIRS).to(INDEX)
    if CAUSAL:
        major, minor = token + shift_major.to(INDEX), token + shift_minor.to(INDEX)
    else:
        major, minor = token // n_minor.to(INDEX), token % n_minor.to(INDEX)
    cos_u, sin_u = _turn(major, period_major.to(INDEX), harmonics_major.to(INDEX), pair, INVERSE)
    cos_v, sin_v = _turn(minor, period_minor.to(INDEX), harmonics_minor.to(INDEX), pair, INVERSE)
    visible = (token < seq_len)[:, None] & (pair < QUARTER)[None, :]
    token = token.to(tl.int64)[:, None]
    for row in range(first_row, tl.minimum(first_row + rows_per_program, rows)):
        batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
        source = x + batch * x_strides[0] + head * x_strides[1] + token * x_strides[2] + pair[None, :]
        target = out + batch * out_strides[0] + head * out_strides[1] + token * out_strides[2] + pair[None, :]
        _rotate(source, target, cos_u, sin_u, visible, QUARTER)
        _rotate(source + 2 * QUARTER, target + 2 * QUARTER, cos_v, sin_v, visible, QUARTER)


def rope(x: Tensor, lattice: TorusLattice, offset: int, inverse: bool, out: Tensor) -> None:
    """Writes ``x`` turned by its lattice positions, or back where ``inverse``."""
    x = rows(x)
    batch, heads, seq_len, head_dim = x.shape
    major, minor, sites = lattice.n_major, lattice.n_minor, lattice.num_sites
    # A cylinder's open axis turns by pi from end to end: half of a loop of twice its length.
    period_major = {"causal": sites, "periodic": major, "cylinder": 2 * major}[lattice.topology]
    harmonics_major, harmonics_minor = max(1, major // 2), max(1, minor // 2)
    largest = min(head_dim // 4, max(harmonics_major, harmonics_minor)) * max(period_major, minor)
    quarter = head_dim // 4
    pairs = triton.next_power_of_2(quarter)
    block = max(1, _PAIRS_PER_PROGRAM // pairs)
    num_rows = batch * heads
    blocks = triton.cdiv(seq_len, block)
    rows_per_program = max(1, min(_ROWS_PER_PROGRAM, num_rows * blocks // _ENOUGH_PROGRAMS))
    with on_device(x):
        rope_kernel[(blocks * triton.cdiv(num_rows, rows_per_program),)](
            x, x.stride()[:3], out, out.stride()[:3], heads, num_rows, seq_len, offset % sites, offset % minor, minor,
            period_major, minor, harmonics_major, harmonics_minor, rows_per_program,
            CAUSAL=lattice.is_causal, INVERSE=inverse,
            # Four times a step and more than a period beyond the last token still fit.
            WIDE=max(4 * largest, seq_len + block, 6 * period_major) + sites >= torch.iinfo(torch.int32).max,
            QUARTER=quarter, PAIRS=pairs, BLOCK_T=block, num_warps=_WARPS, enable_fp_fusion=True,
        )
