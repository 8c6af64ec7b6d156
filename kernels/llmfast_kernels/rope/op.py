"""Rotary position embedding: the contract, the argument checks and the choice of implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..common.checks import check_float, check_no_grad
from ..kv_cache.op import check_write_kv
from .reference import apply_rope_reference, rope_write_kv_reference


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
    ``interleaved`` (GPT-J, GLM, Cohere). The elements of a head behind the first ``rotary_dim``
    are copied.

    The tables' dtype decides the rounding. With tables of q's dtype ``round`` is the cast to it:
    the result is that of a Hugging Face layer, which casts its tables so. With float32 tables
    everything is computed in float32 and rounded to q's dtype once, at the end (Cohere).

    Args:
        q: ``(tokens, q_heads, head_dim)``; float32, float16 or bfloat16, and float64 off CUDA,
            where float64 is kept throughout. The last dimension is contiguous; tokens and
            heads may have any strides, as in a slice of a merged projection.
        k: ``(tokens, kv_heads, head_dim)``; of q's dtype and device, laid out by the same rule.
        cos: ``(max_positions, rotary_dim // 2)``, contiguous, on q's device; float32 or q's
            dtype. One column per pair: the first half of what a Hugging Face rotary module returns.
        sin: of cos's shape, dtype and layout.
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
    _check_heads("apply_rope", q, k)
    _check_tables("apply_rope", q, cos, sin, positions)
    if not q.is_cuda:
        return apply_rope_reference(q, k, cos, sin, positions, interleaved=interleaved)
    from .kernel import launch_apply_rope  # imports Triton, which a machine without CUDA may lack

    return launch_apply_rope(q, k, cos, sin, positions, interleaved=interleaved)


def rope_write_kv(
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
    """Normalise the heads of ``q`` and ``k``, rotate them, and write ``k`` and ``v`` to the cache.

    **Changes ``k_cache`` and ``v_cache``.** In one pass over memory it does the same as:

        q, k = rms_norm(q, q_norm, eps=eps), rms_norm(k, k_norm, eps=eps)   (if there are weights)
        q, k = apply_rope(q, k, cos, sin, positions)                        (if there are tables)
        write_kv(k, v, k_cache, v_cache, slots)

    It rounds where these three round, so the result is the same.

    Args:
        q: ``(tokens, q_heads, head_dim)``; float32, float16 or bfloat16, and float64 off CUDA. The
            last dimension is contiguous; tokens and heads may have any strides, as in a slice of
            a merged projection.
        k, v: ``(tokens, kv_heads, head_dim)``; of q's dtype, laid out by the same rule.
        cos, sin: as in :func:`apply_rope`. Both None: nothing is rotated.
        positions: as in :func:`apply_rope`. Ignored without tables, so it may be None.
        k_cache, v_cache: ``(num_blocks, kv_heads, block_size, head_dim)`` of q's dtype, as in
            :func:`write_kv`. WRITTEN. They must share no memory with any other argument.
        slots: ``(tokens,)`` int64, as in :func:`write_kv`. A token with slot -1 is written
            nowhere; its queries are computed like all others.
        interleaved: as in :func:`apply_rope`.
        q_norm, k_norm: ``(head_dim,)``, contiguous, of q's dtype: the weights of
            :func:`rms_norm` over each head. Both None: no norm.
        eps, unit_offset: as in :func:`rms_norm`; only read if there are weights, and eps must then
            be more than 0.

    All tensors are on one device. Positions and slots are read there and not checked:
    :func:`apply_rope` and :func:`write_kv` say what the caller must ensure.

    Returns:
        The new q, ``(tokens, q_heads, head_dim)`` contiguous. q, k and v are not changed.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: a shape, device, memory layout, block size or eps that breaks the contract, or
            one of a pair of arguments without the other.
        RuntimeError: an argument requires grad in grad mode; there is no backward.
        NotImplementedError: on CUDA, head_dim is more than ``kernel.MAX_HEAD_DIM``.
    """
    op = "rope_write_kv"
    _check_heads(op, q, k)
    _check_pair(op, "cos", cos, "sin", sin)
    _check_pair(op, "q_norm", q_norm, "k_norm", k_norm)
    if cos is not None and sin is not None:
        if positions is None:
            raise ValueError(f"{op}: positions must be given with cos and sin, got None")
        _check_tables(op, q, cos, sin, positions)
    if q_norm is not None and k_norm is not None:
        _check_norm(op, "q_norm", q_norm, q, eps)
        _check_norm(op, "k_norm", k_norm, q, eps)
    check_write_kv(op, k, v, k_cache, v_cache, slots)
    launch: Callable[..., torch.Tensor] = rope_write_kv_reference
    if q.is_cuda:
        from .kernel import launch_rope_write_kv  # imports Triton, as above

        launch = launch_rope_write_kv
    return launch(
        q,
        k,
        v,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        slots,
        interleaved=interleaved,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        unit_offset=unit_offset,
    )


def _check_heads(op: str, q: torch.Tensor, k: torch.Tensor) -> None:
    dtype, device = q.dtype, q.device
    check_float(op, "q", q)
    if k.dtype != dtype:
        raise TypeError(f"{op}: k must have q's dtype {dtype}, got {k.dtype}")
    if q.ndim != 3 or q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(
            f"{op}: q must be (tokens, q_heads, head_dim) with at least one head of one "
            f"element; got {tuple(q.shape)}"
        )
    tokens, _, head_dim = q.shape
    if k.ndim != 3 or k.shape[0] != tokens or k.shape[1] == 0 or k.shape[2] != head_dim:
        raise ValueError(
            f"{op}: k must be ({tokens}, kv_heads, {head_dim}) as q is, with at least one "
            f"head; got {tuple(k.shape)}"
        )
    if k.device != device:
        raise ValueError(f"{op}: k must be on {device} as q is, got {k.device}")
    if q.stride(2) != 1 or k.stride(2) != 1:
        name, other = ("q", q) if q.stride(2) != 1 else ("k", k)
        raise ValueError(
            f"{op}: {name} must have a contiguous last dimension; "
            f"got shape {tuple(other.shape)} with strides {other.stride()}"
        )
    check_no_grad(op, q, k)


def _check_tables(
    op: str, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> None:
    tokens, _, head_dim = q.shape
    dtype, device = q.dtype, q.device
    if cos.dtype != dtype and cos.dtype != torch.float32:
        raise TypeError(f"{op}: cos must be float32 or have q's dtype {dtype}, got {cos.dtype}")
    if sin.dtype != cos.dtype:
        raise TypeError(f"{op}: sin must have cos's dtype {cos.dtype}, got {sin.dtype}")
    if positions.dtype != torch.int64 and positions.dtype != torch.int32:
        raise TypeError(f"{op}: positions must be int32 or int64, got {positions.dtype}")
    if cos.ndim != 2 or not 0 < 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            f"{op}: cos must be (max_positions, rotary_dim // 2) with rotary_dim at least 2 "
            f"and at most q's head_dim {head_dim}; got {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(
            f"{op}: sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}"
        )
    if positions.shape != (tokens,):
        raise ValueError(
            f"{op}: positions must have shape ({tokens},), one for each token of q; "
            f"got {tuple(positions.shape)}"
        )
    if not (cos.device == sin.device == positions.device == device):
        others = {"cos": cos, "sin": sin, "positions": positions}
        name, other = next((n, t) for n, t in others.items() if t.device != device)
        raise ValueError(f"{op}: {name} must be on {device} as q is, got {other.device}")
    if not (cos.is_contiguous() and sin.is_contiguous() and positions.is_contiguous()):
        raise ValueError(
            f"{op}: cos, sin and positions must be contiguous, got strides "
            f"{cos.stride()}, {sin.stride()} and {positions.stride()}"
        )
    check_no_grad(op, cos, sin)


def _check_norm(op: str, name: str, weight: torch.Tensor, q: torch.Tensor, eps: float) -> None:
    if weight.dtype != q.dtype:
        raise TypeError(f"{op}: {name} must have q's dtype {q.dtype}, got {weight.dtype}")
    if weight.shape != q.shape[2:]:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(q.shape[2:])}, q's head_dim; "
            f"got {tuple(weight.shape)}"
        )
    if weight.device != q.device:
        raise ValueError(f"{op}: {name} must be on {q.device} as q is, got {weight.device}")
    if not weight.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {weight.stride()}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be more than 0 with {name}, got {eps}")
    check_no_grad(op, weight)


def _check_pair(
    op: str, name: str, one: torch.Tensor | None, other_name: str, other: torch.Tensor | None
) -> None:
    if (one is None) != (other is None):
        given, missing = (name, other_name) if other is None else (other_name, name)
        raise ValueError(
            f"{op}: {name} and {other_name} must be given together; got {given}, but {missing} None"
        )
