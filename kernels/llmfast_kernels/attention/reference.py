"""Attention in plain PyTorch: the meaning of the kernels, on any device.

It computes in float32 (in float64 for float64 input) and rounds only the output.
"""

from __future__ import annotations

import torch


def flash_attention_reference(
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
    attended = _attended(
        q.shape[1], k.shape[1], q.device, causal, window, key_start, key_end, query_offset
    )
    out, lse = _softmax_attention(q, k, v, attended, scale, softcap, sinks)
    return (out, lse) if return_lse else out


def _softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attended: torch.Tensor,  # bool [B or 1, Lq, Lk]
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    n_keys, group = k.shape[1], q.shape[2] // k.shape[2]
    # keys that no query attends may be unwritten memory: 0 times NaN would spoil the sums
    used = attended.any(dim=1)[:, :, None, None]  # [B or 1, Lk, 1, 1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (torch.where(used, x.to(dtype), 0).repeat_interleave(group, dim=2) for x in (k, v))

    scores = torch.einsum("bihd,bjhd->bhij", q.to(dtype), k)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~attended[:, None], float("-inf"))

    lse = (
        torch.logsumexp(scores, dim=-1)
        if n_keys
        else scores.new_full(scores.shape[:-1], -torch.inf)
    )
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype)[:, None])
    # a query without keys: its lse of -inf would give NaN, and its weights are 0
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = torch.einsum("bhij,bjhd->bihd", weights, v).to(q.dtype).contiguous()
    return out, lse.float()


def flash_attention_varlen_reference(
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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds_q) - 1):
        of_q, of_k = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        one = flash_attention_reference(
            q[None, of_q],
            k[None, of_k],
            v[None, of_k],
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            return_lse=True,
        )
        out[of_q], lse[:, of_q] = one[0][0], one[1][0]
    return (out, lse) if return_lse else out


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    block_table: torch.Tensor,
    max_query_len: int,
    max_context_len: int | None = None,
    max_prompts: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    block_size = k_cache.shape[2]
    starts = query_start.tolist()
    for b, n_keys in enumerate(context_len.tolist()):
        of_q = slice(*starts[b : b + 2])
        n_queries = of_q.stop - of_q.start
        offset = n_keys - n_queries  # position of the first query
        # blocks left of the window may be freed: gather from the first block that is used
        start = 0 if window is None else max(offset - window + 1, 0) // block_size * block_size
        blocks = block_table[b, start // block_size : -(-n_keys // block_size)]
        k, v = (
            cache.index_select(0, blocks).transpose(1, 2).flatten(0, 1)[None, : n_keys - start]
            for cache in (k_cache, v_cache)
        )
        if tree_mask is None:
            attended = _attended(
                n_queries, k.shape[1], q.device, True, window, None, None, offset - start
            )
        else:
            new = torch.arange(n_keys, device=q.device) - offset
            attended = ((new < 0) | tree_mask[of_q][:, new.clamp(min=0)])[None]
        one = _softmax_attention(q[None, of_q], k, v, attended, scale, softcap, sinks)
        out[of_q], lse[:, of_q] = one[0][0], one[1][0]
    return (out, lse) if return_lse else out


def _attended(
    n_queries: int,
    n_keys: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    key_start: torch.Tensor | None,
    key_end: torch.Tensor | None,
    query_offset: int | torch.Tensor | None,
) -> torch.Tensor:
    """Return which keys each query attends: bool ``[B or 1, n_queries, n_keys]``."""
    key = torch.arange(n_keys, device=device)[None, None, :]
    offset = n_keys - n_queries if query_offset is None else query_offset
    if isinstance(offset, torch.Tensor):
        offset = offset.reshape(-1, 1, 1)
    position = torch.arange(n_queries, device=device)[None, :, None] + offset
    attended = torch.ones(1, n_queries, n_keys, dtype=torch.bool, device=device)
    if causal:
        attended = attended & (key <= position)
    if window is not None:
        attended = attended & (key > position - window)
    if key_start is not None:
        attended = attended & (key >= key_start[:, None, None])
    if key_end is not None:
        attended = attended & (key < key_end[:, None, None])
    return attended
