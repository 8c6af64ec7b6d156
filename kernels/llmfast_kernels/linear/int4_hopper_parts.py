"""What the kernels for four-bit weights on Hopper have in common.

They are Gluon, Triton's language below the tiles: warps of a program that do different work cannot
be said in Triton.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ..activation.kernel import activate as _activate
from .int4_layout import CHUNK

ROWS = 64  # of the weight, that a warpgroup multiplies

TILE_ROWS = gl.constexpr(ROWS)
CHUNK_COLUMNS = gl.constexpr(CHUNK)
CHUNK_WORDS = gl.constexpr(CHUNK // 8)
HALF_CHUNK = gl.constexpr(CHUNK // 2)  # columns that lie 128 bytes wide in shared memory

# of tokens, and of words, in shared memory
X_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
WORDS_LAYOUT = gl.NVMMASharedLayout(64, 32, 2)


@gluon.constexpr_function
def lanes_of(rows):
    """How the words of a chunk lie in lanes, so that each has those whose weights it multiplies."""
    tiles = [[64 << i, 0] for i in range((rows // 64).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[8, 0], [0, 4], [0, 8], *tiles],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [rows, CHUNK // 8],
    )


# names before Triton 3.7
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
put = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
activate = gluon.jit(_activate.fn)


@gluon.jit
def twice(bits):
    """16 bits in both halves of a word."""
    return (bits.to(gl.int32) & 0xFFFF) * 0x10001


@gluon.jit
def zeros_of(zeros_ptr, at, MIDDLE: gl.constexpr, dtype: gl.constexpr):
    """What codes are put above and less by: 128 or 1024 and the zero point, twice in a word.

    Without zero points MIDDLE stands for 0.
    """
    OFFSET: gl.constexpr = 0x4300 if dtype == gl.bfloat16 else 0x6400  # their last bit is 1
    if zeros_ptr is not None:
        return twice(gl.load(zeros_ptr + at).to(gl.int32) + OFFSET)
    else:
        return gl.full(at.shape, (OFFSET + MIDDLE) * 0x10001, gl.int32, at.type.layout)


@gluon.jit
def less_zeros(words, p: gl.constexpr, zeros, dtype: gl.constexpr):
    """Codes of CHUNK / 4 columns less their zero points, exactly: two numbers in a word."""
    codes = words >> (4 * p)
    zeros, _ = gl.broadcast(zeros, codes)
    # one instruction for mask and exponent, which the compiler does not find
    BF16: gl.constexpr = (
        "{ .reg .b32 t; lop3.b32 t, $1, 0x000F000F, 0x43004300, 0xEA; sub.rn.bf16x2 $0, t, $2; }"
    )
    FP16: gl.constexpr = (
        "{ .reg .b32 t; lop3.b32 t, $1, 0x000F000F, 0x64006400, 0xEA; sub.rn.f16x2 $0, t, $2; }"
    )
    return gl.inline_asm_elementwise(
        BF16 if dtype == gl.bfloat16 else FP16,
        "=r,r,r",
        [codes, zeros],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def scaled(pairs, scales, minima, MINIMA: gl.constexpr, dtype: gl.constexpr):
    """Both numbers of each word times its scale, and plus its minimum, rounded once."""
    KIND: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    scales, _ = gl.broadcast(scales, pairs)
    if MINIMA:
        minima, _ = gl.broadcast(minima, pairs)
        return gl.inline_asm_elementwise(
            "fma.rn." + KIND + " $0, $1, $2, $3;",
            "=r,r,r,r",
            [pairs, scales, minima],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return gl.inline_asm_elementwise(
            "mul.rn." + KIND + " $0, $1, $2;",
            "=r,r,r",
            [pairs, scales],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )


@gluon.jit
def _numbers(pairs, dtype: gl.constexpr):
    low = pairs.to(gl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.reshape(gl.join(low, high), [pairs.shape[0], 2 * pairs.shape[1]])


@gluon.jit
def operand(left, right, dtype: gl.constexpr, layout: gl.constexpr):
    """The words of twice CHUNK / 4 columns as numbers, where the tensor cores take them."""
    both = gl.permute(gl.join(_numbers(left, dtype), _numbers(right, dtype)), (0, 2, 1))
    both = gl.reshape(both, [left.shape[0], 4 * left.shape[1]])
    return gl.convert_layout(both, layout, assert_trivial=True)
