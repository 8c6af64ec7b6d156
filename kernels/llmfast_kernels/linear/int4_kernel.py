"""Linear layers with four-bit weights in Triton. Arguments are checked by int4_op.py.

A pair of codes becomes a pair of 16-bit numbers by one shift and one mask: with the right exponent
set above it, a code q is the number 128 + q (bfloat16) or 1024 + q (float16), exactly. Less 128 or
1024 and the zero point it goes to the tensor cores from registers.

Minima are not added to the weights: each group's is multiplied with the sum of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch.nn import functional

from ..dependent import wait_for_inputs
from ..relaunch import Relaunch, aligned
from .int4_layout import CHUNK, MIDDLE
from .int4_workspace import workspace
from .launch import block_m

MAX_TOKENS = 128
DEQUANTIZED_ROWS = 32  # of a chunk of columns, by a program

_CHUNK = tl.constexpr(CHUNK)
_MIDDLE = tl.constexpr(MIDDLE)
_PAIR = tl.constexpr(CHUNK // 4)  # columns that one shift gives


@dataclass(frozen=True)
class Int4Launch:
    """How the rows of a weight are laid on programs."""

    block_n: int
    num_warps: int
    num_stages: int


@cache
def choose_int4_launch(n: int, tokens: int) -> Int4Launch:
    """Pick the launch. Pure: it asks no device, and fits in 99 KiB of shared memory."""
    block_n = 64 if n >= 64 else 32
    return Int4Launch(block_n, 4, 4 if tokens <= 32 else 2)


@triton.jit
def _pair_of(words, p: tl.constexpr, dtype: tl.constexpr):
    """Codes of CHUNK / 4 columns as numbers: 128 + code in bfloat16, 1024 + code in float16."""
    if dtype == tl.bfloat16:
        exponent = 0x43004300
    else:
        exponent = 0x64006400
    both = ((words >> (4 * p)) & 0x000F000F) | exponent
    low = both.to(tl.int16).to(dtype, bitcast=True)
    high = (both >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(low, high), [words.shape[0], _PAIR])


@triton.jit(do_not_specialize=["n_tokens", "n"])
def _int4_kernel(
    x_ptr,  # [n_tokens, k]
    packed_ptr,  # [n, chunks * 16] words
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 8
    minima_ptr,  # [n, groups], or None; then there are no zeros
    bias_ptr,  # [n] or None
    residual_ptr,  # [n_tokens, n] or None
    y_ptr,  # [n_tokens, n], written
    n_tokens,
    n,
    k,
    groups,
    GROUP: tl.constexpr,  # columns of a group, at most those of a chunk; 0: all columns
    EVEN_K: tl.constexpr,  # k is a multiple of a chunk
    BLOCK_M: tl.constexpr,  # n_tokens or more
    BLOCK_N: tl.constexpr,
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    offset = 128 if dtype == tl.bfloat16 else 1024
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(out, n - 1).to(tl.int64)[:, None]  # int64: rows times columns pass 2**31
    tokens = tl.arange(0, BLOCK_M)[None, :]
    is_token = tokens < n_tokens
    lanes = tl.arange(0, _PAIR)[:, None]
    chunks = tl.cdiv(k, _CHUNK)
    words_ptr = packed_ptr + rows * (chunks * (_CHUNK // 8)) + tl.arange(0, _CHUNK // 8)[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    of_group = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    zero = tl.full([BLOCK_N, 1], offset + _MIDDLE, tl.float32).to(dtype)
    if minima_ptr is not None:
        zero = tl.full([BLOCK_N, 1], offset, tl.float32).to(dtype)
        inputs = tl.zeros([1, BLOCK_M], tl.float32)
    if GROUP == 0:
        if zeros_ptr is not None:
            zero = (tl.load(zeros_ptr + rows).to(tl.float32) + offset).to(dtype)
    for chunk in range(0, chunks):
        words = tl.load(words_ptr + chunk * (_CHUNK // 8), eviction_policy="evict_first")
        for p in tl.static_range(4):
            if GROUP > 0:
                group = (chunk * _CHUNK + p * _PAIR) // GROUP
                if p * _PAIR % GROUP == 0:
                    of_group = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                    if minima_ptr is not None:
                        inputs = tl.zeros([1, BLOCK_M], tl.float32)
                    if zeros_ptr is not None:
                        # past the last group of a row there are no columns, and x is 0
                        at = rows * groups + tl.minimum(group, groups - 1)
                        zero = (tl.load(zeros_ptr + at).to(tl.float32) + offset).to(dtype)
            cols = chunk * _CHUNK + p * _PAIR + lanes
            mask = is_token if EVEN_K else is_token & (cols < k)
            x = tl.load(x_ptr + tokens * k + cols, mask=mask, other=0.0)
            of_group = tl.dot(_pair_of(words, p, dtype) - zero, x, of_group)
            if minima_ptr is not None:
                inputs += tl.sum(x.to(tl.float32), axis=0, keep_dims=True)
            if GROUP > 0:
                if (p + 1) * _PAIR % GROUP == 0:
                    at = rows * groups + tl.minimum(group, groups - 1)
                    sums += tl.load(scales_ptr + at).to(tl.float32) * of_group
                    if minima_ptr is not None:
                        sums += tl.load(minima_ptr + at).to(tl.float32) * inputs
    if GROUP == 0:
        sums = tl.load(scales_ptr + rows).to(tl.float32) * of_group
        if minima_ptr is not None:
            sums += tl.load(minima_ptr + rows).to(tl.float32) * inputs
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + rows).to(tl.float32)
    y = sums.to(dtype).to(tl.float32)
    at = tokens * n + rows
    mask = is_token & (out < n)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["n"])
def _dequantize_kernel(
    packed_ptr,  # [n, chunks * 16] words
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 8
    minima_ptr,  # [n, groups], or None; then there are no zeros
    weight_ptr,  # [n, k], written
    n,
    k,
    groups,
    GROUP: tl.constexpr,  # as in _int4_kernel
    BLOCK_N: tl.constexpr,
):
    wait_for_inputs()
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1)
    rows = tl.minimum(out, n - 1).to(tl.int64)[:, None]  # int64: rows times columns pass 2**31
    words = tl.arange(0, _CHUNK // 8)[None, :] + chunk * (_CHUNK // 8)
    words = tl.load(packed_ptr + rows * (tl.cdiv(k, _CHUNK) * (_CHUNK // 8)) + words)
    for p in tl.static_range(4):
        low = (words >> (4 * p)) & 15
        high = (words >> (4 * p + 16)) & 15
        weight = tl.reshape(tl.join(low, high), [BLOCK_N, _PAIR]).to(tl.float32)
        at = rows * groups
        if GROUP > 0:
            at += tl.minimum((chunk * _CHUNK + p * _PAIR) // GROUP, groups - 1)
        scale = tl.load(scales_ptr + at).to(tl.float32)
        if minima_ptr is not None:
            weight = weight * scale + tl.load(minima_ptr + at).to(tl.float32)
        elif zeros_ptr is not None:
            weight = (weight - tl.load(zeros_ptr + at).to(tl.float32)) * scale
        else:
            weight = (weight - _MIDDLE) * scale
        cols = chunk * _CHUNK + p * _PAIR + tl.arange(0, _PAIR)[None, :]
        mask = (out < n)[:, None] & (cols < k)
        tl.store(weight_ptr + rows * k + cols, weight.to(weight_ptr.dtype.element_ty), mask=mask)


_int4 = Relaunch(_int4_kernel, dependent=True)
_dequantize = Relaunch(_dequantize_kernel, dependent=True)


def launch_int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    minima: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    _launch: Int4Launch | None = None,
) -> torch.Tensor:
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current device
            return launch_int4_linear(
                x, packed, scales, zeros, bias,
                group_size=group_size, minima=minima, residual=residual, _launch=_launch,
            )  # fmt: skip
    *leading, k = x.shape
    n, n_tokens = len(packed), x.numel() // k
    if n_tokens > MAX_TOKENS:
        weight = workspace(x.device, x.dtype, n * k).view(n, k)
        launch_dequantize_int4(packed, scales, zeros, minima, weight, group_size=group_size)
        y = functional.linear(x, weight, bias)
        return y if residual is None else y.add_(residual)
    launch = _launch or choose_int4_launch(n, n_tokens)
    y = torch.empty((*leading, n), dtype=x.dtype, device=x.device)
    tensors = (x, packed, scales, zeros, minima, bias, residual, y)
    groups = scales.shape[1]
    group = group_size if groups > 1 else 0
    even_k = k % CHUNK == 0
    key = None
    if aligned(*(t for t in tensors if t is not None)):
        absent = tuple(t is None for t in (zeros, minima, bias, residual))
        alike = tuple((number % 16 == 0, number == 1) for number in (k, groups))
        key = (x.get_device(), x.dtype, *absent, *alike, group, even_k, launch, block_m(n_tokens))
    _int4(
        (-(-n // launch.block_n),),
        key,
        (*tensors, n_tokens, n, k, groups, group, even_k, block_m(n_tokens), launch.block_n),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return y


def launch_dequantize_int4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    minima: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    group_size: int,
) -> None:
    """Write the weights to ``weight (n, k)``: computed in float32, rounded to its dtype."""
    n, k = weight.shape
    groups = scales.shape[1]
    group = group_size if groups > 1 else 0
    tensors = (packed, scales, zeros, minima, weight)
    key = None
    if aligned(*(t for t in tensors if t is not None)):
        alike = tuple((number % 16 == 0, number == 1) for number in (k, groups))
        key = (weight.get_device(), weight.dtype, zeros is None, minima is None, *alike, group)
    _dequantize(
        (-(-n // DEQUANTIZED_ROWS), -(-k // CHUNK)),
        key,
        (*tensors, n, k, groups, group, DEQUANTIZED_ROWS),
        num_warps=4,
        num_stages=1,
    )
