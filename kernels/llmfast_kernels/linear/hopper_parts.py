"""What the kernels for four- and eight-bit weights on Hopper have in common.

They are Gluon, Triton's language below the tiles: warps of a program that do different work cannot
be said in Triton.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ..activation.kernel import activate as _activate
from .hopper_launch import ROWS
from .int4_layout import CHUNK

TILE_ROWS = gl.constexpr(ROWS)
CHUNK_COLUMNS = gl.constexpr(CHUNK)
BOX_WORDS = gl.constexpr(16)  # of a row: a chunk of four bits, or a half of eight
HALF_CHUNK = gl.constexpr(CHUNK // 2)  # columns that lie 128 bytes wide in shared memory

# of tokens, and of words, in shared memory
X_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
WORDS_LAYOUT = gl.NVMMASharedLayout(64, 32, 2)
# how the words of a chunk lie in lanes: each has those whose weights it multiplies
LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0], [0, 4], [0, 8]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [ROWS, 16],
    )
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
def zeros_of(zeros_ptr, at, MIDDLE: gl.constexpr, BITS: gl.constexpr, dtype: gl.constexpr):
    """What :func:`less_zeros` subtracts: the number that codes are put above, and the zero point.

    Without zero points MIDDLE stands for 0.
    """
    ALONE: gl.constexpr = BITS == 8 and dtype == gl.bfloat16  # a float32, of 2**23
    OFFSET: gl.constexpr = 0x4300 if dtype == gl.bfloat16 else 0x6400  # twice, of 128 or 1024
    if zeros_ptr is not None:
        zeros = gl.load(zeros_ptr + at).to(gl.int32)
        return zeros + 0x4B000000 if ALONE else twice(zeros + OFFSET)
    else:
        BOTH: gl.constexpr = 0x4B000000 + MIDDLE if ALONE else (OFFSET + MIDDLE) * 0x10001
        return gl.full(at.shape, BOTH, gl.int32, at.type.layout)


@gluon.constexpr_function
def _subtraction(p, bits, dtype):
    """From a word, $1, and what :func:`zeros_of` gives, $2, the two numbers, $0."""
    kind = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    if bits == 4:
        # mask and exponent by one instruction, which the compiler does not find
        above = "0x43004300" if dtype == gl.bfloat16 else "0x64006400"
        codes = f"shr.u32 t, $1, {4 * p}; lop3.b32 t, t, 0x000F000F, {above}, 0xEA;"
    elif dtype == gl.float16:
        codes = f"prmt.b32 t, $1, 0x64646464, {0x4140 + 0x202 * p};"
    else:  # bfloat16 has no place for 128 and a byte: they are made float32 on the way
        return (
            "{ .reg .b32 t, u; .reg .f32 a, b, z; mov.b32 z, $2;"
            f" prmt.b32 t, $1, 0x4B000000, {0x7440 + 2 * p};"
            f" prmt.b32 u, $1, 0x4B000000, {0x7441 + 2 * p};"
            " mov.b32 a, t; mov.b32 b, u; sub.rn.f32 a, a, z; sub.rn.f32 b, b, z;"
            " cvt.rn.bf16x2.f32 $0, b, a; }"
        )
    return f"{{ .reg .b32 t; {codes} sub.rn.{kind} $0, t, $2; }}"


@gluon.jit
def less_zeros(words, p: gl.constexpr, zeros, BITS: gl.constexpr, dtype: gl.constexpr):
    """Two codes of each word less their zero points, exactly: two numbers in a word."""
    zeros, _ = gl.broadcast(zeros, words)
    return gl.inline_asm_elementwise(
        _subtraction(p, BITS, dtype),
        "=r,r,r",
        [words, zeros],
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
def operand(left, right, BITS: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """Two words of two numbers each, as the numbers of HALF_CHUNK columns for the tensor cores.

    Of four bits the first are of the columns before, of eight they take turns.
    """
    ROWS: gl.constexpr = left.shape[0]
    if BITS == 4:
        both = gl.permute(gl.join(left, right), (0, 2, 1))
    else:
        both = gl.reshape(gl.join(left, right), [ROWS, 4, 4, 2])
        both = gl.permute(both, (0, 1, 3, 2))
    both = gl.reshape(both, [ROWS, 2 * left.shape[1]])
    low = both.to(gl.int16).to(dtype, bitcast=True)
    high = (both >> 16).to(gl.int16).to(dtype, bitcast=True)
    numbers = gl.reshape(gl.join(low, high), [ROWS, 2 * both.shape[1]])
    return gl.convert_layout(numbers, layout, assert_trivial=True)
