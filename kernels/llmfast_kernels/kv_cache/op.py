"""Writes to the paged cache: the contract, the argument checks and the choice of implementation."""

from __future__ import annotations

import torch

from ..common.checks import check_float, check_no_grad
from .reference import write_kv_reference

BLOCK_SIZES = (16, 32, 64, 128, 256)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Copy each token's keys and values into its slot of the paged cache, IN PLACE.

    **Changes ``k_cache`` and ``v_cache``, and returns nothing.** For every token t with
    ``slots[t] >= 0`` and every head h:

        k_cache[slots[t] // block_size, h, slots[t] % block_size] = k[t, h]
        v_cache[slots[t] // block_size, h, slots[t] % block_size] = v[t, h]

    Nothing is rounded; every other element of the caches stays as it is, bit for bit.

    Args:
        k, v: ``(n_tokens, kv_heads, head_dim)``; float32, float16 or bfloat16, and float64 off
            CUDA. The last dimension is contiguous; tokens and heads may have any strides, as in
            slices of a merged tensor. Both of one shape and dtype, each with its own strides.
        k_cache, v_cache: ``(num_blocks, kv_heads, block_size, head_dim)``, contiguous; of k's
            dtype. block_size is 16, 32, 64, 128 or 256. WRITTEN. They must share no memory with
            each other or with k and v.
        slots: ``(n_tokens,)`` int64, contiguous: ``block * block_size + offset``, or -1 for a token
            that is not written, such as padding. In any order.

    All tensors are on one device. Slots are only read there, so that a CUDA graph can be replayed
    with others in the same buffer. Therefore the caller must know:

    - A slot beyond the cache is an error that CUDA does not report: it writes outside the cache.
      Off CUDA it raises IndexError.
    - If two tokens have one slot, it is undefined for each element which one is in the cache.

    Raises:
        TypeError: a dtype that is not listed above, or dtypes that differ.
        ValueError: a shape, device, memory layout or block size that breaks the contract.
        RuntimeError: an argument requires grad in grad mode; there is no backward.
        NotImplementedError: on CUDA, head_dim is more than ``kernel.MAX_HEAD_DIM``.

    Paper: Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, arXiv:2309.06180, section 4.
    """
    check_write_kv("write_kv", k, v, k_cache, v_cache, slots)
    if not k.is_cuda:
        return write_kv_reference(k, v, k_cache, v_cache, slots)
    from .kernel import launch_write_kv  # imports Triton, which a machine without CUDA may lack

    return launch_write_kv(k, v, k_cache, v_cache, slots)


def check_write_kv(
    op: str,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Check write_kv's arguments in the name of ``op``: rope writes too."""
    dtype = k.dtype
    check_float(op, "k", k)
    if v.dtype != dtype or k_cache.dtype != dtype or v_cache.dtype != dtype:
        raise TypeError(
            f"{op}: v, k_cache and v_cache must have k's dtype {dtype}; "
            f"got {v.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    if slots.dtype != torch.int64:
        raise TypeError(f"{op}: slots must be torch.int64, got {slots.dtype}")

    if k.ndim != 3 or 0 in k.shape[1:]:
        raise ValueError(
            f"{op}: k must be (n_tokens, kv_heads, head_dim) with at least 1 head of 1 element; "
            f"got shape {tuple(k.shape)}"
        )
    n_tokens, n_heads, head_dim = k.shape
    if v.shape != k.shape:
        raise ValueError(f"{op}: v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    cache = k_cache.shape
    if len(cache) != 4 or cache[1] != n_heads or cache[3] != head_dim:
        raise ValueError(
            f"{op}: k_cache must be (num_blocks, {n_heads}, block_size, {head_dim}) with k's "
            f"heads; got shape {tuple(cache)}"
        )
    if cache[2] not in BLOCK_SIZES:
        raise ValueError(
            f"{op}: k_cache's block size must be one of {BLOCK_SIZES}, got {cache[2]} "
            f"in shape {tuple(cache)}"
        )
    if v_cache.shape != cache:
        raise ValueError(
            f"{op}: v_cache must have k_cache's shape {tuple(cache)}, got {tuple(v_cache.shape)}"
        )
    if slots.ndim != 1 or slots.shape[0] != n_tokens:
        raise ValueError(
            f"{op}: slots must have shape ({n_tokens},), one for each token of k; "
            f"got {tuple(slots.shape)}"
        )

    device = k.device
    if (
        v.device != device
        or k_cache.device != device
        or v_cache.device != device
        or slots.device != device
    ):
        raise ValueError(
            f"{op}: v, k_cache, v_cache and slots must be on {device} as k is; got "
            f"{v.device}, {k_cache.device}, {v_cache.device} and {slots.device}"
        )
    if head_dim > 1 and (k.stride(2) != 1 or v.stride(2) != 1):
        raise ValueError(
            f"{op}: k and v must have a contiguous last dimension; "
            f"got strides {k.stride()} and {v.stride()}"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and slots.is_contiguous()):
        raise ValueError(
            f"{op}: k_cache, v_cache and slots must be contiguous; got strides "
            f"{k_cache.stride()}, {v_cache.stride()} and {slots.stride()}"
        )
    check_no_grad(op, k, v, k_cache, v_cache)
