"""From words of codes in shared memory to WGMMA's register operand, for every format.

The tricks are those of :mod:`..operands`, two numbers at a time in the halves of a word. Here are
also the layouts of shared memory and registers that both main loops use.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ....activation.kernel import activate as _activate
from ...formats import CHUNK
from ...launch import HOPPER_ROWS

TILE_ROWS = gl.constexpr(HOPPER_ROWS)
CHUNK_COLUMNS = gl.constexpr(CHUNK)
BOX_WORDS = gl.constexpr(16)  # words of a row in a TMA box: a chunk of int4, half a chunk of int8
HALF_CHUNK = gl.constexpr(CHUNK // 2)  # columns of x in a TMA box, 128 bytes wide

# shared memory, of tokens and of words
X_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
WORDS_LAYOUT = gl.NVMMASharedLayout(64, 32, 2)
# registers, of a chunk's words: each lane holds the words whose weights it multiplies
WORDS_IN_LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0], [0, 4], [0, 8]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [HOPPER_ROWS, 16],
    )
)

# Triton 3.6 has other names for these
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
activate = gluon.jit(_activate.fn)


@gluon.jit
def splat16(bits):
    """Put 16 bits into both halves of a word."""
    return (bits.to(gl.int32) & 0xFFFF) * 0x10001


@gluon.jit
def load_offsets(zeros_ptr, at, MIDDLE: gl.constexpr, BITS: gl.constexpr, dtype: gl.constexpr):
    """Load what :func:`subtract_zero_points` subtracts: the exponent's offset plus the zero point.

    Without zero points, MIDDLE is the code of weight 0.
    """
    # int8 in bfloat16: one float32 above 2**23; else two 16-bit numbers above 128 or 1024
    AS_FLOAT32: gl.constexpr = BITS == 8 and dtype == gl.bfloat16
    OFFSET: gl.constexpr = 0x4300 if dtype == gl.bfloat16 else 0x6400
    if zeros_ptr is not None:
        zeros = gl.load(zeros_ptr + at).to(gl.int32)
        return zeros + 0x4B000000 if AS_FLOAT32 else splat16(zeros + OFFSET)
    else:
        BOTH: gl.constexpr = 0x4B000000 + MIDDLE if AS_FLOAT32 else (OFFSET + MIDDLE) * 0x10001
        return gl.full(at.shape, BOTH, gl.int32, at.type.layout)


@gluon.constexpr_function
def _subtraction(p, bits, dtype):
    """Return PTX that makes two numbers, $0, of a word of codes, $1, and offsets, $2."""
    kind = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    if bits == 4:
        # mask and exponent in one instruction, which the compiler does not find
        above = "0x43004300" if dtype == gl.bfloat16 else "0x64006400"
        codes = f"shr.u32 t, $1, {4 * p}; lop3.b32 t, t, 0x000F000F, {above}, 0xEA;"
    elif dtype == gl.float16:
        codes = f"prmt.b32 t, $1, 0x64646464, {0x4140 + 0x202 * p};"
    else:  # bfloat16 has no place for 128 and a byte, so codes pass through float32
        return (
            "{ .reg .b32 t, u; .reg .f32 a, b, z; mov.b32 z, $2;"
            f" prmt.b32 t, $1, 0x4B000000, {0x7440 + 2 * p};"
            f" prmt.b32 u, $1, 0x4B000000, {0x7441 + 2 * p};"
            " mov.b32 a, t; mov.b32 b, u; sub.rn.f32 a, a, z; sub.rn.f32 b, b, z;"
            " cvt.rn.bf16x2.f32 $0, b, a; }"
        )
    return f"{{ .reg .b32 t; {codes} sub.rn.{kind} $0, t, $2; }}"


@gluon.jit
def subtract_zero_points(words, p: gl.constexpr, zeros, BITS: gl.constexpr, dtype: gl.constexpr):
    """Return pair p of each word's codes minus their zero points, exactly, two numbers in a word.

    ``zeros`` are the offsets that :func:`load_offsets` returns.
    """
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
def scale_weights(pairs, scales, minima, MINIMA: gl.constexpr, dtype: gl.constexpr):
    """Multiply both numbers of each word by its scale, and add its minimum, with one rounding."""
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
def mma_operand(left, right, BITS: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """Return the numbers of two words as WGMMA's left operand of HALF_CHUNK columns.

    In int4 ``left`` holds the first half of these columns; in int8 left and right alternate.
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
