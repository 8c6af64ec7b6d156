"""Gated activations in Triton. op.py checks the arguments; here they are trusted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ..common.checks import row_stride
from ..common.launch import CachedLauncher
from ..common.pdl import wait_for_inputs

MAX_TILE = 512  # elements per program
_MAX_GRID_Y = 65535


@dataclass(frozen=True)
class Launch:
    """The division of one row into programs."""

    block_n: int  # elements per program
    num_warps: int


@cache
def choose_launch(n_cols: int) -> Launch:
    """Choose the launch for rows of ``n_cols`` products. Pure: it asks no device."""
    block_n = min(triton.next_power_of_2(n_cols), MAX_TILE)
    # 4 elements per lane: one row takes less time than with 8, and many rows no more (H100)
    return Launch(block_n, num_warps=max(block_n // 128, 1))


@triton.jit
def activate(gate, ACT: tl.constexpr):
    """Apply the activation to float32 ``gate``. ACT: "silu", "gelu_tanh" or "gelu"."""
    # where exp overflows to inf the quotient is 0, which is the limit; nothing becomes NaN
    if ACT == "silu":
        act = gate / (1.0 + tl.exp(-gate))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x**3)
        act = gate / (1.0 + tl.exp(-gate * (1.5957691216057308 + 0.07135481627269 * gate * gate)))
    else:
        tl.static_assert(ACT == "gelu")
        act = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))  # sqrt(1 / 2)
    return act


@triton.jit
def _act_mul_kernel(
    gate_ptr,  # [n_rows, n_cols]; with up in [n_rows, n_cols:2 * n_cols] if MERGED
    up_ptr,  # [n_rows, n_cols], read only if not MERGED
    y_ptr,  # [n_rows, n_cols] contiguous, written
    n_cols,
    stride_gate_row,
    stride_up_row,
    ACT: tl.constexpr,  # "silu", "gelu_tanh" or "gelu"
    MERGED: tl.constexpr,
    MANY_ROWS: tl.constexpr,  # more than the grid's second axis takes: rows go on the first
    BLOCK_N: tl.constexpr,
):
    """Compute one tile of one row."""
    wait_for_inputs()
    # int64: n_rows * n_cols passes 2**31 for a long prefill
    row = tl.program_id(0 if MANY_ROWS else 1).to(tl.int64)
    cols = tl.program_id(1 if MANY_ROWS else 0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < n_cols
    dtype = y_ptr.dtype.element_ty

    gate_row = gate_ptr + row * stride_gate_row
    if MERGED:
        up_row = gate_row + n_cols
    else:
        up_row = up_ptr + row * stride_up_row
    gate = tl.load(gate_row + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_row + cols, mask=mask, other=0.0).to(tl.float32)

    y = activate(gate, ACT).to(dtype).to(tl.float32) * up
    tl.store(y_ptr + row * n_cols + cols, y.to(dtype), mask=mask)


_act_mul = CachedLauncher(_act_mul_kernel, pdl=True)


def launch_silu_mul(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    return _launch("silu", gate, up)


def launch_gelu_tanh_mul(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    return _launch("gelu_tanh", gate, up)


def launch_gelu_mul(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    return _launch("gelu", gate, up)


def _launch(act: str, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    *leading, width = gate.shape
    n_cols = width // 2 if up is None else width
    y = torch.empty((*leading, n_cols), dtype=gate.dtype, device=gate.device)
    n_rows = gate.numel() // width
    launch = choose_launch(n_cols)
    tiles = -(-n_cols // launch.block_n)
    many_rows = n_rows > _MAX_GRID_Y
    strides = (row_stride(gate), 0 if up is None else row_stride(up))
    _act_mul(
        (n_rows, tiles) if many_rows else (tiles, n_rows),
        (gate, up, y, n_cols, *strides, act, up is None, many_rows, launch.block_n),
        num_warps=launch.num_warps,
    )
    return y
