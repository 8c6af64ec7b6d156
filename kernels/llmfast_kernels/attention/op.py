"""Attention: the contract, the argument checks and the choice of implementation."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .checks import check, check_ints
from .reference import flash_attention_reference, flash_attention_varlen_reference


@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    key_start: torch.Tensor | None = ...,
    key_end: torch.Tensor | None = ...,
    query_offset: int | torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    key_start: torch.Tensor | None = ...,
    key_end: torch.Tensor | None = ...,
    query_offset: int | torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_start: torch.Tensor | None = None,
    key_end: torch.Tensor | None = None,
    query_offset: int | torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention without the matrix of scores in memory.

        s[i, j] = scale * (q[i] . k[j])          then softcap * tanh(s / softcap), if given
        out[i]  = sum_j exp(s[i, j]) v[j] / (exp(sink) + sum_j exp(s[i, j]))

    The sums are over the keys j that query i attends. Query i of row b has position
    ``pos = query_offset[b] + i`` and attends key j if and only if

        key_start[b] <= j < key_end[b]  and  (not causal or j <= pos)
        and  (window is None or j > pos - window)

    The output of a query that attends no key is 0. Keys and values that no query of the row
    attends are not used and may be unwritten memory. Scores, softmax and sums are in float32. On
    CUDA weights are rounded to v's dtype before they multiply v. The output is rounded once.

    Args:
        q: ``[B, Lq, Hq, D]``; float32, float16 or bfloat16 (float64 on the CPU). Any strides
            with a last stride of 1, here and in k and v. D is at most 256 on CUDA.
        k, v: ``[B, Lk, Hkv, D]`` of q's dtype and device; Hq is a multiple of Hkv, and query
            head h reads KV head ``h // (Hq // Hkv)``.
        causal: no query attends a key after its own position.
        scale: of the scores, more than 0; ``D ** -0.5`` if None.
        window: keys that a query attends, its own position counted; at least 1.
        softcap: bound of the scores, more than 0.
        sinks: ``[Hq]``, contiguous, of a float dtype: one logit per head that takes part in the
            softmax's sum and has no value (gpt-oss).
        key_start, key_end: int32 or int64 ``[B]``, contiguous, on q's device: the range of the
            row's valid keys; 0 and Lk if None. Values outside 0 to Lk are clamped.
        query_offset: position of the first query: a number, or int32 or int64 ``[B]``, ``[1]``
            or ``[]`` on q's device, which is read there and never synchronised;
            ``Lk - Lq`` if None, so that the last query is at the last key's position.
        return_lse: also return the log of each softmax's denominator.

    Returns:
        ``out``, new, contiguous, of q's shape and dtype; with return_lse ``(out, lse)``, lse
        float32 ``[B, Hq, Lq]``: -inf where a query attends no key, or the sink's logit if there
        are sinks. No argument is changed.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: a shape, device, memory layout or number that breaks the contract.
        NotImplementedError: v's head dimension differs from k's, or is too large on CUDA.
        RuntimeError: an argument requires grad in grad mode.

    Papers: Dao, FlashAttention-2, arXiv:2307.08691; split keys: Dao et al., Flash-Decoding, 2023.
    """
    op = "flash_attention"
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{op}: q and k must be [B, Lq, Hq, D] and [B, Lk, Hkv, D] with one B, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    check(op, q, k, v, scale, window, softcap, sinks)
    for name, bound in (("key_start", key_start), ("key_end", key_end)):
        if bound is not None:
            check_ints(op, name, bound, q, (q.shape[0],))
    if isinstance(query_offset, torch.Tensor):
        shape = () if query_offset.ndim == 0 else (1 if query_offset.shape[0] == 1 else len(q),)
        check_ints(op, "query_offset", query_offset, q, shape)
    args = {
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "key_start": key_start,
        "key_end": key_end,
        "query_offset": query_offset,
        "return_lse": return_lse,
    }
    if not q.is_cuda:
        return flash_attention_reference(q, k, v, **args)  # type: ignore[arg-type]
    from .kernel import launch_flash_attention  # imports Triton, which a CPU machine may lack

    return launch_flash_attention(q, k, v, **args)  # type: ignore[arg-type]


@overload
def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`flash_attention` over sequences laid end to end, without padding.

    Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the keys
    ``cu_seqlens_k[b]`` to ``cu_seqlens_k[b + 1]``; its last query is at its last key's position.

    Args:
        q: ``[Tq, Hq, D]``; strides and dtypes as in :func:`flash_attention`.
        k, v: ``[Tk, Hkv, D]``.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[B + 1]``, contiguous, on q's device; rising
            from 0 to Tq and Tk. The values are not checked: that would synchronise.
        max_seqlen_q, max_seqlen_k: no sequence is longer; larger numbers cost some speed.
        causal, scale, window, softcap, sinks, return_lse: as in :func:`flash_attention`.

    Returns:
        ``out`` or ``(out, lse)`` as in :func:`flash_attention`; lse is float32 ``[Hq, Tq]``.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as in :func:`flash_attention`.
    """
    op = "flash_attention_varlen"
    if q.ndim != 3 or k.ndim != 3:
        raise ValueError(
            f"{op}: q and k must be [Tq, Hq, D] and [Tk, Hkv, D], "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    check(op, q, k, v, scale, window, softcap, sinks)
    if cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape[0] == 0:
        raise ValueError(
            f"{op}: cu_seqlens_q must have shape [B + 1], got {tuple(cu_seqlens_q.shape)}"
        )
    check_ints(op, "cu_seqlens_q", cu_seqlens_q, q, tuple(cu_seqlens_q.shape))
    check_ints(op, "cu_seqlens_k", cu_seqlens_k, q, tuple(cu_seqlens_q.shape))
    if max_seqlen_q < 0 or max_seqlen_k < 0:
        raise ValueError(
            f"{op}: max_seqlen_q and max_seqlen_k must be at least 0, "
            f"got {max_seqlen_q} and {max_seqlen_k}"
        )
    args = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "return_lse": return_lse,
    }
    if not q.is_cuda:
        return flash_attention_varlen_reference(q, k, v, **args)  # type: ignore[arg-type]
    from .kernel import launch_flash_attention_varlen

    return launch_flash_attention_varlen(q, k, v, **args)  # type: ignore[arg-type]
