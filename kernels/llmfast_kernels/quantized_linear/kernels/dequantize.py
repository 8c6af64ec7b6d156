"""Write dequantized weights to memory: computed in float32, rounded once.

It is bound by memory, so each format has the kernel that reads and writes its layout in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.launch import CachedLauncher
from ...common.pdl import wait_for_inputs
from ..formats import CHUNK, Format
from ..launch import INT8_GROUP
from .operands import (
    CHUNK_COLUMNS,
    CHUNK_WORDS,
    INT4_MIDDLE,
    PAIR_COLUMNS,
    UNIT_COLUMNS,
    int8_column,
    offset_codes8,
    offset_zeros8,
)

INT4_ROWS = 32  # weight rows of a program, which takes a chunk of columns
INT8_TILE = (32, 128)  # weight rows and columns of a program


@triton.jit(do_not_specialize=["n"])
def int4_dequantize_kernel(
    packed_ptr,  # [n, chunks * 16] words
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 8
    minima_ptr,  # [n, groups], or None; with minima there are no zeros
    weight_ptr,  # [n, k], written
    n,
    k,
    groups,
    GROUP: tl.constexpr,  # columns of a group, at most those of a chunk; 0: all columns
    BLOCK_N: tl.constexpr,
):
    wait_for_inputs()
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1)
    rows = tl.minimum(out, n - 1).to(tl.int64)[:, None]  # rows times columns may exceed 2**31
    words = tl.arange(0, CHUNK_WORDS)[None, :] + chunk * CHUNK_WORDS
    words = tl.load(packed_ptr + rows * (tl.cdiv(k, CHUNK_COLUMNS) * CHUNK_WORDS) + words)
    for p in tl.static_range(4):
        low = (words >> (4 * p)) & 15
        high = (words >> (4 * p + 16)) & 15
        weight = tl.reshape(tl.join(low, high), [BLOCK_N, PAIR_COLUMNS]).to(tl.float32)
        at = rows * groups
        if GROUP > 0:
            at += tl.minimum((chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS) // GROUP, groups - 1)
        scale = tl.load(scales_ptr + at).to(tl.float32)
        if minima_ptr is not None:
            weight = weight * scale + tl.load(minima_ptr + at).to(tl.float32)
        elif zeros_ptr is not None:
            weight = (weight - tl.load(zeros_ptr + at).to(tl.float32)) * scale
        else:
            weight = (weight - INT4_MIDDLE) * scale
        cols = chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS + tl.arange(0, PAIR_COLUMNS)[None, :]
        mask = (out < n)[:, None] & (cols < k)
        tl.store(weight_ptr + rows * k + cols, weight.to(weight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def int8_dequantize_kernel(
    codes_ptr,  # [n, k], padded to whole units
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 128
    minima_ptr,  # [n, groups], or None; with minima there are no zeros
    weight_ptr,  # [n, k], written
    n,
    k,
    groups,
    GROUP: tl.constexpr,  # columns that share a scale
    ONE_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    PARTS: tl.constexpr = BLOCK_K // GROUP
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    start = tl.program_id(1) * BLOCK_K
    rows = tl.minimum(out, n - 1).to(tl.int64)  # rows times columns may exceed 2**31
    places = start + tl.arange(0, BLOCK_K)[None, :]
    cols = start + int8_column(tl.arange(0, BLOCK_K))[None, :]
    group = tl.arange(0, PARTS)[None, :]
    if ONE_GROUP:
        group = group * 0
    else:
        group = tl.minimum(start // GROUP + group, groups - 1)
    at = rows * groups + group
    filled = tl.cdiv(k, UNIT_COLUMNS) * UNIT_COLUMNS
    codes = tl.load(codes_ptr + rows * filled + places, mask=places < filled, other=0)
    w = tl.reshape(offset_codes8(codes), [BLOCK_N, PARTS, GROUP])
    w = (w - offset_zeros8(zeros_ptr, minima_ptr, at)[:, :, None]) * tl.load(scales_ptr + at).to(
        tl.float32
    )[:, :, None]
    if minima_ptr is not None:
        w += tl.load(minima_ptr + at).to(tl.float32)[:, :, None]
    w = tl.reshape(w, [BLOCK_N, BLOCK_K]).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + rows * k + cols, w, mask=(out < n) & (cols < k))


_int4_dequantize, _int8_dequantize = (
    CachedLauncher(kernel, pdl=True) for kernel in (int4_dequantize_kernel, int8_dequantize_kernel)
)


def launch_dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    minima: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    fmt: Format,
    group_size: int,
) -> None:
    """Write the weights to ``weight (n, k)``: computed in float32, rounded once to its dtype."""
    n, k = weight.shape
    groups = scales.shape[1]
    group = group_size if groups > 1 else 0
    tensors = (packed, scales, zeros, minima, weight)
    if fmt.bits == 4:
        run, (rows, cols) = _int4_dequantize, (INT4_ROWS, CHUNK)
        constexprs: tuple[object, ...] = (group, INT4_ROWS)
    else:
        run, (rows, cols) = _int8_dequantize, INT8_TILE
        constexprs = (group or INT8_GROUP, groups == 1, *INT8_TILE)
    run(
        (-(-n // rows), -(-k // cols)), (*tensors, n, k, groups, *constexprs),
        num_warps=4, num_stages=1,
    )  # fmt: skip
