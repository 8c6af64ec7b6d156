"""Linear layers in plain PyTorch: what the kernels must compute, on any device."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..activation.reference import (
    gelu_mul_reference,
    gelu_tanh_mul_reference,
    silu_mul_reference,
)
from .int4_layout import dequantize_int4
from .int8_layout import unpack_int8

ACTIVATIONS = {
    "silu": silu_mul_reference,
    "gelu_tanh": gelu_tanh_mul_reference,
    "gelu": gelu_mul_reference,
}


def dense_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    y = functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def gated_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
) -> torch.Tensor:
    return ACTIVATIONS[activation](functional.linear(x, weight, bias))


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """In the weight's dtype, which is at least as precise as x's, and rounded once."""
    exact = weight.dtype
    y = functional.linear(x.to(exact), weight, None if bias is None else bias.to(exact))
    y = y.to(x.dtype)
    return y if residual is None else y + residual


def int4_linear_reference(
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
) -> torch.Tensor:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize_int4(packed, scales, zeros, x.shape[-1], group_size, exact, minima)
    y = _multiply(x, weight, bias, residual)
    return y if activation is None else ACTIVATIONS[activation](y)


def dequantize_int8(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    minima: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights ``(n, k)``, computed in ``dtype``: ``scale * (code - zero)``, or
    ``scale * code + minimum``."""
    codes = unpack_int8(packed, k)
    group = torch.arange(k, device=packed.device) // group_size
    scale = scales.to(dtype)[:, group]
    if minima is not None:
        return scale * codes + minima.to(dtype)[:, group]
    return scale * (codes.to(dtype) - (128 if zeros is None else zeros.to(dtype)[:, group]))


def int8_linear_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    minima: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize_int8(packed, scales, zeros, x.shape[-1], group_size, exact, minima)
    return _multiply(x, weight, bias, residual)
