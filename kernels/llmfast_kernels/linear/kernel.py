"""Linear layers for few tokens in Triton. Arguments are checked by op.py; here they are good.

Every weight is read once and all other tensors are small, so that reading the weights takes the
time. A program takes whole rows of the weight: nothing is added up between programs, and the same
input gives the same bits.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch.nn import functional

from ..activation.kernel import activate, launch_gelu_mul, launch_gelu_tanh_mul, launch_silu_mul
from ..common.device import Device, device_of
from ..common.launch import CachedLauncher
from ..common.options import current_options
from ..common.pdl import prefetch_rows, wait_for_inputs
from .launch import MAX_TOKENS, VENDOR, Launch, block_m, choose_launch, prefetch_cols
from .launch_tables import table_of

GATED = {
    "silu": launch_silu_mul,
    "gelu_tanh": launch_gelu_tanh_mul,
    "gelu": launch_gelu_mul,
}


@triton.jit
def round_sums(sums, bias_ptr, rows, dtype: tl.constexpr):
    """Add the bias of weight ``rows`` to float32 sums, round to ``dtype``, and return float32."""
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + rows).to(tl.float32)
    return sums.to(dtype).to(tl.float32)


@triton.jit
def gated(gate, up, ACT: tl.constexpr, dtype: tl.constexpr):
    """Return the activated gate, rounded to ``dtype``, times up; all are float32."""
    return activate(gate, ACT).to(dtype).to(tl.float32) * up


@triton.jit(do_not_specialize=["n"])
def _gemv_kernel(
    x_ptr,  # [k]
    weight_ptr,  # [n, k]; with ACT [2 * n, k], the gate's rows first
    bias_ptr,  # [n], with ACT [2 * n]; None if absent
    residual_ptr,  # [n] or None
    y_ptr,  # [n], written
    n,
    k,
    ACT: tl.constexpr,  # None, or the gate's activation
    EVEN_K: tl.constexpr,  # k is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait_for_inputs()
    dtype = y_ptr.dtype.element_ty
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(out, n - 1).to(tl.int64)  # rows times columns may exceed 2**31
    lanes = tl.arange(0, BLOCK_K)
    row_ptrs = weight_ptr + rows[:, None] * k
    n_times_k = n.to(tl.int64) * k
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, k, BLOCK_K):
        cols = start + lanes
        if EVEN_K:
            x = tl.load(x_ptr + cols).to(tl.float32)
            w = tl.load(row_ptrs + cols[None, :], eviction_policy="evict_first")
        else:
            x = tl.load(x_ptr + cols, mask=cols < k, other=0.0).to(tl.float32)
            mask = (cols < k)[None, :]
            w = tl.load(row_ptrs + cols[None, :], mask, 0.0, eviction_policy="evict_first")
        sums += w.to(tl.float32) * x[None, :]
        if ACT is not None:
            up_ptrs = row_ptrs + n_times_k + cols[None, :]
            if EVEN_K:
                u = tl.load(up_ptrs, eviction_policy="evict_first")
            else:
                u = tl.load(up_ptrs, mask, 0.0, eviction_policy="evict_first")
            up_sums += u.to(tl.float32) * x[None, :]
    y = round_sums(tl.sum(sums, 1), bias_ptr, rows, dtype)
    if ACT is not None:
        up = round_sums(tl.sum(up_sums, 1), bias_ptr, rows + n, dtype)
        y = gated(y, up, ACT, dtype)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows).to(tl.float32)
    tl.store(y_ptr + out, y.to(dtype), mask=out < n)


@triton.jit(do_not_specialize=["n_tokens", "n"])
def _tiles_kernel(
    x_ptr,  # [n_tokens, k]
    weight_ptr,  # [n, k]; with ACT [2 * n, k], the gate's rows first
    bias_ptr,  # [n], with ACT [2 * n]; None if absent
    residual_ptr,  # [n_tokens, n] or None
    y_ptr,  # [n_tokens, n], written
    n_tokens,
    n,
    k,
    ACT: tl.constexpr,  # None, or the gate's activation
    EVEN_K: tl.constexpr,  # k is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,  # n_tokens or more
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,  # columns of each row that are prefetched before x is ready
):
    dtype = y_ptr.dtype.element_ty
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    rows = tl.minimum(out, n - 1).to(tl.int64)  # rows times columns may exceed 2**31
    tokens = tl.arange(0, BLOCK_M)[None, :]
    is_token = tokens < n_tokens
    lanes = tl.arange(0, BLOCK_K)
    row_ptrs = weight_ptr + rows * k
    n_times_k = n.to(tl.int64) * k
    prefetch_rows(row_ptrs, k, PREFETCH)
    if ACT is not None:
        prefetch_rows(row_ptrs + n_times_k, k, PREFETCH)
    wait_for_inputs()
    # the weight is the left operand: its rows fill the tensor cores however few tokens there are
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, k, BLOCK_K):
        cols = start + lanes
        weight_ptrs = row_ptrs + cols[None, :]
        x_ptrs = x_ptr + tokens * k + cols[:, None]
        if EVEN_K:
            x = tl.load(x_ptrs, mask=is_token, other=0.0)
            w = tl.load(weight_ptrs, eviction_policy="evict_first")
        else:
            x = tl.load(x_ptrs, mask=is_token & (cols < k)[:, None], other=0.0)
            mask = (cols < k)[None, :]
            w = tl.load(weight_ptrs, mask, 0.0, eviction_policy="evict_first")
        sums = tl.dot(w, x, sums)
        if ACT is not None:
            if EVEN_K:
                u = tl.load(weight_ptrs + n_times_k, eviction_policy="evict_first")
            else:
                u = tl.load(weight_ptrs + n_times_k, mask, 0.0, eviction_policy="evict_first")
            up_sums = tl.dot(u, x, up_sums)
    y = round_sums(sums, bias_ptr, rows, dtype)
    if ACT is not None:
        up = round_sums(up_sums, bias_ptr, rows + n, dtype)
        y = gated(y, up, ACT, dtype)
    at = tokens * n + rows
    mask = is_token & (out < n)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(dtype), mask=mask)


_gemv, _tiles = (CachedLauncher(kernel, pdl=True) for kernel in (_gemv_kernel, _tiles_kernel))


def launch_dense_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """Run :func:`~.op.dense_linear`; ``launch`` overrides the choice."""
    return _run(None, x, weight, bias, residual, launch)


def launch_gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    launch: Launch | None = None,
) -> torch.Tensor:
    """Run :func:`~.op.gated_linear`; ``launch`` overrides the choice."""
    return _run(activation, x, weight, bias, None, launch)


def _run(
    act: str | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    launch: Launch | None,
) -> torch.Tensor:
    *leading, k = x.shape
    n = len(weight) if act is None else len(weight) // 2
    n_tokens, device = x.numel() // k, device_of(x)
    operation = "dense_linear" if act is None else "gated_linear"
    if launch is None:
        launch = VENDOR[operation]
        if x.element_size() == 2 and 0 < n_tokens <= MAX_TOKENS:
            if not current_options().library_linear:
                launch = _choose(operation, n, k, n_tokens, device)
    if launch.tier == "unfused":
        assert act is not None
        return GATED[act](launch_dense_linear(x, weight, bias))
    if launch.tier == "cublas":
        y = functional.linear(x, weight, bias)
        return y if residual is None else y.add_(residual)
    y = torch.empty((*leading, n), dtype=x.dtype, device=x.device)
    tensors = (x, weight, bias, residual, y)
    even_k = k % launch.block_k == 0
    grid = (-(-n // launch.block_n),)
    tile = (launch.block_n, launch.block_k)
    if launch.tier == "gemv":
        constexprs = (act, even_k, *tile)
        _gemv(grid, (*tensors, n, k, *constexprs), num_warps=launch.num_warps)
    else:
        prefetch = prefetch_cols(n_tokens, device)
        _tiles(
            grid,
            (*tensors, n_tokens, n, k, act, even_k, block_m(n_tokens), *tile, prefetch),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return y


@cache
def _choose(operation: str, n: int, k: int, tokens: int, device: Device) -> Launch:
    table = None if device.interpreted else table_of(device)
    return choose_launch(operation, n, k, tokens, device, table)
