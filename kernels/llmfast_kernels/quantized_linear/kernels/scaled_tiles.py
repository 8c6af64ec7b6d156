"""The scaled tiles main loop: tensor cores by ``mma.sync`` with weights that are scaled before.

For tens to hundreds of tokens. The weights are scaled in registers, to the 16-bit numbers that
dequantizing rounds them to. The tensor cores then sum all columns in one accumulator, so that a
program takes more tokens than in :mod:`.tiles`, where each group's products are scaled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.launch import CachedLauncher
from ...common.pdl import wait_for_inputs
from ..call import Call
from ..launch import Launch
from .epilogue import store_tile, tile_rows
from .operands import CHUNK_COLUMNS, CHUNK_WORDS, INT4_MIDDLE, PAIR_COLUMNS, offset_codes

_HALF = tl.constexpr(2 * PAIR_COLUMNS.value)  # columns of a product


@triton.jit
def _side_by_side(left, right):
    """Concatenate ``[N, K]`` and ``[N, K]`` to ``[N, 2 K]``."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, [left.shape[0], 2 * left.shape[1]])


@triton.jit
def _scaled_pair(
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
    """Return the weights of pair p, ``[N, PAIR_COLUMNS]``: exact until the scale rounds them once.

    ``first`` is the offset of the rows' first groups.
    """
    offset = 128 if dtype == tl.bfloat16 else 1024
    at = first
    if GROUP > 0:
        group = (chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS) // GROUP
        at += group if EVEN_K else tl.minimum(group, groups - 1)
    scale = tl.load(scales_ptr + at)
    codes = offset_codes(words, p, dtype)
    if minima_ptr is not None:
        codes -= tl.full(at.shape, offset, tl.float32).to(dtype)
        alike = tl.zeros_like(codes)
        return tl.fma(codes, scale + alike, tl.load(minima_ptr + at) + alike)
    elif zeros_ptr is not None:
        codes -= (tl.load(zeros_ptr + at).to(tl.float32) + offset).to(dtype)
        return codes * scale
    else:
        codes -= tl.full(at.shape, offset + INT4_MIDDLE, tl.float32).to(dtype)
        return codes * scale


@triton.jit(do_not_specialize=["n_tokens", "n"])
def int4_scaled_tiles_kernel(
    x_ptr,  # [n_tokens, k]
    packed_ptr,  # [n, chunks * 16] words
    scales_ptr,  # [n, groups], of x's dtype, as the minima
    zeros_ptr,  # [n, groups], or None: 8
    minima_ptr,  # [n, groups], or None; with minima there are no zeros
    bias_ptr,  # [n] or None
    residual_ptr,  # [n_tokens, n] or None
    y_ptr,  # [n_tokens, n], written; with ACT half as wide
    n_tokens,
    n,
    k,
    groups,
    GROUP: tl.constexpr,  # columns of a group, at most those of a chunk; 0: all columns
    EVEN_K: tl.constexpr,  # k is a multiple of a chunk
    ACT: tl.constexpr,  # None, or the gate's activation: its rows are the first half
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    tiles = tl.cdiv(n_tokens, BLOCK_M)  # neighbouring programs share rows of the weight
    pid = tl.program_id(0) // tiles
    own, exists = tile_rows(pid, n, BLOCK_N, ACT is not None)
    rows = own.to(tl.int64)  # rows times columns may exceed 2**31; output offsets do not
    tokens = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    lanes = tl.arange(0, _HALF)[:, None]
    chunks = tl.cdiv(k, CHUNK_COLUMNS)
    words_ptr = packed_ptr + rows * (chunks * CHUNK_WORDS) + tl.arange(0, CHUNK_WORDS)[None, :]
    x_ptrs = x_ptr + tl.minimum(tokens, n_tokens - 1).to(tl.int64) * k + lanes
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for chunk in range(0, chunks):
        words = tl.load(words_ptr + chunk * CHUNK_WORDS)
        for half in tl.static_range(2):
            left = _scaled_pair(
                words, chunk, 2 * half, scales_ptr, zeros_ptr, minima_ptr, rows * groups, groups,
                GROUP, EVEN_K, dtype,
            )  # fmt: skip
            right = _scaled_pair(
                words, chunk, 2 * half + 1, scales_ptr, zeros_ptr, minima_ptr, rows * groups,
                groups, GROUP, EVEN_K, dtype,
            )  # fmt: skip
            first = chunk * CHUNK_COLUMNS + half * _HALF
            if EVEN_K:
                x = tl.load(x_ptrs + first)
            else:
                x = tl.load(x_ptrs + first, mask=first + lanes < k, other=0.0)
            sums = tl.dot(_side_by_side(left, right), x, sums)
        # Always true, but Triton cannot tell, so it waits for the products here. A wait where the
        # next chunk needs their sum would make ptxas wait after each MMA instruction, since the
        # registers of the weights are written in between.
        sums = tl.where(chunk < chunks, sums, 0.0)
    store_tile(sums, bias_ptr, residual_ptr, y_ptr, pid, own, exists, tokens, n_tokens, n, ACT)


_int4_scaled_tiles = CachedLauncher(int4_scaled_tiles_kernel, pdl=True)


def launch_scaled_tiles(call: Call, y: torch.Tensor, launch: Launch) -> None:
    """Compute ``y`` from int4 weights; scales and minima must have x's dtype."""
    programs = -(-call.n // launch.block_n) * -(-call.tokens // launch.block_m)
    even_k = call.k % launch.block_k == 0
    _int4_scaled_tiles(
        (programs,),
        (
            call.x, call.packed, call.scales, call.zeros, call.minima, call.bias, call.residual, y,
            call.tokens, call.n, call.k, call.groups,
            call.group, even_k, call.activation, launch.block_m, launch.block_n,
        ),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )  # fmt: skip
