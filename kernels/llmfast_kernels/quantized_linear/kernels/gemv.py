"""The gemv main loop: one token, multiplied and summed by the lanes, on any GPU.

Minima are not added to the weights: each group's minimum is multiplied by the sum of its inputs.

Each format has a kernel of its own, since a lane works on other units: int4 multiplies words of
eight codes and keeps a group's sums in a lane, int8 sums groups across lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.launch import CachedLauncher
from ...common.pdl import wait_for_inputs
from ...linear.kernel import round_sums
from ..call import Call
from ..launch import INT8_GROUP, Launch
from .epilogue import store_tile, tile_rows
from .operands import (
    CHUNK_COLUMNS,
    CHUNK_WORDS,
    INT4_MIDDLE,
    PAIR_COLUMNS,
    UNIT_COLUMNS,
    halves,
    in_packed_order,
    offset_codes8,
    offset_zeros8,
)


@triton.jit
def _scale_group(part, inputs, scales_ptr, zeros_ptr, minima_ptr, at):
    """Scale a group's products. ``part`` sums x times 128 + code, ``inputs`` sums x."""
    scale = tl.load(scales_ptr + at).to(tl.float32)
    if minima_ptr is not None:
        minimum = tl.load(minima_ptr + at).to(tl.float32)
        return scale * (part - 128.0 * inputs) + minimum * inputs
    elif zeros_ptr is not None:
        zero = tl.load(zeros_ptr + at).to(tl.float32)
        return scale * (part - (128.0 + zero) * inputs)
    else:
        return scale * (part - (128.0 + INT4_MIDDLE) * inputs)


