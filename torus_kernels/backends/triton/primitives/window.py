"""Tiles and rows of sites for the cross flows.

A tile is TILE_U rows of TILE_V columns of the lattice. Sites around it have local rows and columns, counted from its
first site. In the causal topology a row of the lattice goes on in the next one, and local columns do so too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lattice import CAUSAL, PERIODIC


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
def row_tokens(row, col, first_row, first_col, n_major, n_minor, seq_len, TOPOLOGY: tl.constexpr):
    """``(token, valid)`` of the sites at local columns ``col`` of one local row, tokens int64.

    On a cylinder the row must be one of the lattice's.
    """
    if TOPOLOGY == CAUSAL:
        token = (first_row + row).to(tl.int64) * n_minor + (first_col + col)
        valid = (token >= 0) & (token < seq_len)
    else:
        lattice_row = first_row + row
        lattice_col = ((first_col + col) % n_minor + n_minor) % n_minor
        if TOPOLOGY == PERIODIC:
            lattice_row = (lattice_row % n_major + n_major) % n_major
        token = lattice_row.to(tl.int64) * n_minor + lattice_col
        valid = lattice_col >= 0
    return token, valid


@triton.jit
def seen_along(displacement, low, high, radius):
    """Whether a flow's window reaches a displacement along one axis."""
    return (displacement >= low) & (displacement <= high) & (tl.abs(displacement) <= radius)


@triton.jit
def bias_along(displacement, seen, slope):
    """A flow's bias along one axis in base 2, -inf where not ``seen``; its ``slope`` includes the radius."""
    wide = displacement.to(tl.float32)
    return tl.where(seen, -slope * (wide * wide), float("-inf"))
