"""Tiles and rows of sites for the cross flows.

A tile is TILE_U rows of TILE_V columns of the lattice. Sites around it have local rows and columns, counted from its
first site. In the causal topology a row of the lattice goes on in the next one, and local columns do so too. The token
of a site is the sum of what its row and its column give, so that a loop over one of them computes the other once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lattice import CAUSAL, CYLINDER, MAX_TOKENS, PERIODIC

_FURTHEST = tl.constexpr(5 << 28)  # see `near_token`
_MEMORY = tl.constexpr(MAX_TOKENS)  # no sequence is longer


@triton.jit
def tile_sites(tile, n_minor, seq_len, num_rows, num_cols, TILE_U: tl.constexpr, TILE_V: tl.constexpr):
    """Sites of a tile: ``(first_row, first_col, row, col, token, valid)``, the last four ``[TILE_U * TILE_V]``.

    ``row`` and ``col`` are local, tokens are int64; tiles are numbered row by row.
    """
    tiles_across = tl.cdiv(num_cols, TILE_V)
    first_row = tile // tiles_across * TILE_U
    first_col = tile % tiles_across * TILE_V
    site = tl.arange(0, TILE_U * TILE_V)
    row, col = site // TILE_V, site % TILE_V
    token = (first_row + row).to(tl.int64) * n_minor + (first_col + col)
    valid = (first_row + row < num_rows) & (first_col + col < num_cols) & (token < seq_len)
    return first_row, first_col, row, col, token, valid


@triton.jit
def _around(index, size):
    """Indices, at most ``size`` below 0, around a closed axis."""
    return (index % size + size) % size


@triton.jit
def across_along(of_rows, of_cols, BY_ROWS: tl.constexpr):
    """What belongs to the axis that is walked, then what belongs to the other one."""
    if BY_ROWS:
        return of_rows, of_cols
    else:
        return of_cols, of_rows


@triton.jit
def walk(
    first_row, num_rows, u_lo, u_hi, v_lo, v_hi,
    TOPOLOGY: tl.constexpr, BY_ROWS: tl.constexpr, TILE_U: tl.constexpr, TILE_V: tl.constexpr,
):
    """The sites from ``(u_lo, v_lo)`` to ``(u_hi, v_hi)`` around those of a tile: ``(begin, end)`` of the steps across
    and of the places along them, local rows and columns."""
    lowest, highest = u_lo, TILE_U - 1 + u_hi
    if TOPOLOGY == CYLINDER:
        lowest, highest = tl.maximum(lowest, -first_row), tl.minimum(highest, num_rows - 1 - first_row)
    elif TOPOLOGY == CAUSAL:
        # Columns beyond either end of a row lie in the next row, so that sites may be counted to a row that is not.
        lowest, highest = tl.maximum(lowest, -1 - first_row), tl.minimum(highest, num_rows - first_row)
    if BY_ROWS:
        return lowest, highest + 1, v_lo, TILE_V + v_hi
    else:
        return v_lo, TILE_V + v_hi, lowest, highest + 1


@triton.jit
def tokens_on_axis(place, first_row, first_col, n_major, n_minor, TOPOLOGY: tl.constexpr, ROWS: tl.constexpr):
    """What local rows or columns add to the tokens of their sites, int64; of no meaning off a cylinder's ends."""
    if ROWS:
        place = first_row + place
        if TOPOLOGY == PERIODIC:
            place = _around(place, n_major)
        return place.to(tl.int64) * n_minor
    else:
        place = first_col + place
        if TOPOLOGY != CAUSAL:
            place = _around(place, n_minor)
        return place.to(tl.int64)


@triton.jit
def near_token(token):
    """Part of a token by `tokens_on_axis` in 32 bits. Those of tokens that exist lie within; further away, where the
    sum of both parts is no token, they are cut, so that differences with tokens do not overflow."""
    return tl.minimum(tl.maximum(token, -_FURTHEST), _FURTHEST).to(tl.int32)


@triton.jit
def sites_exist(
    across_token, along_token, seq_len, TOPOLOGY: tl.constexpr, BY_ROWS: tl.constexpr, NARROW: tl.constexpr
):
    """Which sites of a step, given by what either axis adds to their tokens, have one: only time and the ends of a
    cylinder, along a column, leave any out. NARROW, in 32 bits: fewer instructions, and more registers at once."""
    if not (TOPOLOGY == CAUSAL or (TOPOLOGY == CYLINDER and not BY_ROWS)):
        return tl.full(along_token.shape, True, tl.int1)
    elif NARROW:
        # One comparison for two: what lies below the first token is very large without a sign.
        return (near_token(across_token) + near_token(along_token)).to(tl.uint32) < seq_len.to(tl.uint32)
    else:
        token = across_token + along_token
        return (token >= 0) & (token < seq_len)


@triton.jit
def bias_along(displacement, low, high, slope):
    """A flow's bias along one axis in base 2, -inf outside its window; its ``slope`` includes the radius."""
    wide = displacement.to(tl.float32)
    return tl.where((displacement >= low) & (displacement <= high), -slope * (wide * wide), float("-inf"))


@triton.jit
def memory(n_major, n_minor):
    """Tokens (int32) that the causal topology lets a token look back."""
    return tl.minimum(n_major.to(tl.int64) * n_minor - 1, _MEMORY).to(tl.int32)


@triton.jit
def memory_of(token, n_major, n_minor):
    """The oldest token (int32) that the causal topology lets tokens see."""
    return tl.maximum(token.to(tl.int32) - memory(n_major, n_minor), 0)


@triton.jit
def between(token, first, last):
    """Whether tokens ``[N]`` are within the bounds of rows ``[M]``, which are less than 2**30 apart: ``[M, N]``."""
    # One comparison for two: what lies below the first is very large without a sign.
    width = tl.where(last >= first, last - first + 1, 0).to(tl.uint32)
    return (token[None, :] - first[:, None]).to(tl.uint32) < width[:, None]
