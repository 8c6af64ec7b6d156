"""Linear layers with four-bit weights in Triton. Arguments are checked by int4_op.py.

A pair of codes becomes a pair of 16-bit numbers by one shift and one mask: with the right exponent
set above it, a code q is the number 128 + q (bfloat16) or 1024 + q (float16), exactly. Less 128 or
1024 and the zero point it goes to the tensor cores from registers.

Minima are not added to the weights: each group's is multiplied with the sum of its inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional

from ..common.launch import CachedLauncher
from ..common.pdl import wait_for_inputs
from .hopper_launch import HopperLaunch, run_on_hopper
from .int4_launch import GEMV_COLUMNS, MAX_TOKENS, Int4Launch, choose_int4_launch
from .int4_layout import CHUNK
from .int4_many import _int4_many_kernel
from .int4_parts import (
    CHUNK_COLUMNS,
    CHUNK_WORDS,
    MIDDLE_CODE,
    PAIR_COLUMNS,
    add_and_store,
    pair_of,
    rows_of,
    store,
)
from .kernel import GATED, shared_memory_of
from .workspace import MAX_TICKETS, tickets, workspace

DEQUANTIZED_ROWS = 32  # of a chunk of columns, by a program


@triton.jit(do_not_specialize=["n_tokens", "n", "per_split"])
def _int4_tiles_kernel(
    x_ptr,  # [n_tokens, k]
    packed_ptr,  # [n, chunks * 16] words
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 8
    minima_ptr,  # [n, groups], or None; then there are no zeros
    bias_ptr,  # [n] or None
    residual_ptr,  # [n_tokens, n] or None
    y_ptr,  # [n_tokens, n], written; with ACT half as wide
    partial_ptr,  # float32 [SPLITS, n_tokens, n], written; or None: SPLITS is 1
    tickets_ptr,  # int32, 0 for each tile before and after; or None
    n_tokens,
    n,
    k,
    groups,
    per_split,  # chunks of columns
    GROUP: tl.constexpr,  # columns of a group, at most those of a chunk; 0: all columns
    EVEN_K: tl.constexpr,  # k is a multiple of a chunk
    SPLITS: tl.constexpr,
    ACT: tl.constexpr,  # None, or what the gate goes through: its rows are the first half
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # the next kernel's programs would crowd onto the multiprocessors that are done first
    wait_for_inputs(TRIGGER_DEPENDENTS=False)
    dtype = y_ptr.dtype.element_ty
    offset = 128 if dtype == tl.bfloat16 else 1024
    own, there = rows_of(tl.program_id(0), n, BLOCK_N, ACT is not None)
    rows = own.to(tl.int64)  # rows times columns pass 2**31; what is written does not
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    is_token = tokens < n_tokens
    lanes = tl.arange(0, PAIR_COLUMNS)[:, None]
    chunks = tl.cdiv(k, CHUNK_COLUMNS)
    words_ptr = packed_ptr + rows * (chunks * CHUNK_WORDS) + tl.arange(0, CHUNK_WORDS)[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    of_group = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    zero = tl.full([BLOCK_N, 1], offset + MIDDLE_CODE, tl.float32).to(dtype)
    if minima_ptr is not None:
        zero = tl.full([BLOCK_N, 1], offset, tl.float32).to(dtype)
        inputs = tl.zeros([1, BLOCK_M], tl.float32)
    if GROUP == 0:
        if zeros_ptr is not None:
            zero = (tl.load(zeros_ptr + rows).to(tl.float32) + offset).to(dtype)
    first = tl.program_id(1) * per_split
    for chunk in range(first, tl.minimum(first + per_split, chunks)):
        words = tl.load(words_ptr + chunk * CHUNK_WORDS, eviction_policy="evict_first")
        for p in tl.static_range(4):
            if GROUP > 0:
                group = (chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS) // GROUP
                if p * PAIR_COLUMNS % GROUP == 0:
                    of_group = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                    if minima_ptr is not None:
                        inputs = tl.zeros([1, BLOCK_M], tl.float32)
                    if zeros_ptr is not None:
                        # past the last group of a row there are no columns, and x is 0
                        at = rows * groups + tl.minimum(group, groups - 1)
                        zero = (tl.load(zeros_ptr + at).to(tl.float32) + offset).to(dtype)
            cols = chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS + lanes
            mask = is_token if EVEN_K else is_token & (cols < k)
            x = tl.load(x_ptr + tokens * k + cols, mask=mask, other=0.0)
            of_group = tl.dot(pair_of(words, p, dtype) - zero, x, of_group)
            if minima_ptr is not None:
                inputs += tl.sum(x.to(tl.float32), axis=0, keep_dims=True)
            if GROUP > 0:
                if (p + 1) * PAIR_COLUMNS % GROUP == 0:
                    at = rows * groups + tl.minimum(group, groups - 1)
                    sums += tl.load(scales_ptr + at).to(tl.float32) * of_group
                    if minima_ptr is not None:
                        sums += tl.load(minima_ptr + at).to(tl.float32) * inputs
    if GROUP == 0:
        sums = tl.load(scales_ptr + rows).to(tl.float32) * of_group
        if minima_ptr is not None:
            sums += tl.load(minima_ptr + rows).to(tl.float32) * inputs
    ticket_ptr = tickets_ptr
    if SPLITS > 1:
        ticket_ptr += tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
    add_and_store(
        sums, bias_ptr, residual_ptr, y_ptr, tl.program_id(0), own, there, tokens, n_tokens, n,
        partial_ptr, ticket_ptr, ACT, SPLITS,
    )  # fmt: skip


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """The two 16-bit numbers in each word as float32, the lower first."""
    if dtype == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _scaled(part, inputs, scales_ptr, zeros_ptr, minima_ptr, at):
    """A group's products with its scale; ``part`` is of 128 + code, ``inputs`` the sum of x."""
    scale = tl.load(scales_ptr + at).to(tl.float32)
    if minima_ptr is not None:
        minimum = tl.load(minima_ptr + at).to(tl.float32)
        return scale * (part - 128.0 * inputs) + minimum * inputs
    elif zeros_ptr is not None:
        zero = tl.load(zeros_ptr + at).to(tl.float32)
        return scale * (part - (128.0 + zero) * inputs)
    else:
        return scale * (part - (128.0 + MIDDLE_CODE) * inputs)


