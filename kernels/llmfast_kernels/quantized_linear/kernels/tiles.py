"""The tiles main loop: tensor cores by ``mma.sync``, each group's products scaled in float32.

Runs on any GPU. The weight is the left operand, so that its rows fill the tensor cores however few
tokens there are. The main loops of the two formats stay apart: four bits step through a chunk in
pairs of codes and split columns, eight bits step through one group at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common.launch import CachedLauncher
from ...common.pdl import wait_for_inputs
from ..call import Call
from ..formats import CHUNK
from ..launch import Launch
from ..workspace import tickets
from .epilogue import store_split_tile, store_tile, tile_rows
from .operands import (
    CHUNK_COLUMNS,
    CHUNK_WORDS,
    INT4_MIDDLE,
    PAIR_COLUMNS,
    UNIT_COLUMNS,
    int8_column,
    offset_codes,
    offset_codes8,
    offset_zeros8,
)


@triton.jit(do_not_specialize=["n_tokens", "n", "per_split"])
def int4_tiles_kernel(
    x_ptr,  # [n_tokens, k]
    packed_ptr,  # [n, chunks * 16] words
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 8
    minima_ptr,  # [n, groups], or None; with minima there are no zeros
    bias_ptr,  # [n] or None
    residual_ptr,  # [n_tokens, n] or None
    y_ptr,  # [n_tokens, n], written; with ACT half as wide
    partial_ptr,  # float32 [SPLITS, n_tokens, n], written; None if SPLITS is 1
    tickets_ptr,  # int32, 0 for each tile before and after; None likewise
    n_tokens,
    n,
    k,
    groups,
    per_split,  # chunks of columns
    GROUP: tl.constexpr,  # columns of a group, at most those of a chunk; 0: all columns
    EVEN_K: tl.constexpr,  # k is a multiple of a chunk
    SPLITS: tl.constexpr,
    ACT: tl.constexpr,  # None, or the gate's activation: its rows are the first half
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # triggered early, programs of the next kernel would crowd onto the SMs that finish first
    wait_for_inputs(TRIGGER_DEPENDENTS=False)
    dtype = y_ptr.dtype.element_ty
    offset = 128 if dtype == tl.bfloat16 else 1024
    own, exists = tile_rows(tl.program_id(0), n, BLOCK_N, ACT is not None)
    rows = own.to(tl.int64)  # rows times columns may exceed 2**31; output offsets do not
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    is_token = tokens < n_tokens
    lanes = tl.arange(0, PAIR_COLUMNS)[:, None]
    chunks = tl.cdiv(k, CHUNK_COLUMNS)
    words_ptr = packed_ptr + rows * (chunks * CHUNK_WORDS) + tl.arange(0, CHUNK_WORDS)[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    group_sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    zero = tl.full([BLOCK_N, 1], offset + INT4_MIDDLE, tl.float32).to(dtype)
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
                    group_sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                    if minima_ptr is not None:
                        inputs = tl.zeros([1, BLOCK_M], tl.float32)
                    if zeros_ptr is not None:
                        # past the last group of a row there are no columns, and x is 0
                        at = rows * groups + tl.minimum(group, groups - 1)
                        zero = (tl.load(zeros_ptr + at).to(tl.float32) + offset).to(dtype)
            cols = chunk * CHUNK_COLUMNS + p * PAIR_COLUMNS + lanes
            mask = is_token if EVEN_K else is_token & (cols < k)
            x = tl.load(x_ptr + tokens * k + cols, mask=mask, other=0.0)
            group_sums = tl.dot(offset_codes(words, p, dtype) - zero, x, group_sums)
            # minima are not added to the weights: each is multiplied by the sum of its inputs
            if minima_ptr is not None:
                inputs += tl.sum(x.to(tl.float32), axis=0, keep_dims=True)
            if GROUP > 0:
                if (p + 1) * PAIR_COLUMNS % GROUP == 0:
                    at = rows * groups + tl.minimum(group, groups - 1)
                    sums += tl.load(scales_ptr + at).to(tl.float32) * group_sums
                    if minima_ptr is not None:
                        sums += tl.load(minima_ptr + at).to(tl.float32) * inputs
    if GROUP == 0:
        sums = tl.load(scales_ptr + rows).to(tl.float32) * group_sums
        if minima_ptr is not None:
            sums += tl.load(minima_ptr + rows).to(tl.float32) * inputs
    ticket_ptr = tickets_ptr
    if SPLITS > 1:
        ticket_ptr += tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
    store_split_tile(
        sums, bias_ptr, residual_ptr, y_ptr, tl.program_id(0), own, exists, tokens, n_tokens, n,
        partial_ptr, ticket_ptr, ACT, SPLITS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "n"])
def int8_tiles_kernel(
    x_ptr,  # [n_tokens, k]
    codes_ptr,  # [n, k], padded to whole units
    scales_ptr,  # [n, groups]
    zeros_ptr,  # [n, groups], or None: 128
    bias_ptr,  # [n] or None
    residual_ptr,  # [n_tokens, n] or None
    y_ptr,  # [n_tokens, n], written
    n_tokens,
    n,
    k,
    groups,
    ONE_GROUP: tl.constexpr,  # all columns share a scale; else each BLOCK_K columns
    EVEN_K: tl.constexpr,  # k is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,  # n_tokens or more
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    own, exists = tile_rows(tl.program_id(0), n, BLOCK_N, False)
    rows = own.to(tl.int64)  # rows times columns may exceed 2**31
    tokens = tl.arange(0, BLOCK_M)[None, :]
    is_token = tokens < n_tokens
    lanes = tl.arange(0, BLOCK_K)
    columns = int8_column(lanes)
    filled = tl.cdiv(k, UNIT_COLUMNS) * UNIT_COLUMNS
    row_ptrs = codes_ptr + rows * filled
    at = rows * groups
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    zero = offset_zeros8(zeros_ptr, None, at)
    for start in range(0, k, BLOCK_K):
        places = start + lanes
        x_ptrs = x_ptr + tokens * k + (start + columns)[:, None]  # in the order of the codes
        if EVEN_K:
            x = tl.load(x_ptrs, mask=is_token, other=0.0)
            codes = tl.load(row_ptrs + places[None, :], eviction_policy="evict_first")
        else:
            x = tl.load(x_ptrs, mask=is_token & (start + columns < k)[:, None], other=0.0)
            mask = (places < filled)[None, :]
            codes = tl.load(row_ptrs + places[None, :], mask, 0, eviction_policy="evict_first")
        if ONE_GROUP:
            sums = tl.dot((offset_codes8(codes) - zero).to(dtype), x, sums)
        else:
            of_group = at + start // BLOCK_K
            w = (offset_codes8(codes) - offset_zeros8(zeros_ptr, None, of_group)).to(dtype)
            sums += tl.dot(w, x) * tl.load(scales_ptr + of_group).to(tl.float32)
    if ONE_GROUP:
        sums *= tl.load(scales_ptr + at).to(tl.float32)
    store_tile(
        sums, bias_ptr, residual_ptr, y_ptr, tl.program_id(0), own, exists, tokens, n_tokens, n,
        None,
    )  # fmt: skip


_int4_tiles, _int8_tiles = (
    CachedLauncher(kernel, pdl=True) for kernel in (int4_tiles_kernel, int8_tiles_kernel)
)


def launch_tiles(call: Call, y: torch.Tensor, launch: Launch) -> None:
    """Compute ``y`` in tiles. With int8 a tile holds all tokens, without minima or activation."""
    if call.fmt.bits == 8 and not (call.minima is None and call.activation is None):
        raise ValueError("int8_linear: tiles take no minima and no activation")
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    programs = -(-call.n // launch.block_n)
    even_k, blocks = call.k % launch.block_k == 0, (launch.block_m, launch.block_n)
    if call.fmt.bits == 8:
        tensors = (call.x, call.packed, call.scales, call.zeros, call.bias, call.residual, y)
        sizes = (call.tokens, call.n, call.k, call.groups)
        constexprs = (call.groups == 1, even_k, *blocks, launch.block_k)
        _int8_tiles((programs,), (*tensors, *sizes, *constexprs), **options)
        return
    splits, token_tiles = launch.splits, -(-call.tokens // launch.block_m)
    partial = ticket = None
    if splits > 1:
        size = splits * call.tokens * call.n
        partial = torch.empty(size, dtype=torch.float32, device=call.x.device)
        ticket = tickets(call.x.device, programs * token_tiles)
    per_split = triton.cdiv(triton.cdiv(call.k, CHUNK), splits)
    _int4_tiles(
        (programs, splits, token_tiles),
        (
            call.x, call.packed, call.scales, call.zeros, call.minima, call.bias, call.residual, y,
            partial, ticket, call.tokens, call.n, call.k, call.groups, per_split,
            call.group, even_k, splits, call.activation, *blocks,
        ),
        **options,
    )  # fmt: skip
