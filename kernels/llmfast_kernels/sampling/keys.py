"""Whole numbers in the order of scores: keys, ranks and weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import FIXED_POINT

_FIXED_POINT = tl.constexpr(FIXED_POINT)
NO_COL = tl.constexpr(2**31 - 1)
NO_RANK = tl.constexpr(-2139095041 * 2**32)  # of -inf and a column past all others


@triton.jit
def key_of(x):
    """An int32 in x's order. -0.0 must have been made 0.0; NaN has no place."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rank_of(x, cols):
    """An int64 in the order of (x, then the lower column first)."""
    return (key_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - cols).to(tl.int64)


@triton.jit
def ranked_value(rank):
    return value_of((rank >> 32).to(tl.int32))


@triton.jit
def ranked_col(rank):
    return 0x7FFFFFFF - (rank & 0xFFFFFFFF)


@triton.jit
def ratio_and_weight(z, z_max):
    """How likely a score is beside the largest, and the same in whole steps."""
    ratio = tl.exp(z - z_max)
    return ratio, weight_of(ratio)


@triton.jit
def weight_of(ratio):
    return (ratio * _FIXED_POINT).to(tl.int64)


@triton.jit
def place_of(x, cols):
    """An int64 in the order of (x, then the higher column first), as top-p ranks."""
    return (key_of(x).to(tl.int64) << 32) | cols.to(tl.int64)


@triton.jit
def placed_key(place):
    return (place >> 32).to(tl.int32)


@triton.jit
def placed_col(place):
    return (place & 0x7FFFFFFF).to(tl.int32)
