"""Layers with four-bit weights for tens to hundreds of tokens.

The weights are scaled before they are multiplied, in registers and in 16 bits, to just what
dequantizing rounds them to. So the tensor cores sum all columns in one accumulator, and a program
takes more tokens than where the products of each group are scaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.pdl import wait_for_inputs
from .int4_parts import (
    CHUNK_COLUMNS,
    CHUNK_WORDS,
    MIDDLE_CODE,
    PAIR_COLUMNS,
    pair_of,
    rows_of,
    store,
)

_HALF = tl.constexpr(2 * PAIR_COLUMNS.value)  # columns of a product


@triton.jit
def _side_by_side(left, right):
    """``[N, K]`` and ``[N, K]`` as ``[N, 2 K]``."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, [left.shape[0], 2 * left.shape[1]])


@triton.jit
def _weights(
    words,
    chunk,
    p: tl.constexpr,
    scales_ptr,
    zeros_ptr,
    minima_ptr,
    first,
    groups,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """A pair's weights: less the zero point they are exact, scaled they are rounded once.

    ``first`` is where the rows' groups begin.
    """
    offset = 128 if dtype == tl.bfloat16 else 1024
    at = first
    if GROUP > 0:
        group = (chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS) // GROUP
        at += group if EVEN_K else tl.minimum(group, groups - 1)
    scale = tl.load(scales_ptr + at)
    codes = pair_of(words, p, dtype)
    if minima_ptr is not None:
        codes -= tl.full(at.shape, offset, tl.float32).to(dtype)
        alike = tl.zeros_like(codes)
        return tl.fma(codes, scale + alike, tl.load(minima_ptr + at) + alike)
    elif zeros_ptr is not None:
        codes -= (tl.load(zeros_ptr + at).to(tl.float32) + offset).to(dtype)
        return codes * scale
    else:
        codes -= tl.full(at.shape, offset + MIDDLE_CODE, tl.float32).to(dtype)
        return codes * scale


@triton.jit(do_not_specialize=["n_tokens", "n"])
def _int4_many_kernel(
    x_ptr,  # [n_tokens, k]
    packed_ptr,  # [n, chunks * 16] words
    scales_ptr,  # [n, groups], of x's dtype, as the minima
    zeros_ptr,  # [n, groups], or None: 8
    minima_ptr,  # [n, groups], or None; then there are no zeros
    bias_ptr,  # [n] or None
    residual_ptr,  # [n_tokens, n] or None
    y_ptr,  # [n_tokens, n], written; with ACT half as wide
    n_tokens,
    n,
    k,
    groups,
    GROUP: tl.constexpr,  # columns of a group, at most those of a chunk; 0: all columns
    EVEN_K: tl.constexpr,  # k is a multiple of a chunk
    ACT: tl.constexpr,  # None, or what the gate goes through: its rows are the first half
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    tiles = tl.cdiv(n_tokens, BLOCK_M)  # that share rows of the weight are neighbours
    pid = tl.program_id(0) // tiles
    own, there = rows_of(pid, n, BLOCK_N, ACT is not None)
    rows = own.to(tl.int64)  # rows times columns may pass 2**31; what is written does not
    tokens = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    lanes = tl.arange(0, _HALF)[:, None]
    chunks = tl.cdiv(k, CHUNK_COLUMNS)
    words_ptr = packed_ptr + rows * (chunks * CHUNK_WORDS) + tl.arange(0, CHUNK_WORDS)[None, :]
    x_ptrs = x_ptr + tl.minimum(tokens, n_tokens - 1).to(tl.int64) * k + lanes
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for chunk in range(0, chunks):
        words = tl.load(words_ptr + chunk * CHUNK_WORDS)
        for half in tl.static_range(2):
            left = _weights(
                words, chunk, 2 * half, scales_ptr, zeros_ptr, minima_ptr, rows * groups, groups,
                GROUP, EVEN_K, dtype,
            )  # fmt: skip
            right = _weights(
                words, chunk, 2 * half + 1, scales_ptr, zeros_ptr, minima_ptr, rows * groups,
                groups, GROUP, EVEN_K, dtype,
            )  # fmt: skip
            first = chunk * CHUNK_COLUMNS + half * _HALF
            if EVEN_K:
                x = tl.load(x_ptrs + first)
            else:
                x = tl.load(x_ptrs + first, mask=first + lanes < k, other=0.0)
            sums = tl.dot(_side_by_side(left, right), x, sums)
        # Always so, but Triton cannot tell, and waits for the products here. If it waited where
        # the next chunk needs their sum, ptxas would make each of their instructions wait, since
        # the registers of the weights are written between.
        sums = tl.where(chunk < chunks, sums, 0.0)
    store(sums, bias_ptr, residual_ptr, y_ptr, pid, own, there, tokens, n_tokens, n, ACT)
