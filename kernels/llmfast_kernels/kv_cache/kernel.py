"""Writes to the paged cache in Triton. op.py checks the arguments; here they are trusted.

The launcher takes the cache's strides as they are, so another order of heads and tokens in a block
is a permuted view. Only :func:`cache_offsets` knows how a slot becomes an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import CachedLauncher

MAX_HEAD_DIM = 1024  # one program holds whole rows in registers
_LANE_BYTES = 32  # bytes of keys per lane, and as many of values: two loads each
_WARPS = 2


@dataclass(frozen=True)
class Launch:
    """The division of rows into programs. Rows are the heads of one token after the other."""

    rows: int  # rows per program, a power of 2: some heads of a token, or several tokens
    block_d: int  # elements per row: head_dim rounded up to a power of 2
    num_warps: int


@cache
def choose_launch(head_dim: int, element_size: int) -> Launch:
    """Choose the launch for rows of ``head_dim`` elements of ``element_size`` bytes. Pure.

    Raises:
        NotImplementedError: head_dim is more than MAX_HEAD_DIM.
    """
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"write_kv: heads of at most {MAX_HEAD_DIM} elements on CUDA, got {head_dim}"
        )
    block_d = triton.next_power_of_2(head_dim)
    warp = 32 * _LANE_BYTES // element_size  # elements of keys that a warp holds
    rows = max(_WARPS * warp // block_d, 1)
    return Launch(rows, block_d, num_warps=max(_WARPS, block_d // warp))


class TokenHeads(NamedTuple):
    """The heads of a step's tokens: ``[n_tokens, n_heads, head_dim]`` with a last stride of 1."""

    ptr: Any
    stride_token: Any  # in elements, as all strides
    stride_head: Any


class Cache(NamedTuple):
    """One layer's paged cache: keys and values ``[n_blocks, n_heads, block_size, head_dim]``."""

    k_ptr: Any  # written
    v_ptr: Any  # written; its strides are k's
    stride_block: Any
    stride_head: Any
    stride_offset: Any  # from token to token within a block


@triton.jit
def cache_offsets(slots, heads, stride_block, stride_head, stride_offset, BLOCK_SIZE: tl.constexpr):
    """Return the offset of a head's row in the cache; int64, as slots and heads are."""
    return (
        (slots // BLOCK_SIZE) * stride_block
        + heads * stride_head
        + (slots % BLOCK_SIZE) * stride_offset
    )


@triton.jit(do_not_specialize=["n_tokens"])
def _write_kv_kernel(
    k: TokenHeads,
    v: TokenHeads,
    cache: Cache,
    slots_ptr,  # [n_tokens], int64
    n_tokens,
    N_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy ROWS heads of keys and of values into their tokens' slots."""
    # int64: a token's or a block's number times its stride passes 2**31. There is one 64-bit
    # division per program, and 32-bit ones within it
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows = (first_row % N_HEADS).to(tl.int32) + tl.arange(0, ROWS)
    tokens = first_row // N_HEADS + rows // N_HEADS
    heads = (rows % N_HEADS).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    exists = tokens < n_tokens
    mask = exists[:, None] & (cols < HEAD_DIM)

    # keys and values of skipped tokens are read too, so that no load waits for the slot
    slots = tl.load(slots_ptr + tokens, mask=exists, other=-1)
    k_rows = tokens * k.stride_token + heads * k.stride_head
    v_rows = tokens * v.stride_token + heads * v.stride_head
    keys = tl.load(k.ptr + k_rows[:, None] + cols, mask=mask)
    values = tl.load(v.ptr + v_rows[:, None] + cols, mask=mask)

    cache_rows = cache_offsets(
        slots, heads, cache.stride_block, cache.stride_head, cache.stride_offset, BLOCK_SIZE
    )
    written = mask & (slots >= 0)[:, None]
    tl.store(cache.k_ptr + cache_rows[:, None] + cols, keys, mask=written)
    tl.store(cache.v_ptr + cache_rows[:, None] + cols, values, mask=written)


_write_kv = CachedLauncher(_write_kv_kernel)


def launch_write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    n_tokens, n_heads, head_dim = k.shape
    launch = choose_launch(head_dim, k.element_size())
    constexprs = (n_heads, head_dim, k_cache.shape[2], launch.rows, launch.block_d)
    _write_kv(
        (-(-n_tokens * n_heads // launch.rows),),
        (
            *(TokenHeads(k, *k.stride()[:2]), TokenHeads(v, *v.stride()[:2])),
            *(Cache(k_cache, v_cache, *k_cache.stride()[:3]), slots, n_tokens, *constexprs),
        ),
        num_warps=launch.num_warps,
    )
