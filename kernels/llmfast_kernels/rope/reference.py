"""Rotary position embedding in plain PyTorch: the meaning of the kernels, on any device."""

from __future__ import annotations

import torch

from ..kv_cache.reference import write_kv_reference
from ..norm.reference import rms_norm_reference


def apply_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = (table[positions].unsqueeze(1) for table in (cos, sin))  # the same for all heads
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def rope_write_kv_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    interleaved: bool = False,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
) -> torch.Tensor:
    if q_norm is not None and k_norm is not None:
        q = rms_norm_reference(q, q_norm, eps=eps, unit_offset=unit_offset)
        k = rms_norm_reference(k, k_norm, eps=eps, unit_offset=unit_offset)
    if cos is not None and sin is not None and positions is not None:
        q, k = apply_rope_reference(q, k, cos, sin, positions, interleaved=interleaved)
    else:
        q = q.clone(memory_format=torch.contiguous_format)
    write_kv_reference(k, v, k_cache, v_cache, slots)
    return q


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate; promotion decides the rounding: float32 tables keep all in float32."""
    half = cos.shape[-1]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    out = x.clone(memory_format=torch.contiguous_format)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out
