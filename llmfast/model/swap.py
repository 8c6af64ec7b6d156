"""State shared by the swapped modules of one model: the operations and the fallback counts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import llmfast_kernels

from . import compiled

logger = logging.getLogger("llmfast")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Operations:
    """The operations that swapped modules call. The defaults dispatch on the tensors' device."""

    rms_norm: Callable[..., torch.Tensor] = llmfast_kernels.rms_norm
    silu_mul: Callable[..., torch.Tensor] = llmfast_kernels.silu_mul
    gelu_tanh_mul: Callable[..., torch.Tensor] = llmfast_kernels.gelu_tanh_mul
    gelu_mul: Callable[..., torch.Tensor] = llmfast_kernels.gelu_mul
    flash_attention: Callable[..., Any] = llmfast_kernels.flash_attention


_COMPILED = Operations(
    rms_norm=compiled.rms_norm,
    silu_mul=compiled.silu_mul,
    gelu_tanh_mul=compiled.gelu_tanh_mul,
    gelu_mul=compiled.gelu_mul,
    flash_attention=compiled.flash_attention,
)


@dataclass
class Swap:
    """Shared by all swapped modules of one model; deep-copied and pickled with it."""

    given: Operations
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def operations(self) -> Operations:
        """The operations to call now: the custom ones under torch.compile."""
        return _COMPILED if torch.compiler.is_compiling() else self.given

    def fell_back(self, module: nn.Module, reason: str) -> None:
        """Count a call that the original computes, and log the first of its kind."""
        if torch.compiler.is_compiling():
            return  # a counter is a side effect that a traced graph should not carry
        key = (type(module).__name__, reason)
        self.fallbacks[key] += 1
        if self.fallbacks[key] == 1:
            logger.warning("llmfast: %s runs its original forward: %s", *key)


def why_not(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Return why a call on ``x`` must run the original module; None if ours can take it.

    Checks in every call everything that may change after verification: the mode, autograd, and
    the device and dtype of the model.
    """
    if module.training:
        return "the module is in training mode"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "outside torch.no_grad()"
    if x.dtype is not weight.dtype or not is_supported(x):
        return f"input is {x.dtype}, weight is {weight.dtype}"
    if x.device != weight.device:
        return f"input is on {x.device}, weight on {weight.device}"
    return None


def is_supported(x: torch.Tensor) -> bool:
    """Return whether the operations take a tensor of this dtype on its device."""
    return x.dtype in FLOATS or (x.dtype is torch.float64 and x.device.type == "cpu")


def original_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the forward that the module's class defines."""
    return type(module).forward(module, *args, **kwargs)
