"""Linear layers with eight-bit weights in Triton. Arguments are checked by int8_op.py.

A code becomes a number without a conversion: its bits below the exponent of 2**23 are the float32
2**23 + code, exactly. Less 2**23 and the zero point it is a whole number of at most 255, which
bfloat16 and float16 hold exactly, so it goes to the tensor cores unrounded.

For one token minima are not added to the weights: each group's is multiplied with the sum of its
inputs. More tokens with minima go through the workspace.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional

from ..common.launch import CachedLauncher
from ..common.pdl import wait_for_inputs
from .hopper_launch import HopperLaunch, run_on_hopper
from .int8_layout import UNIT
from .launch import block_m
from .workspace import workspace

MAX_TOKENS = 128
MIDDLE = 128  # the code that stands for 0 where there are no zero points
STAGED = 72 * 1024  # bytes of codes and inputs on their way to a program of tiles
DEQUANTIZED = (32, 128)  # rows and columns of a program
WHOLE = 128  # columns that are summed at a time where all have one scale

_MIDDLE = tl.constexpr(MIDDLE)
_OFFSET = tl.constexpr(1 << 23)
UNIT_COLUMNS = tl.constexpr(UNIT)


@dataclass(frozen=True)
class Int8Launch:
    """``gemv``: one token, summed by lanes. ``tiles``: tensor cores."""

    tier: str
    block_n: int  # rows of the weight that a program takes
    block_k: int  # columns at a time
    num_warps: int
    num_stages: int  # of the loop over columns, of tiles


def choose_int8_launch(k: int, group: int, tokens: int) -> Int8Launch:
    """Pick the launch. Pure: it asks no device, and fits in 99 KiB of shared memory.

    Args:
        k: inputs.
        group: columns that are summed before they are scaled: 32, 64 or 128.
        tokens: 1 to MAX_TOKENS.
    """
    if tokens == 1:
        block_k = max(min(2048, 1 << (k - 1).bit_length()), group)
        # 64 bytes of codes on their way to each thread
        return Int8Launch("gemv", 4, block_k, max(block_k // 512, 1), 1)
    block_n = 32 if tokens <= 32 else 64
    num_warps = min(block_n * group // 512, 4)  # 16 bytes of a tile for each thread
    stage = (block_n + 2 * block_m(tokens)) * group
    return Int8Launch("tiles", block_n, group, num_warps, max(2, min(STAGED // stage, 16)))


@triton.jit
def _column_of(place):
    """The column whose code is at a place of a row."""
    within = place % UNIT_COLUMNS
    column = place - within + within // 4 * 2 + within % 4 // 2 * 8 + within % 2
    return tl.max_contiguous(tl.multiple_of(column, 2), 2)


@triton.jit
def _as_they_lie(x):
    """Inputs ``[K]`` in the order in which their codes lie."""
    K: tl.constexpr = x.shape[0]
    x = tl.reshape(x, [K // UNIT_COLUMNS, 2, 4, 2])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), [K])


@triton.jit
def _numbers(codes):
    """2**23 + code, as float32."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _zero(zeros_ptr, minima_ptr, at):
    """2**23 + what stands for 0, as float32: of the groups ``at``, or of all alike."""
    if zeros_ptr is not None:
        zero = _numbers(tl.load(zeros_ptr + at))
    elif minima_ptr is not None:
        zero = tl.full(at.shape, _OFFSET, tl.float32)
    else:
        zero = tl.full(at.shape, _OFFSET + _MIDDLE, tl.float32)
    return zero


