"""Rotary position embedding in Triton. op.py checks the arguments; here they are trusted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import CachedLauncher
from ..common.pdl import wait_for_inputs
from ..kv_cache.kernel import Cache, TokenHeads, cache_offsets
from ..norm.kernel import inverse_rms, scale

MAX_HEAD_DIM = 4096  # one program holds a whole head in registers
_TILE = 1024  # elements per program
_FEW_TOKENS = 128  # up to here a GPU is not filled, and the latency of one program decides
_MAX_GRID_Y = 65535


@dataclass(frozen=True)
class Launch:
    """The division of one token's heads into programs; no program takes heads of two tensors."""

    block_h: int  # heads per program, a power of 2
    block_r: int  # pairs per head, rounded up to a power of 2; or 0
    block_p: int  # elements behind the pairs, which are copied, rounded up to a power of 2; or 0
    num_warps: int


@cache
def choose_launch(
    n_heads: int, head_dim: int, rotary_dim: int, few_tokens: bool = False, norm: bool = False
) -> Launch:
    """Choose the launch. Pure: it asks no device.

    Args:
        n_heads: the larger number of q's and k's heads.
        few_tokens: the tokens do not fill a GPU, as in decoding.
        norm: heads are normalised too.

    Raises:
        NotImplementedError: head_dim is more than MAX_HEAD_DIM.
    """
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"rope: at most {MAX_HEAD_DIM} elements a head on CUDA, got {head_dim}"
        )
    width = triton.next_power_of_2(head_dim)
    tile = _TILE // 2 if few_tokens else _TILE
    heads = triton.next_power_of_2(n_heads)
    if norm:
        # 8 elements per lane: then a lane has the same heads in the whole tile as in its halves,
        # and a head's sum is taken in rms_norm's order
        per_warp = 256
        heads = max(heads, per_warp // width)
    else:
        # many tokens: 16, so a load of 16 bytes of each half in half precision
        per_warp = 128 if few_tokens else 512
    block_h = max(min(tile // width, heads), 1)
    rest = head_dim - rotary_dim
    return Launch(
        block_h,
        block_r=triton.next_power_of_2(rotary_dim // 2) if rotary_dim else 0,
        block_p=triton.next_power_of_2(rest) if rest else 0,
        num_warps=min(max(block_h * width // per_warp, 1), 8),
    )


class Rotation(NamedTuple):
    """The rotary tables and where each token reads them; all None if nothing is rotated."""

    cos_ptr: Any  # [max_positions, HALF]
    sin_ptr: Any  # [max_positions, HALF]
    positions_ptr: Any  # [n_tokens], int32 or int64


class HeadNorms(NamedTuple):
    """The RMS norms of queries and keys; both weights None if there are none."""

    q_ptr: Any  # [HEAD_DIM]
    k_ptr: Any  # [HEAD_DIM]
    eps: Any  # a float: Triton would compile an integer into another variant


class Target(NamedTuple):
    """Where one token's heads are written: a contiguous row, or a slot of the paged cache."""

    ptr: Any
    stride_head: Any
    slot_ptr: Any = None  # [1], int64, the token's slot; None: ptr is no cache
    stride_block: Any = None  # of a cache
    stride_offset: Any = None


@triton.jit
def _rope_kernel(
    q: TokenHeads,
    k: TokenHeads,
    rotation: Rotation,
    q_out_ptr,  # [n_tokens, Q_HEADS, HEAD_DIM] contiguous, written
    k_out_ptr,  # [n_tokens, KV_HEADS, HEAD_DIM] contiguous, written
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim // 2
    INTERLEAVED: tl.constexpr,
    MANY_TOKENS: tl.constexpr,  # more than the grid's second axis takes: they go on the first
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Rotate BLOCK_H heads of one token's queries or keys."""
    wait_for_inputs()
    # int64: tokens times heads times head_dim passes 2**31 for a long prefill
    token = tl.program_id(0 if MANY_TOKENS else 1).to(tl.int64)
    block = tl.program_id(1 if MANY_TOKENS else 0)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    position = tl.load(rotation.positions_ptr + token)  # first of all: the tables wait for it

    if block < q_blocks:
        _write_heads(
            q.ptr + token * q.stride_token, q.stride_head,
            Target(q_out_ptr + token * (Q_HEADS * HEAD_DIM), HEAD_DIM),
            rotation, position, None, None, block,
            Q_HEADS, HEAD_DIM, HALF, INTERLEAVED, False, BLOCK_H, BLOCK_R, BLOCK_P, 0, 0,
        )  # fmt: skip
    else:
        _write_heads(
            k.ptr + token * k.stride_token, k.stride_head,
            Target(k_out_ptr + token * (KV_HEADS * HEAD_DIM), HEAD_DIM),
            rotation, position, None, None, block - q_blocks,
            KV_HEADS, HEAD_DIM, HALF, INTERLEAVED, False, BLOCK_H, BLOCK_R, BLOCK_P, 0, 0,
        )  # fmt: skip


@triton.jit
def _rope_write_kv_kernel(
    q: TokenHeads,
    k: TokenHeads,
    v: TokenHeads,
    rotation: Rotation,
    norms: HeadNorms,
    cache: Cache,
    slots_ptr,  # [n_tokens], int64
    q_out_ptr,  # [n_tokens, Q_HEADS, HEAD_DIM] contiguous, written
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim // 2; 0: nothing is rotated
    BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    MANY_TOKENS: tl.constexpr,  # as in _rope_kernel
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM rounded up to a power of 2
):
    """Normalise and rotate BLOCK_H heads of one token's q or k, or copy heads of its v."""
    wait_for_inputs()
    token = tl.program_id(0 if MANY_TOKENS else 1).to(tl.int64)
    block = tl.program_id(1 if MANY_TOKENS else 0)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    position = tl.load(rotation.positions_ptr + token) if HALF > 0 else None
    slot_ptr = slots_ptr + token

    if block < q_blocks:
        _write_heads(
            q.ptr + token * q.stride_token, q.stride_head,
            Target(q_out_ptr + token * (Q_HEADS * HEAD_DIM), HEAD_DIM),
            rotation, position, norms.q_ptr, norms.eps, block,
            Q_HEADS, HEAD_DIM, HALF, INTERLEAVED, UNIT_OFFSET,
            BLOCK_H, BLOCK_R, BLOCK_P, BLOCK_D, BLOCK_SIZE,
        )  # fmt: skip
    elif block < q_blocks + kv_blocks:
        _write_heads(
            k.ptr + token * k.stride_token, k.stride_head,
            Target(
                cache.k_ptr, cache.stride_head, slot_ptr, cache.stride_block, cache.stride_offset
            ),
            rotation, position, norms.k_ptr, norms.eps, block - q_blocks,
            KV_HEADS, HEAD_DIM, HALF, INTERLEAVED, UNIT_OFFSET,
            BLOCK_H, BLOCK_R, BLOCK_P, BLOCK_D, BLOCK_SIZE,
        )  # fmt: skip
    else:
        _write_heads(
            v.ptr + token * v.stride_token, v.stride_head,
            Target(
                cache.v_ptr, cache.stride_head, slot_ptr, cache.stride_block, cache.stride_offset
            ),
            Rotation(None, None, None), None, None, None, block - q_blocks - kv_blocks,
            KV_HEADS, HEAD_DIM, 0, False, False,
            BLOCK_H, 0, BLOCK_D, BLOCK_D, BLOCK_SIZE,
        )  # fmt: skip


@triton.jit
def _write_heads(
    x_ptr,  # [N_HEADS, HEAD_DIM] of one token
    stride_head,
    target: Target,
    rotation: Rotation,
    position,  # of the token
    weight_ptr,  # [HEAD_DIM] of the norm, or None: no norm
    eps,
    block,
    N_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # 0: nothing is rotated
    INTERLEAVED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM rounded up to a power of 2
    BLOCK_SIZE: tl.constexpr,  # of a cache
):
    """Normalise, rotate and store BLOCK_H heads; each step only if it is asked for.

    The heads are loaded before anything waits for the token's position or slot.
    """
    dtype = target.ptr.dtype.element_ty
    heads = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    head_mask = heads < N_HEADS
    x_ptrs = x_ptr + heads.to(tl.int64) * stride_head  # heads may be the farthest axis

    if weight_ptr is not None:  # loaded first: its sum then moves to the halves' lanes, not they
        cols = tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(x_ptrs + cols, mask=head_mask & (cols < HEAD_DIM), other=0.0)
    if HALF > 0:
        a, b = _load_pairs(x_ptrs, head_mask, HALF, INTERLEAVED, BLOCK_H, BLOCK_R)
    if BLOCK_P > 0:
        rest = 2 * HALF + tl.arange(0, BLOCK_P)[None, :]
        rest_mask = head_mask & (rest < HEAD_DIM)
        copied = tl.load(x_ptrs + rest, mask=rest_mask, other=0.0)
    if weight_ptr is not None:
        weight_ptrs = weight_ptr + heads * 0
        if HALF > 0:
            a_weight, b_weight = _load_pairs(
                weight_ptrs, head_mask, HALF, INTERLEAVED, BLOCK_H, BLOCK_R
            )
        if BLOCK_P > 0:
            weight = tl.load(weight_ptrs + rest, mask=rest_mask, other=0.0)
    if target.slot_ptr is None:
        written = head_mask
        out_ptrs = target.ptr + heads.to(tl.int64) * target.stride_head
    else:
        slot = tl.load(target.slot_ptr)
        written = heads < tl.where(slot >= 0, N_HEADS, 0)
        out_ptrs = target.ptr + cache_offsets(
            slot,
            heads.to(tl.int64),
            target.stride_block,
            target.stride_head,
            target.stride_offset,
            BLOCK_SIZE,
        )
    if HALF > 0:
        # each lane loads its own factors: one row for all would pass through shared memory
        pairs = tl.broadcast_to(tl.arange(0, BLOCK_R)[None, :], (BLOCK_H, BLOCK_R))
        pair_mask = head_mask & (pairs < HALF)
        row = position.to(tl.int64) * HALF
        cos = tl.load(rotation.cos_ptr + row + pairs, mask=pair_mask, other=0.0).to(tl.float32)
        sin = tl.load(rotation.sin_ptr + row + pairs, mask=pair_mask, other=0.0).to(tl.float32)

    if weight_ptr is not None:
        rms = inverse_rms(x.to(tl.float32), HEAD_DIM, eps)
        if HALF > 0:
            a = scale(a.to(tl.float32) * rms, a_weight, dtype, UNIT_OFFSET)
            b = scale(b.to(tl.float32) * rms, b_weight, dtype, UNIT_OFFSET)
        if BLOCK_P > 0:
            copied = scale(copied.to(tl.float32) * rms, weight, dtype, UNIT_OFFSET)
    if BLOCK_P > 0:
        tl.store(out_ptrs + rest, copied, mask=rest_mask & written)
    if HALF > 0:
        a, b = a.to(tl.float32), b.to(tl.float32)
        a_cos, b_sin, b_cos, a_sin = a * cos, b * sin, b * cos, a * sin
        # else the tables are float32, and all is computed in float32 until the end
        if rotation.cos_ptr.dtype.element_ty == dtype:
            a_cos, b_sin = a_cos.to(dtype).to(tl.float32), b_sin.to(dtype).to(tl.float32)
            b_cos, a_sin = b_cos.to(dtype).to(tl.float32), a_sin.to(dtype).to(tl.float32)
        a, b = (a_cos - b_sin).to(dtype), (b_cos + a_sin).to(dtype)
        if INTERLEAVED:
            turned = tl.arange(0, 2 * BLOCK_R)[None, :]
            turned_mask = head_mask & (turned < 2 * HALF) & written
            joined = tl.reshape(tl.join(a, b), (BLOCK_H, 2 * BLOCK_R))
            tl.store(out_ptrs + turned, joined, mask=turned_mask)
        else:
            pair_mask = pair_mask & written
            tl.store(out_ptrs + pairs, a, mask=pair_mask)
            tl.store(out_ptrs + HALF + pairs, b, mask=pair_mask)


@triton.jit
def _load_pairs(
    ptrs,  # [BLOCK_H, 1], of the heads
    head_mask,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Load both elements of each pair, each [BLOCK_H, BLOCK_R]."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_R)[None, :]
        x = tl.load(ptrs + cols, mask=head_mask & (cols < 2 * HALF), other=0.0)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_R, 2)))
    else:
        pairs = tl.arange(0, BLOCK_R)[None, :]
        mask = head_mask & (pairs < HALF)
        a = tl.load(ptrs + pairs, mask=mask, other=0.0)
        b = tl.load(ptrs + HALF + pairs, mask=mask, other=0.0)
    return a, b


_rope = CachedLauncher(_rope_kernel, pdl=True)


def launch_apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    n_tokens, q_heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    launch = choose_launch(max(q_heads, kv_heads), head_dim, 2 * half, n_tokens <= _FEW_TOKENS)
    block_h = launch.block_h
    blocks = -(-q_heads // block_h) - (-kv_heads // block_h)
    many = n_tokens > _MAX_GRID_Y
    constexprs = (
        *(q_heads, kv_heads, head_dim, half, interleaved, many),
        *(block_h, launch.block_r, launch.block_p),
    )
    _rope(
        (n_tokens, blocks) if many else (blocks, n_tokens),
        (
            *(TokenHeads(q, *q.stride()[:2]), TokenHeads(k, *k.stride()[:2])),
            *(Rotation(cos, sin, positions), q_out, k_out, *constexprs),
        ),
        num_warps=launch.num_warps,
        enable_fp_fusion=False,  # fused with the sum, a product would not be rounded
    )
    return q_out, k_out


_rope_write_kv = CachedLauncher(_rope_write_kv_kernel, pdl=True)


def launch_rope_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
) -> torch.Tensor:
    """Launch the operation. The caches may have any strides, v_cache those of k_cache."""
    n_tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if cos is None:
        positions = None
    half = 0 if cos is None else cos.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch = choose_launch(
        max(q_heads, kv_heads), head_dim, 2 * half, n_tokens <= _FEW_TOKENS, q_norm is not None
    )
    block_h = launch.block_h
    blocks = -(-q_heads // block_h) - 2 * (-kv_heads // block_h)
    many = n_tokens > _MAX_GRID_Y
    constexprs = (
        *(q_heads, kv_heads, head_dim, half, k_cache.shape[2], interleaved, unit_offset, many),
        *(block_h, launch.block_r, launch.block_p, triton.next_power_of_2(head_dim)),
    )
    _rope_write_kv(
        (n_tokens, blocks) if many else (blocks, n_tokens),
        (
            TokenHeads(q, *q.stride()[:2]),
            TokenHeads(k, *k.stride()[:2]),
            TokenHeads(v, *v.stride()[:2]),
            *(Rotation(cos, sin, positions), HeadNorms(q_norm, k_norm, float(eps))),
            *(Cache(k_cache, v_cache, *k_cache.stride()[:3]), slots, q_out, *constexprs),
        ),
        num_warps=launch.num_warps,
        enable_fp_fusion=False,  # as in launch_apply_rope
    )
    return q_out
