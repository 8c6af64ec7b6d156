"""Linear layers in plain PyTorch: what the kernels must compute, on any device."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..activation.reference import (
    gelu_mul_reference,
    gelu_tanh_mul_reference,
    silu_mul_reference,
)

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