@triton.jit(do_not_specialize=["n"])
def int4_gemv_kernel(
    x_ptr,  # [k], at a multiple of 4 bytes
    packed_ptr,  # [n, k / 8] words
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 8
    minima_ptr,  # [n, groups], or None; with minima there are no zeros
    bias_ptr,  # [n] or None
    residual_ptr,  # [n] or None
    y_ptr,  # [n], written; with ACT half as wide
    n,
    k,  # a multiple of 8 * BLOCK_W
    groups,
    GROUP: tl.constexpr,  # columns of a group, at most those of a chunk; 0: all columns
    ACT: tl.constexpr,  # None, or the gate's activation: its rows are the first half
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,  # words of a row at a time
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    own, exists = tile_rows(tl.program_id(0), n, BLOCK_N, ACT is not None)
    rows = own.to(tl.int64)  # rows times columns may exceed 2**31
    lanes = tl.arange(0, BLOCK_W)[None, :]
    n_words = k // 8
    words_ptr = packed_ptr + rows * n_words
    pairs_ptr = x_ptr.to(tl.pointer_type(tl.int32))
    sums = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    part = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    inputs = tl.zeros([1, BLOCK_W], tl.float32)
    for start in range(0, n_words, BLOCK_W):
        places = start + lanes
        words = tl.load(words_ptr + places, eviction_policy="evict_first")
        chunk = places // CHUNK_WORDS
        pairs = chunk * (CHUNK_COLUMNS // 2) + places % CHUNK_WORDS
        for p in tl.static_range(4):
            x_low, x_high = halves(tl.load(pairs_ptr + pairs + p * CHUNK_WORDS), dtype)
            codes = ((words >> (4 * p)) & 0x000F000F) | 0x43004300  # bfloat16, whatever x's dtype
            low, high = halves(codes, tl.bfloat16)
            part += low * x_low
            part += high * x_high
            inputs += x_low + x_high
            if GROUP > 0:
                if (p + 1) * PAIR_COLUMNS % GROUP == 0:
                    at = rows * groups + (chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS) // GROUP
                    sums += _scale_group(part, inputs, scales_ptr, zeros_ptr, minima_ptr, at)
                    part = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
                    inputs = tl.zeros([1, BLOCK_W], tl.float32)
    if GROUP == 0:
        sums = _scale_group(part, inputs, scales_ptr, zeros_ptr, minima_ptr, rows)
    y = tl.sum(sums, 1)[:, None]
    token = tl.zeros([1, 1], tl.int32)
    store_tile(y, bias_ptr, residual_ptr, y_ptr, tl.program_id(0), own, exists, token, 1, n, ACT)


@triton.jit(do_not_specialize=["n"])
def int8_gemv_kernel(
    x_ptr,  # [k]
    codes_ptr,  # [n, k], padded to whole units
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 128
    minima_ptr,  # [n, groups], or None; with minima there are no zeros
    bias_ptr,  # [n] or None
    residual_ptr,  # [n] or None
    y_ptr,  # [n], written
    n,
    k,
    groups,
    GROUP: tl.constexpr,  # columns whose products are summed before they are scaled
    ONE_GROUP: tl.constexpr,  # all columns have one scale
    EVEN_K: tl.constexpr,  # k is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    PARTS: tl.constexpr = BLOCK_K // GROUP
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(out, n - 1).to(tl.int64)  # rows times columns may exceed 2**31
    lanes = tl.arange(0, BLOCK_K)
    filled = tl.cdiv(k, UNIT_COLUMNS) * UNIT_COLUMNS
    row_ptrs = codes_ptr + rows[:, None] * filled
    sums = tl.zeros([BLOCK_N, PARTS], tl.float32)
    for start in range(0, k, BLOCK_K):
        cols = start + lanes
        if EVEN_K:
            x = tl.load(x_ptr + cols).to(tl.float32)
            codes = tl.load(row_ptrs + cols[None, :], eviction_policy="evict_first")
        else:
            x = tl.load(x_ptr + cols, mask=cols < k, other=0.0).to(tl.float32)
            mask = (cols < filled)[None, :]
            codes = tl.load(row_ptrs + cols[None, :], mask, 0, eviction_policy="evict_first")
        x = in_packed_order(x)
        group = tl.arange(0, PARTS)
        if ONE_GROUP:
            group = group * 0
        else:
            # past the last group of a row there are no columns, and x is 0
            group = tl.minimum(start // GROUP + group, groups - 1)
        at = rows[:, None] * groups + group[None, :]
        x = tl.reshape(x, [1, PARTS, GROUP])
        w = tl.reshape(offset_codes8(codes), [BLOCK_N, PARTS, GROUP])
        w -= offset_zeros8(zeros_ptr, minima_ptr, at)[:, :, None]
        sums += tl.sum(w * x, 2) * tl.load(scales_ptr + at).to(tl.float32)
        if minima_ptr is not None:
            sums += tl.sum(x, 2) * tl.load(minima_ptr + at).to(tl.float32)
    y = round_sums(tl.sum(sums, 1), bias_ptr, rows, dtype)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows).to(tl.float32)
    tl.store(y_ptr + out, y.to(dtype), mask=out < n)


_int4_gemv, _int8_gemv = (
    CachedLauncher(kernel, pdl=True) for kernel in (int4_gemv_kernel, int8_gemv_kernel)
)


def launch_gemv(call: Call, y: torch.Tensor, launch: Launch) -> None:
    """Compute ``y`` for one token; with int8 without an activation."""
    if call.fmt.bits == 8 and call.activation is not None:
        raise ValueError("int8_linear: gemv takes no activation")
    tensors = (
        call.x, call.packed, call.scales, call.zeros, call.minima, call.bias, call.residual, y,
        call.n, call.k, call.groups,
    )  # fmt: skip
    if call.fmt.bits == 4:
        run = _int4_gemv
        constexprs: tuple[object, ...] = (
            call.group,
            call.activation,
            launch.block_n,
            launch.block_k // 8,
        )
    else:
        run = _int8_gemv
        group, even_k = min(call.group or INT8_GROUP, launch.block_k), call.k % launch.block_k == 0
        constexprs = (group, call.groups == 1, even_k, launch.block_n, launch.block_k)
    run(
        (-(-call.n // launch.block_n),), (*tensors, *constexprs),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
