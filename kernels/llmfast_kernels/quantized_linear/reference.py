"""Linear layers with quantized weights in plain PyTorch: what the kernels must compute."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from ..linear.reference import ACTIVATIONS
from .formats import INT4, INT8, Format


def quantized_linear_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    fmt: Format,
    group_size: int,
    minima: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    # at least as precise as x, and rounded once
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = fmt.dequantize(packed, scales, zeros, x.shape[-1], group_size, exact, minima)
    y = functional.linear(x.to(exact), weight, None if bias is None else bias.to(exact))
    y = y.to(x.dtype)
    if activation is not None:
        return ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


int4_linear_reference = partial(quantized_linear_reference, fmt=INT4)
int8_linear_reference = partial(quantized_linear_reference, fmt=INT8)