@triton.jit(do_not_specialize=["n"])
def _int4_gemv_kernel(
    x_ptr,  # [k], at a multiple of 4 bytes
    packed_ptr,  # [n, k / 8] words
    scales_ptr,  # these as in _int4_tiles_kernel
    zeros_ptr,
    minima_ptr,
    bias_ptr,
    residual_ptr,  # [n] or None
    y_ptr,  # [n], written; with ACT half as wide
    n,
    k,  # a multiple of 8 * BLOCK_W
    groups,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,  # words of a row at a time
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    own, there = rows_of(tl.program_id(0), n, BLOCK_N, ACT is not None)
    rows = own.to(tl.int64)  # as above
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
            x_low, x_high = _halves(tl.load(pairs_ptr + pairs + p * CHUNK_WORDS), dtype)
            codes = ((words >> (4 * p)) & 0x000F000F) | 0x43004300  # of bfloat16, whatever x is
            low, high = _halves(codes, tl.bfloat16)
            part += low * x_low
            part += high * x_high
            inputs += x_low + x_high
            if GROUP > 0:
                if (p + 1) * PAIR_COLUMNS % GROUP == 0:
                    at = rows * groups + (chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS) // GROUP
                    sums += _scaled(part, inputs, scales_ptr, zeros_ptr, minima_ptr, at)
                    part = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
                    inputs = tl.zeros([1, BLOCK_W], tl.float32)
    if GROUP == 0:
        sums = _scaled(part, inputs, scales_ptr, zeros_ptr, minima_ptr, rows)
    y = tl.sum(sums, 1)[:, None]
    token = tl.zeros([1, 1], tl.int32)
    store(y, bias_ptr, residual_ptr, y_ptr, tl.program_id(0), own, there, token, 1, n, ACT)


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
    GROUP: tl.constexpr,  # as in _int4_tiles_kernel
    BLOCK_N: tl.constexpr,
):
    wait_for_inputs()
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1)
    rows = tl.minimum(out, n - 1).to(tl.int64)[:, None]  # int64: rows times columns pass 2**31
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
            weight = (weight - MIDDLE_CODE) * scale
        cols = chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS + tl.arange(0, PAIR_COLUMNS)[None, :]
        mask = (out < n)[:, None] & (cols < k)
        tl.store(weight_ptr + rows * k + cols, weight.to(weight_ptr.dtype.element_ty), mask=mask)


