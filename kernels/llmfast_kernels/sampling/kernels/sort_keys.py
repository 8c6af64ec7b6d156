"""Integers whose order is that of float32 scores, alone or with their column."""

from __future__ import annotations

import triton
import triton.language as tl

NO_COL = tl.constexpr(2**31 - 1)
LOWEST = tl.constexpr(-2139095041 * 2**32)  # key of -inf; no key with a column is lower


@triton.jit
def key_of(x):
    """Return an int32 in x's order. -0.0 must have been made 0.0; NaN has no key."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """Return the float32 that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_then_col(x, cols):
    """Return an int64 in the order of x, then of the column: the ranking of top-p."""
    return (key_of(x).to(tl.int64) << 32) | cols.to(tl.int64)


@triton.jit
def key_then_col_desc(x, cols):
    """Return an int64 in the order of x; of equal x the lower column is the larger."""
    return (key_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - cols).to(tl.int64)


@triton.jit
def key_part(sort_key):
    """Return the int32 key of either int64."""
    return (sort_key >> 32).to(tl.int32)


@triton.jit
def col_part(sort_key):
    """Return the column of a key_then_col."""
    return (sort_key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def col_part_desc(sort_key):
    """Return the column of a key_then_col_desc."""
    return 0x7FFFFFFF - (sort_key & 0xFFFFFFFF)