@triton.jit(do_not_specialize=["n"])
def _int8_gemv_kernel(
    x_ptr,  # [k]
    codes_ptr,  # [n, k], and filled up
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 128
    minima_ptr,  # [n, groups], or None; then there are no zeros
    bias_ptr,  # [n] or None
    residual_ptr,  # [n] or None
    y_ptr,  # [n], written
    n,
    k,
    groups,
    GROUP: tl.constexpr,  # columns that are summed before they are scaled
    ONE_GROUP: tl.constexpr,  # all columns have one scale
    EVEN_K: tl.constexpr,  # k is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    PARTS: tl.constexpr = BLOCK_K // GROUP
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(out, n - 1).to(tl.int64)  # int64: rows times columns may pass 2**31
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
        x = _as_they_lie(x)
        group = tl.arange(0, PARTS)
        if ONE_GROUP:
            group = group * 0
        else:
            # past the last group of a row there are no columns, and x is 0
            group = tl.minimum(start // GROUP + group, groups - 1)
        at = rows[:, None] * groups + group[None, :]
        x = tl.reshape(x, [1, PARTS, GROUP])
        w = tl.reshape(_numbers(codes), [BLOCK_N, PARTS, GROUP])
        w -= _zero(zeros_ptr, minima_ptr, at)[:, :, None]
        sums += tl.sum(w * x, 2) * tl.load(scales_ptr + at).to(tl.float32)
        if minima_ptr is not None:
            sums += tl.sum(x, 2) * tl.load(minima_ptr + at).to(tl.float32)
    y = tl.sum(sums, 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    y = y.to(dtype).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows).to(tl.float32)
    tl.store(y_ptr + out, y.to(dtype), mask=out < n)


@triton.jit(do_not_specialize=["n_tokens", "n"])
def _int8_tiles_kernel(
    x_ptr,  # [n_tokens, k]
    codes_ptr,  # [n, k], and filled up
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 128
    bias_ptr,  # [n] or None
    residual_ptr,  # [n_tokens, n] or None
    y_ptr,  # [n_tokens, n], written
    n_tokens,
    n,
    k,
    groups,
    ONE_GROUP: tl.constexpr,  # all columns have one scale; else BLOCK_K of them
    EVEN_K: tl.constexpr,  # k is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,  # n_tokens or more
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    rows = tl.minimum(out, n - 1).to(tl.int64)  # int64: as above
    tokens = tl.arange(0, BLOCK_M)[None, :]
    is_token = tokens < n_tokens
    lanes = tl.arange(0, BLOCK_K)
    columns = _column_of(lanes)
    filled = tl.cdiv(k, UNIT_COLUMNS) * UNIT_COLUMNS
    row_ptrs = codes_ptr + rows * filled
    at = rows * groups
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    zero = _zero(zeros_ptr, None, at)
    for start in range(0, k, BLOCK_K):
        places = start + lanes
        x_ptrs = x_ptr + tokens * k + (start + columns)[:, None]  # in the order of their codes
        if EVEN_K:
            x = tl.load(x_ptrs, mask=is_token, other=0.0)
            codes = tl.load(row_ptrs + places[None, :], eviction_policy="evict_first")
        else:
            x = tl.load(x_ptrs, mask=is_token & (start + columns < k)[:, None], other=0.0)
            mask = (places < filled)[None, :]
            codes = tl.load(row_ptrs + places[None, :], mask, 0, eviction_policy="evict_first")
        if ONE_GROUP:
            sums = tl.dot((_numbers(codes) - zero).to(dtype), x, sums)
        else:
            of_group = at + start // BLOCK_K
            w = (_numbers(codes) - _zero(zeros_ptr, None, of_group)).to(dtype)
            sums += tl.dot(w, x) * tl.load(scales_ptr + of_group).to(tl.float32)
    if ONE_GROUP:
        sums *= tl.load(scales_ptr + at).to(tl.float32)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + rows).to(tl.float32)
    y = sums.to(dtype).to(tl.float32)
    outputs = tokens * n + rows
    mask = is_token & (out < n)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + outputs, y.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["n"])
def _dequantize_int8_kernel(
    codes_ptr,  # [n, k], and filled up
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 128
    minima_ptr,  # [n, groups], or None; then there are no zeros
    weight_ptr,  # [n, k], written
    n,
    k,
    groups,
    GROUP: tl.constexpr,  # as in _int8_gemv_kernel
    ONE_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    PARTS: tl.constexpr = BLOCK_K // GROUP
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    start = tl.program_id(1) * BLOCK_K
    rows = tl.minimum(out, n - 1).to(tl.int64)  # int64: as above
    places = start + tl.arange(0, BLOCK_K)[None, :]
    cols = start + _column_of(tl.arange(0, BLOCK_K))[None, :]
    group = tl.arange(0, PARTS)[None, :]
    if ONE_GROUP:
        group = group * 0
    else:
        group = tl.minimum(start // GROUP + group, groups - 1)
    at = rows * groups + group
    filled = tl.cdiv(k, UNIT_COLUMNS) * UNIT_COLUMNS
    codes = tl.load(codes_ptr + rows * filled + places, mask=places < filled, other=0)
    w = tl.reshape(_numbers(codes), [BLOCK_N, PARTS, GROUP])
    w = (w - _zero(zeros_ptr, minima_ptr, at)[:, :, None]) * tl.load(scales_ptr + at).to(
        tl.float32
    )[:, :, None]
    if minima_ptr is not None:
        w += tl.load(minima_ptr + at).to(tl.float32)[:, :, None]
    w = tl.reshape(w, [BLOCK_N, BLOCK_K]).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + rows * k + cols, w, mask=(out < n) & (cols < k))


_gemv, _tiles, _dequantize = (
    CachedLauncher(kernel, pdl=True)
    for kernel in (_int8_gemv_kernel, _int8_tiles_kernel, _dequantize_int8_kernel)
)


def launch_int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    minima: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    _launch: Int8Launch | HopperLaunch | None = None,
) -> torch.Tensor:
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current device
            return launch_int8_linear(
                x, packed, scales, zeros, bias,
                group_size=group_size, minima=minima, residual=residual, _launch=_launch,
            )  # fmt: skip
    *leading, k = x.shape
    n, n_tokens = len(packed), x.numel() // k
    if _launch is None or isinstance(_launch, HopperLaunch):
        done = run_on_hopper(
            x, packed, scales, zeros, minima, bias, residual,
            bits=8, group_size=group_size, launch=_launch,
        )  # fmt: skip
        if done is not None:
            return done
        _launch = None
    if n_tokens > (MAX_TOKENS if minima is None else 1):
        weight = workspace(x.device, x.dtype, n * k).view(n, k)
        launch_dequantize_int8(packed, scales, zeros, minima, weight, group_size=group_size)
        y = functional.linear(x, weight, bias)
        return y if residual is None else y.add_(residual)
    y = torch.empty((*leading, n), dtype=x.dtype, device=x.device)
    if n_tokens == 0:
        return y
    groups = scales.shape[1]
    one_group = groups == 1
    group = WHOLE if one_group else group_size
    launch = _launch or choose_int8_launch(k, group, n_tokens)
    tensors = (x, packed, scales, zeros, minima, bias, residual, y)
    even_k = k % launch.block_k == 0
    grid, tile = (-(-n // launch.block_n),), (launch.block_n, launch.block_k)
    if launch.tier == "gemv":
        constexprs = (min(group, launch.block_k), one_group, even_k, *tile)
        _gemv(grid, (*tensors, n, k, groups, *constexprs), num_warps=launch.num_warps)
    else:
        given = (x, packed, scales, zeros, bias, residual, y)
        _tiles(
            grid,
            (*given, n_tokens, n, k, groups, one_group, even_k, block_m(n_tokens), *tile),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return y


def launch_dequantize_int8(
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
    one_group = groups == 1
    group = WHOLE if one_group else group_size
    tensors = (packed, scales, zeros, minima, weight)
    rows, cols = DEQUANTIZED
    _dequantize(
        (-(-n // rows), -(-k // cols)),
        (*tensors, n, k, groups, group, one_group, rows, cols),
        num_warps=4,
        num_stages=1,
    )
