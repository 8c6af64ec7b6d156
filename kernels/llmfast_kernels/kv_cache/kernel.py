"""Writes to the paged cache in Triton. Arguments are checked by op.py; here they are taken as good.

The launcher takes the cache's strides as they are, so another order of heads and tokens in a block
is a permuted view; ``cache_offsets`` alone knows how a slot becomes an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ..common.launch import CachedLauncher

MAX_HEAD_DIM = 1024  # one program holds whole rows in registers
_LANE_BYTES = 32  # of keys, and as many of values, in one lane: two loads each
_WARPS = 2


@dataclass(frozen=True)
class Launch:
    """How rows, the heads of a token one after the other, are laid on programs."""

    rows: int  # rows of one program, a power of 2: some heads of a token, or several tokens
    block_d: int  # elements a program holds of each row: head_dim rounded up to a power of 2
    num_warps: int


@cache
def choose_launch(head_dim: int, element_size: int) -> Launch:
    """Pick the launch for rows of ``head_dim`` elements of ``element_size`` bytes. Pure.

    Raises:
        NotImplementedError: head_dim is more than MAX_HEAD_DIM.
    """
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"write_kv: heads of at most {MAX_HEAD_DIM} elements on CUDA, got {head_dim}"
        )
    block_d = triton.next_power_of_2(head_dim)
    warp = 32 * _LANE_BYTES // element_size  # elements of keys that a warp takes at once
    rows = max(_WARPS * warp // block_d, 1)
    return Launch(rows, block_d, num_warps=max(_WARPS, block_d // warp))


@triton.jit
def cache_offsets(slots, heads, stride_block, stride_head, stride_offset, BLOCK_SIZE: tl.constexpr):
    """Where a head's row of a slot begins in the cache; int64, as slots and heads are."""
    return (
        (slots // BLOCK_SIZE) * stride_block
        + heads * stride_head
        + (slots % BLOCK_SIZE) * stride_offset
    )


@triton.jit(do_not_specialize=["n_tokens"])
def _write_kv_kernel(
    k_ptr,  # [n_tokens, N_HEADS, HEAD_DIM]
    v_ptr,  # [n_tokens, N_HEADS, HEAD_DIM]
    k_cache_ptr,  # [n_blocks, N_HEADS, BLOCK_SIZE, HEAD_DIM], written
    v_cache_ptr,  # [n_blocks, N_HEADS, BLOCK_SIZE, HEAD_DIM], written; strides as k_cache's
    slots_ptr,  # [n_tokens], int64
    n_tokens,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_offset,
    N_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int64: a token's or a block's number times its stride passes 2**31; one long division a
    # program, and short ones within it
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows = (first_row % N_HEADS).to(tl.int32) + tl.arange(0, ROWS)
    tokens = first_row // N_HEADS + rows // N_HEADS
    heads = (rows % N_HEADS).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    exists = tokens < n_tokens
    mask = exists[:, None] & (cols < HEAD_DIM)

    # keys and values of skipped tokens are read too: so no load waits for the slot
    slots = tl.load(slots_ptr + tokens, mask=exists, other=-1)
    k_rows = tokens * stride_k_token + heads * stride_k_head
    v_rows = tokens * stride_v_token + heads * stride_v_head
    k = tl.load(k_ptr + k_rows[:, None] + cols, mask=mask)
    v = tl.load(v_ptr + v_rows[:, None] + cols, mask=mask)

    cache_rows = cache_offsets(
        slots, heads, stride_cache_block, stride_cache_head, stride_cache_offset, BLOCK_SIZE
    )
    written = mask & (slots >= 0)[:, None]
    tl.store(k_cache_ptr + cache_rows[:, None] + cols, k, mask=written)
    tl.store(v_cache_ptr + cache_rows[:, None] + cols, v, mask=written)


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
    strides = (*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3])
    constexprs = (n_heads, head_dim, k_cache.shape[2], launch.rows, launch.block_d)
    _write_kv(
        (-(-n_tokens * n_heads // launch.rows),),
        (k, v, k_cache, v_cache, slots, n_tokens, *strides, *constexprs),
        num_warps=launch.num_warps,
    )
