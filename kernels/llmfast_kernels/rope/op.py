"""Rotary position embedding: the contract, the argument checks and the choice of implementation."""

from __future__ import annotations

import torch

from .reference import apply_rope_reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the pairs of each head of ``q`` and ``k`` by the angles of its token's position.

        a' = round(round(a * c) - round(b * s))
        b' = round(round(b * c) + round(a * s))

    with ``c = cos[position, i]`` and ``s = sin[position, i]`` for pair ``i`` of a head ``x``:
    ``a, b = x[i], x[i + rotary_dim / 2]`` (Llama), or ``x[2 * i], x[2 * i + 1]`` if
    ``interleaved`` (GPT-J, GLM, Cohere). What lies behind the first ``rotary_dim`` elements of a
    head is copied.

    The tables' dtype says where it rounds. Tables of q's dtype: ``round`` is the cast to it, and
    the result is that of a Hugging Face layer, which casts its tables so. Tables of float32:
    everything is computed in float32 and rounded to q's dtype once, at the end (Cohere).

    Args:
        q: ``(tokens, q_heads, head_dim)``; float32, float16 or bfloat16, and float64 off CUDA,
            where float64 is kept throughout. The last dimension is contiguous, tokens and heads
            are as far apart as they like, as in a slice of a merged projection.
        k: ``(tokens, kv_heads, head_dim)``; of q's dtype and device, laid out by the same rule.
        cos: ``(max_positions, rotary_dim // 2)``, contiguous, on q's device; float32 or q's
            dtype. One column a pair: the first half of what a Hugging Face rotary module returns.
        sin: like cos, in everything.
        positions: ``(tokens,)``, contiguous, int32 or int64, on q's device; in any order. Read on
            the device, so not checked: each must be at least 0 and below ``max_positions``.
        interleaved: pairs are neighbours, rather than half of ``rotary_dim`` apart.

    Returns:
        ``(q, k)`` rotated: two new contiguous tensors. No argument is changed.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: a shape, device or memory layout that breaks the contract.
        RuntimeError: an argument requires grad in grad mode; there is no backward.
        NotImplementedError: on CUDA, head_dim is more than ``kernel.MAX_HEAD_DIM``.

    Paper: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding,
    arXiv:2104.09864, eq. 34.
    """
    _check(q, k, cos, sin, positions)
    if not q.is_cuda:
        return apply_rope_reference(q, k, cos, sin, positions, interleaved=interleaved)
    from .kernel import launch_apply_rope  # imports Triton, which a machine without CUDA may lack

    return launch_apply_rope(q, k, cos, sin, positions, interleaved=interleaved)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    dtype, device = q.dtype, q.device
    if dtype not in _DTYPES and (q.is_cuda or dtype != torch.float64):
        accepted = "float32, float16 or bfloat16" + ("" if q.is_cuda else ", or float64 off CUDA")
        raise TypeError(f"apply_rope: q must be {accepted}; got {dtype} on {device}")
    if k.dtype != dtype:
        raise TypeError(f"apply_rope: k must have q's dtype {dtype}, got {k.dtype}")
    if cos.dtype != dtype and cos.dtype != torch.float32:
        raise TypeError(
            f"apply_rope: cos must be float32 or have q's dtype {dtype}, got {cos.dtype}"
        )
    if sin.dtype != cos.dtype:
        raise TypeError(f"apply_rope: sin must have cos's dtype {cos.dtype}, got {sin.dtype}")
    if positions.dtype != torch.int64 and positions.dtype != torch.int32:
        raise TypeError(f"apply_rope: positions must be int32 or int64, got {positions.dtype}")

    if q.ndim != 3 or q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(
            "apply_rope: q must be (tokens, q_heads, head_dim) with at least one head of one "
            f"element; got {tuple(q.shape)}"
        )
    tokens, _, head_dim = q.shape
    if k.ndim != 3 or k.shape[0] != tokens or k.shape[1] == 0 or k.shape[2] != head_dim:
        raise ValueError(
            f"apply_rope: k must be ({tokens}, kv_heads, {head_dim}) as q is, with at least one "
            f"head; got {tuple(k.shape)}"
        )
    if cos.ndim != 2 or not 0 < 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            "apply_rope: cos must be (max_positions, rotary_dim // 2) with rotary_dim at least 2 "
            f"and at most q's head_dim {head_dim}; got {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(
            f"apply_rope: sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}"
        )
    if positions.shape != (tokens,):
        raise ValueError(
            f"apply_rope: positions must have shape ({tokens},), one for each token of q; "
            f"got {tuple(positions.shape)}"
        )
    if not (k.device == cos.device == sin.device == positions.device == device):
        others = {"k": k, "cos": cos, "sin": sin, "positions": positions}
        name, other = next((n, t) for n, t in others.items() if t.device != device)
        raise ValueError(f"apply_rope: {name} must be on {device} as q is, got {other.device}")
    if q.stride(2) != 1 or k.stride(2) != 1:
        name, other = ("q", q) if q.stride(2) != 1 else ("k", k)
        raise ValueError(
            f"apply_rope: {name} must have a contiguous last dimension; "
            f"got shape {tuple(other.shape)} with strides {other.stride()}"
        )
    if not (cos.is_contiguous() and sin.is_contiguous() and positions.is_contiguous()):
        raise ValueError(
            "apply_rope: cos, sin and positions must be contiguous, got strides "
            f"{cos.stride()}, {sin.stride()} and {positions.stride()}"
        )
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or cos.requires_grad or sin.requires_grad
    ):
        raise RuntimeError("apply_rope: no backward; call under torch.no_grad()")
