"""From words of codes to numbers that the multipliers take, in Triton, for every format.

No code is converted: with a constant exponent set above it, it is the mantissa of a floating point
number. A four-bit code below the exponent of 128 (bfloat16) or 1024 (float16) is exactly 128 + code
or 1024 + code. An eight-bit code below the exponent of 2**23 is the float32 2**23 + code, since
bfloat16 has no place for 128 and a byte. Minus that offset and the zero point, what is left is an
integer of at most 255, which both 16-bit types hold exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..formats import CHUNK, INT4, INT8, INT8_UNIT

CHUNK_COLUMNS = tl.constexpr(CHUNK)
PAIR_COLUMNS = tl.constexpr(CHUNK // 4)  # columns whose codes one shift extracts
CHUNK_WORDS = tl.constexpr(CHUNK // 8)
INT4_MIDDLE = tl.constexpr(INT4.middle)
UNIT_COLUMNS = tl.constexpr(INT8_UNIT)
INT8_MIDDLE = tl.constexpr(INT8.middle)
_INT8_OFFSET = tl.constexpr(1 << 23)

# ------------------------------------------------------------------------------------- four bits


@triton.jit
def offset_codes(words, p: tl.constexpr, dtype: tl.constexpr):
    """Return pair p of each word's codes plus an offset: 128 in bfloat16, 1024 in float16.

    ``words`` of ``[N, CHUNK_WORDS]`` give the numbers of ``[N, PAIR_COLUMNS]``.
    """
    # constants, not arguments: with those Triton moves the weights through shared memory
    if dtype == tl.bfloat16:
        exponent = 0x43004300
    else:
        exponent = 0x64006400
    both = ((words >> (4 * p)) & 0x000F000F) | exponent
    low = both.to(tl.int16).to(dtype, bitcast=True)
    high = (both >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(low, high), [words.shape[0], PAIR_COLUMNS])


@triton.jit
def halves(words, dtype: tl.constexpr):
    """Return the low and the high 16-bit number of each word, as float32."""
    if dtype == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


# ------------------------------------------------------------------------------------- eight bits


@triton.jit
def int8_column(place):
    """Return the column whose code is at a place of a packed row."""
    within = place % UNIT_COLUMNS
    column = place - within + within // 4 * 2 + within % 4 // 2 * 8 + within % 2
    return tl.max_contiguous(tl.multiple_of(column, 2), 2)


@triton.jit
def in_packed_order(x):
    """Reorder inputs ``[K]`` to the order in which their codes are packed."""
    K: tl.constexpr = x.shape[0]
    x = tl.reshape(x, [K // UNIT_COLUMNS, 2, 4, 2])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), [K])


@triton.jit
def offset_codes8(codes):
    """Return 2**23 + code, as float32."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def offset_zeros8(zeros_ptr, minima_ptr, at):
    """Return 2**23 + the zero points of the groups ``at``, as float32; with minima they are 0."""
    if zeros_ptr is not None:
        zero = offset_codes8(tl.load(zeros_ptr + at))
    elif minima_ptr is not None:
        zero = tl.full(at.shape, _INT8_OFFSET, tl.float32)
    else:
        zero = tl.full(at.shape, _INT8_OFFSET + INT8_MIDDLE, tl.float32)
    return zero
