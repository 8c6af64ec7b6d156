"""Verify a replacement numerically: ours and the original against a higher precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MIN_VALUES = 4096  # output values that one verification compares at least
RELATIVE = 2.0  # largest allowed ratio of our error to the original's
FLOOR_EPS = 4.0  # an error of this many machine epsilons of the model's dtype always passes


@dataclass(frozen=True)
class Verification:
    """Relative RMS errors against the oracle, and the limit for ours."""

    error: float  # ours
    own_error: float  # the original's
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # false for NaN too

    def __str__(self) -> str:
        return f"error {self.error:.1e}, original's own {self.own_error:.1e}"


def oracle_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that the oracle computes in: float64 for float32, else float32."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def precise_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of ``module`` in ``dtype``; configs, which are slow to copy, are shared."""
    configs = [getattr(m, "config", None) for m in module.modules()]
    return copy.deepcopy(module, {id(config): config for config in configs}).to(dtype)


def use_eager_experts(module: nn.Module) -> None:
    """Let experts run one by one: transformers' other implementations have no float64.

    The configs of ``module`` are changed: it must be a copy that has its own.
    """
    for part in module.modules():
        config: Any = vars(part).get("config")
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Cast every floating-point tensor in a module's arguments to ``dtype``."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: cast_floats(v, dtype) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(cast_floats(v, dtype) for v in value)
    return value


def relative_rms(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """Return the RMS of ``actual - oracle`` over the RMS of ``oracle``, in float64."""
    oracle = oracle.double()
    scale = oracle.square().mean().sqrt()
    return float((actual.double() - oracle).square().mean().sqrt() / scale)


def compare(ours: torch.Tensor, original: torch.Tensor, oracle: torch.Tensor) -> Verification:
    """Judge ``ours`` by the relative rule: no more than twice the original's error.

    Args:
        ours, original: the two results, of the model's dtype and of one shape.
        oracle: the original computation one precision up, of the same shape.

    Raises:
        ValueError: shapes or dtypes differ, or there are fewer than ``MIN_VALUES`` values.
    """
    if ours.shape != original.shape or ours.dtype != original.dtype:
        raise ValueError(
            f"verify: ours gave {ours.dtype} {tuple(ours.shape)}, "
            f"the original {original.dtype} {tuple(original.shape)}"
        )
    if ours.numel() < MIN_VALUES:
        raise ValueError(f"verify: at least {MIN_VALUES} values wanted, got {ours.numel()}")
    own = relative_rms(original, oracle)
    # a float64 model of transformers still computes its norms in float32
    dtype = torch.float32 if ours.dtype == torch.float64 else ours.dtype
    limit = max(RELATIVE * own, FLOOR_EPS * torch.finfo(dtype).eps)
    return Verification(relative_rms(ours, oracle), own, limit)
