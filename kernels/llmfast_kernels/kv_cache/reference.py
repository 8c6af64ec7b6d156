"""Writes to the paged cache in plain PyTorch: the meaning of the kernel, on any device."""

from __future__ import annotations

import torch


def write_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    written = slots >= 0
    slots = slots[written]
    block_size = k_cache.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = k[written]
    v_cache[blocks, :, offsets] = v[written]
