"""Rotary position embedding in Triton. Arguments, checked by op.py, are here taken as good."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ..relaunch import ALIGNMENT, Relaunch, aligned

MAX_HEAD_DIM = 4096  # one program holds a whole head in registers
_TILE = 1024  # elements of a program
_FEW_TOKENS = 128  # up to here a GPU is not filled, and one program's latency is what counts
_MAX_GRID_Y = 65535


@dataclass(frozen=True)
class Launch:
    """How the heads of one token are cut into programs; none takes heads of both q and k."""

    block_h: int  # heads of one program, a power of 2
    block_r: int  # pairs a program holds of each head: rounded up to a power of 2
    block_p: int  # elements behind the pairs, to be copied: rounded up to a power of 2, or 0
    num_warps: int


@cache
def choose_launch(n_heads: int, head_dim: int, rotary_dim: int, few_tokens: bool = False) -> Launch:
    """Pick the launch for tokens of ``n_heads`` heads, the more of q's and k's. Pure: it
    asks no device.

    ``few_tokens`` says that the tokens do not fill a GPU, as in decoding.

    Raises:
        NotImplementedError: head_dim is more than MAX_HEAD_DIM.
    """
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"apply_rope: at most {MAX_HEAD_DIM} elements a head on CUDA, got {head_dim}"
        )
    width = triton.next_power_of_2(head_dim)
    tile = _TILE // 2 if few_tokens else _TILE
    block_h = max(min(tile // width, triton.next_power_of_2(n_heads)), 1)
    # many tokens: 16 elements a lane, so a load of 16 bytes of each half in half precision
    num_warps = block_h * width // (128 if few_tokens else 512)
    rest = head_dim - rotary_dim
    return Launch(
        block_h,
        block_r=triton.next_power_of_2(rotary_dim // 2),
        block_p=triton.next_power_of_2(rest) if rest else 0,
        num_warps=min(max(num_warps, 1), 8),
    )


@triton.jit
def _rope_kernel(
    q_ptr,  # [n_tokens, Q_HEADS, HEAD_DIM], any strides of tokens and heads
    k_ptr,  # [n_tokens, KV_HEADS, HEAD_DIM], any strides of tokens and heads
    cos_ptr,  # [max_positions, HALF]
    sin_ptr,  # [max_positions, HALF]
    positions_ptr,  # [n_tokens]
    q_out_ptr,  # [n_tokens, Q_HEADS, HEAD_DIM] contiguous, written
    k_out_ptr,  # [n_tokens, KV_HEADS, HEAD_DIM] contiguous, written
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
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
    # int64: tokens times heads times head_dim passes 2**31 for a long prefill
    token = tl.program_id(0 if MANY_TOKENS else 1).to(tl.int64)
    block = tl.program_id(1 if MANY_TOKENS else 0)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    # first of all, because the tables wait for it
    row = tl.load(positions_ptr + token).to(tl.int64) * HALF

    if block < q_blocks:
        _rotate_heads(
            q_ptr + token * stride_q_token,
            stride_q_head,
            q_out_ptr + token * (Q_HEADS * HEAD_DIM),
            cos_ptr + row,
            sin_ptr + row,
            block,
            Q_HEADS,
            HEAD_DIM,
            HALF,
            INTERLEAVED,
            BLOCK_H,
            BLOCK_R,
            BLOCK_P,
        )
    else:
        _rotate_heads(
            k_ptr + token * stride_k_token,
            stride_k_head,
            k_out_ptr + token * (KV_HEADS * HEAD_DIM),
            cos_ptr + row,
            sin_ptr + row,
            block - q_blocks,
            KV_HEADS,
            HEAD_DIM,
            HALF,
            INTERLEAVED,
            BLOCK_H,
            BLOCK_R,
            BLOCK_P,
        )


@triton.jit
def _rotate_heads(
    x_ptr,  # [N_HEADS, HEAD_DIM] of one token
    stride_head,
    out_ptr,  # [N_HEADS, HEAD_DIM] contiguous, written
    cos_ptr,  # [HALF] of the token's position
    sin_ptr,  # [HALF]
    block,
    N_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    heads = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    head_mask = heads < N_HEADS
    x_ptrs = x_ptr + heads.to(tl.int64) * stride_head  # heads may be the farthest axis
    out_ptrs = out_ptr + heads * HEAD_DIM

    pairs = tl.arange(0, BLOCK_R)[None, :]
    mask = head_mask & (pairs < HALF)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_R)[None, :]
        col_mask = head_mask & (cols < 2 * HALF)
        x = tl.load(x_ptrs + cols, mask=col_mask, other=0.0)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_R, 2)))
    else:
        a = tl.load(x_ptrs + pairs, mask=mask, other=0.0)
        b = tl.load(x_ptrs + HALF + pairs, mask=mask, other=0.0)
    if BLOCK_P > 0:
        rest = 2 * HALF + tl.arange(0, BLOCK_P)[None, :]
        rest_mask = head_mask & (rest < HEAD_DIM)
        tl.store(out_ptrs + rest, tl.load(x_ptrs + rest, mask=rest_mask), mask=rest_mask)
    # each lane loads what it multiplies with: a row shared out would pass through shared memory
    table = tl.broadcast_to(pairs, (BLOCK_H, BLOCK_R))
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)

    a, b = a.to(tl.float32), b.to(tl.float32)
    a_cos, b_sin, b_cos, a_sin = a * cos, b * sin, b * cos, a * sin
    if cos_ptr.dtype.element_ty == dtype:  # else the tables are float32, and all is until the end
        a_cos, b_sin = a_cos.to(dtype).to(tl.float32), b_sin.to(dtype).to(tl.float32)
        b_cos, a_sin = b_cos.to(dtype).to(tl.float32), a_sin.to(dtype).to(tl.float32)
    a, b = (a_cos - b_sin).to(dtype), (b_cos + a_sin).to(dtype)

    if INTERLEAVED:
        x = tl.reshape(tl.join(a, b), (BLOCK_H, 2 * BLOCK_R))
        tl.store(out_ptrs + cols, x, mask=col_mask)
    else:
        tl.store(out_ptrs + pairs, a, mask=mask)
        tl.store(out_ptrs + HALF + pairs, b, mask=mask)


_rope = Relaunch(_rope_kernel)


def launch_apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.device):  # Triton launches on the current device
            return launch_apply_rope(q, k, cos, sin, positions, interleaved=interleaved)
    n_tokens, q_heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    launch = choose_launch(max(q_heads, kv_heads), head_dim, 2 * half, n_tokens <= _FEW_TOKENS)
    block_h = launch.block_h
    blocks = -(-q_heads // block_h) - (-kv_heads // block_h)
    many = n_tokens > _MAX_GRID_Y
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    constexprs = (
        *(q_heads, kv_heads, head_dim, half, interleaved, many),
        *(block_h, launch.block_r, launch.block_p),
    )
    key = None
    if aligned(q, k, cos, sin, positions):
        # strides that are all multiples of 16 and int32 are compiled alike, whatever they are
        alike = not any(s % ALIGNMENT or s >= 2**31 for s in strides)
        dtypes = (q.dtype, cos.dtype, positions.dtype)
        number = () if alike else strides
        key = (q.get_device(), *dtypes, launch.num_warps, *constexprs, *number)
    _rope(
        (n_tokens, blocks) if many else (blocks, n_tokens),
        key,
        (q, k, cos, sin, positions, q_out, k_out, *strides, *constexprs),
        num_warps=launch.num_warps,
        enable_fp_fusion=False,  # fused with the sum, a product would not be rounded
    )
    return q_out, k_out
