"""The argument checks of linear layers with quantized weights, for every format."""

from __future__ import annotations

import torch

from ..common.checks import check_like, check_no_grad
from ..linear.reference import ACTIVATIONS
from .formats import Format

GROUP_SIZES = (32, 64, 128)  # or all columns
_DTYPES = (torch.float16, torch.bfloat16)
_OFF_CUDA = (*_DTYPES, torch.float32, torch.float64)


def check_quantized_linear(
    op: str,
    fmt: Format,
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    minima: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    group_size: int,
    activation: str | None = None,
) -> None:
    """Check all arguments of an operation; raise as its contract says."""
    k = _check_input(op, x, group_size)
    if packed.ndim != 2 or len(packed) == 0:
        raise ValueError(
            f"{op}: packed must be (n, {fmt.packed_name}), got shape {tuple(packed.shape)}"
        )
    n = len(packed)
    check_like(op, "packed", packed, (n, fmt.packed_columns(k)), x, fmt.packed_dtype)
    groups = (n, -(-k // group_size))
    scale_dtype = torch.float16 if scales.dtype == torch.float16 else x.dtype
    check_like(op, "scales", scales, groups, x, scale_dtype)
    if zeros is not None:
        check_like(op, "zeros", zeros, groups, x, torch.uint8)
    if minima is not None:
        if zeros is not None:
            raise ValueError(f"{op}: zeros and minima exclude each other; got both")
        check_like(op, "minima", minima, groups, x, scale_dtype)
    if bias is not None:
        check_like(op, "bias", bias, (n,), x)
    if residual is not None:
        check_like(op, "residual", residual, (*x.shape[:-1], n), x)
    check_no_grad(op, x, scales, minima, bias, residual)
    if activation is not None:
        _check_gated(op, n, residual, activation)


def _check_input(op: str, x: torch.Tensor, group_size: int) -> int:
    """Check x and the group size; return the number of columns."""
    if x.dtype not in (_DTYPES if x.is_cuda else _OFF_CUDA):
        raise TypeError(f"{op}: x must be float16 or bfloat16; got {x.dtype} on {x.device}")
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_contiguous():
        raise ValueError(
            f"{op}: x must be contiguous with a last dimension of at least 1; "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    k = x.shape[-1]
    if group_size not in GROUP_SIZES and group_size != k:
        raise ValueError(f"{op}: group_size must be 32, 64, 128 or k = {k}; got {group_size}")
    return k


def _check_gated(op: str, n: int, residual: torch.Tensor | None, activation: str) -> None:
    """Check an activation, and that gate and up have equally many rows."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be {', '.join(ACTIVATIONS)}; got {activation!r}")
    if n % 2:
        raise ValueError(f"{op}: the gate's rows and up's must be as many, got {n} together")
    if residual is not None:
        raise ValueError(f"{op}: residual and activation exclude each other; got both")
