"""Gated activations in plain PyTorch: the meaning of the kernel, on any device."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, silu


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = _halves(gate, up)
    return silu(gate) * up


def gelu_tanh_mul_reference(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = _halves(gate, up)
    return gelu(gate, approximate="tanh") * up


def gelu_mul_reference(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = _halves(gate, up)
    return gelu(gate) * up


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate and up. Without ``up``, ``gate`` holds both in its last dimension."""
    if up is not None:
        return gate, up
    n = gate.shape[-1] // 2
    return gate[..., :n], gate[..., n:]
