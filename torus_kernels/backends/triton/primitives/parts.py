"""Rows cut into parts: tuples of PARTS tensors of neighbouring channels, BLOCK_D // PARTS of them.

Triton deals the rows of a product to warps where it has at least as many as columns, and its columns otherwise. Scores
come by rows; a gradient of few wide rows wants them by columns, so that every warp needs all of the score gradients,
which pass through shared memory and are held whole. A gradient in parts that are no wider than it has rows takes them
from the registers in which they were made.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot_cast, dot_transposed, dot_twice, load_rows, store_rows


@triton.jit
def zero_parts(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """Rows ``[BLOCK, BLOCK_D]`` of zeros."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts += (tl.zeros([BLOCK, BLOCK_D // PARTS], tl.float32),)
    return parts


@triton.jit
def load_parts(base, token, valid, stride_token, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """`load_rows` in parts."""
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    parts = ()
    for part in tl.static_range(PARTS):
        rows = load_rows(base + part * WIDTH, token, valid, stride_token, D - part * WIDTH, WIDTH)
        parts += (rows,)
    return parts


@triton.jit
def store_parts(base, token, valid, stride_token, parts, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """`store_rows` of rows in parts."""
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    for part in tl.static_range(PARTS):
        store_rows(base + part * WIDTH, token, valid, stride_token, parts[part], D - part * WIDTH, WIDTH)


@triton.jit
def accumulate_parts(
    base, token, valid, parts, ACCUMULATE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr
):
    """Writes rows in parts to a workspace of contiguous rows, on top of what is there where ACCUMULATE, one part after
    the other."""
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    for part in tl.static_range(PARTS):
        rows = parts[part]
        if ACCUMULATE:
            rows += load_rows(base + part * WIDTH, token, valid, D, D - part * WIDTH, WIDTH)
        store_rows(base + part * WIDTH, token, valid, D, rows, D - part * WIDTH, WIDTH)


@triton.jit
def scaled_parts(parts, factor, PARTS: tl.constexpr):
    """Rows in parts times a factor that broadcasts against each, in float32."""
    scaled = ()
    for part in tl.static_range(PARTS):
        scaled += (factor * parts[part].to(tl.float32),)
    return scaled


@triton.jit
def sum_of_parts(a, b, PARTS: tl.constexpr):
    """The sum of two rows in parts."""
    added = ()
    for part in tl.static_range(PARTS):
        added += (a[part] + b[part],)
    return added


@triton.jit
def add_slots(
    parts, base, slot_size, token, valid, NUM_SLOTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Rows in parts and those of the first slots of a workspace of contiguous rows, added in the order of slots;
    ``base`` points at token 0 in the first slot."""
    WIDTH: tl.constexpr = BLOCK_D // PARTS
    added = ()
    for part in tl.static_range(PARTS):
        rows = parts[part]
        if BLOCK_D > 64:
            # One slot after the other: all at once they take the registers of a row each.
            for slot in tl.range(NUM_SLOTS, num_stages=1):
                rows += load_rows(
                    base + slot * slot_size + part * WIDTH, token, valid, D, D - part * WIDTH, WIDTH
                )
        else:
            for slot in tl.static_range(NUM_SLOTS):
                rows += load_rows(
                    base + slot * slot_size + part * WIDTH, token, valid, D, D - part * WIDTH, WIDTH
                )
        added += (rows,)
    return added


@triton.jit
def towards(a, b, rate, PARTS: tl.constexpr):
    """``a + rate * (b - a)`` of rows in parts, in float32; ``rate`` broadcasts against a part."""
    moved = ()
    for part in tl.static_range(PARTS):
        start = a[part].to(tl.float32)
        moved += (start + rate * (b[part] - start),)
    return moved


@triton.jit
def dot_parts(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """`dot_transposed` of rows in parts."""
    products = dot_transposed(a[0], b[0], PRECISION)
    for part in tl.static_range(1, PARTS):
        products = tl.dot(a[part], tl.trans(b[part]), acc=products, input_precision=PRECISION)
    return products


@triton.jit
def cast_to_parts(tile, rows, sums, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """`dot_cast` of a tile with rows in parts, on top of sums in parts."""
    added = ()
    for part in tl.static_range(PARTS):
        added += (dot_cast(tile, rows[part], PRECISION, sums[part]),)
    return added


@triton.jit
def twice_to_parts(
    tile, rows, sums, PARTS: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr = False
):
    """`dot_twice` of a tile with rows in parts, on top of sums in parts."""
    added = ()
    for part in tl.static_range(PARTS):
        added += (dot_twice(tile, rows[part], PRECISION, sums[part], ROUNDED),)
    return added