_tiles, _many, _gemv, _dequantize = (
    CachedLauncher(kernel, pdl=True)
    for kernel in (_int4_tiles_kernel, _int4_many_kernel, _int4_gemv_kernel, _dequantize_kernel)
)


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
    activation: str | None = None,
    _launch: Int4Launch | HopperLaunch | None = None,
) -> torch.Tensor:
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current device
            return launch_int4_linear(
                x, packed, scales, zeros, bias,
                group_size=group_size, minima=minima, residual=residual, activation=activation,
                _launch=_launch,
            )  # fmt: skip
    *leading, k = x.shape
    n, n_tokens = len(packed), x.numel() // k
    if _launch is None or isinstance(_launch, HopperLaunch):
        done = run_on_hopper(
            x, packed, scales, zeros, minima, bias, residual,
            bits=4, group_size=group_size, activation=activation, launch=_launch,
        )  # fmt: skip
        if done is not None:
            return done
        _launch = None
    if n_tokens > MAX_TOKENS:
        weight = workspace(x.device, x.dtype, n * k).view(n, k)
        launch_dequantize_int4(packed, scales, zeros, minima, weight, group_size=group_size)
        y = functional.linear(x, weight, bias)
        if activation is not None:
            return GATED[activation](y)
        return y if residual is None else y.add_(residual)
    same_dtype = scales.dtype == x.dtype and (minima is None or minima.dtype == x.dtype)
    launch = _launch or _choose(x, n, k, n_tokens, same_dtype)
    width = n if activation is None else n // 2
    y = torch.empty((*leading, width), dtype=x.dtype, device=x.device)
    groups = scales.shape[1]
    group = group_size if groups > 1 else 0
    tensors = (x, packed, scales, zeros, minima, bias, residual, y)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    programs = -(-n // launch.block_n)
    if launch.tier == "gemv":
        tile = (group, activation, launch.block_n, GEMV_COLUMNS // 8)
        _gemv((programs,), (*tensors, n, k, groups, *tile), **options)
        return y
    token_tiles = -(-n_tokens // launch.block_m)
    if launch.tier == "many":
        constexprs = (group, k % CHUNK == 0, activation, launch.block_m, launch.block_n)
        grid = (programs * token_tiles,)
        _many(grid, (*tensors, n_tokens, n, k, groups, *constexprs), **options)
        return y
    splits = launch.splits
    partial = of_tile = None
    if splits > 1:
        partial = torch.empty(splits * n_tokens * n, dtype=torch.float32, device=x.device)
        assert programs * token_tiles <= MAX_TICKETS, "splits are for few tiles"
        of_tile = tickets(x.device)
    per_split = triton.cdiv(triton.cdiv(k, CHUNK), splits)
    layer = (n_tokens, n, k, groups, per_split)
    _tiles(
        (programs, splits, token_tiles),
        (
            *(*tensors, partial, of_tile, *layer),
            *(group, k % CHUNK == 0, splits, activation, launch.block_m, launch.block_n),
        ),
        **options,
    )
    return y


def _choose(x: torch.Tensor, n: int, k: int, n_tokens: int, same_dtype: bool) -> Int4Launch:
    if n_tokens == 1 and x.data_ptr() % 4:  # where no pair of x can be read at once
        n_tokens = 2
    shared_memory = shared_memory_of(x.get_device()) if x.is_cuda else 227 * 1024
    return choose_int4_launch(n, k, n_tokens, shared_memory=shared_memory, same_dtype=same_dtype)


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
    _dequantize(
        (-(-n // DEQUANTIZED_ROWS), -(-k // CHUNK)),
        (*tensors, n, k, groups, group, DEQUANTIZED_ROWS),
        num_warps=4,
        num_stages=1,
    )
