"""Attention over the paged cache: the contract, the checks and the choice of implementation."""

from __future__ import annotations

import itertools
from typing import Literal, overload

import torch

from ..kv_cache.op import BLOCK_SIZES
from .checks import check, check_ints
from .reference import paged_attention_reference

MAX_TREE = 64  # new tokens per sequence with a tree mask: a query's row is one int64 of bits


@overload
def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    block_table: torch.Tensor,
    max_query_len: int,
    max_context_len: int | None = ...,
    max_prompts: int | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    tree_mask: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    block_table: torch.Tensor,
    max_query_len: int,
    max_context_len: int | None = ...,
    max_prompts: int | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    tree_mask: torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def paged_attention(
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
    """Compute :func:`flash_attention` of new tokens over a paged cache that holds their keys.

    Sequence b has the queries ``query_start[b]`` to ``query_start[b + 1]`` of q and
    ``context_len[b]`` keys, those of its new tokens last. Key j lies in block
    ``block_table[b, j // block_size]`` of the cache at offset ``j % block_size``. Query i has
    position ``pos = context_len[b] - n_queries + i`` and attends key j if and only if

        j <= pos  and  (window is None or j > pos - window)

    or, with a tree mask, if j is older than the sequence's new tokens or is the new token that
    ``tree_mask`` allows. Prefill, chunked prefill, decoding, batches of both and the verification
    of drafts are this operation with other numbers.

    A sequence with ``context_len[b] == 0`` is padding: its queries give 0, as does every query
    that attends no key. Keys and values that no query of the sequence attends are not used and
    may be unwritten memory. Entries of the table after the context or left of the window are not
    used either: they may be -1 or any other number.

    Args:
        q: ``[T, Hq, D]``; float32, float16 or bfloat16 (float64 on the CPU). Any strides with a
            last stride of 1, here and in the caches. D is at most 256 on CUDA.
        k_cache, v_cache: ``[num_blocks, Hkv, block_size, D]`` of q's dtype and device; block_size
            is 16, 32, 64, 128 or 256, and Hq a multiple of Hkv.
        query_start: int32 ``[B + 1]``, contiguous, on q's device; from 0 rising to at most T.
        context_len: int32 ``[B]``, contiguous, on q's device.
        block_table: int32 ``[B, max_blocks]`` on q's device, its last stride 1.
        max_query_len: no sequence has more queries.
        max_context_len: roughly the longest context. It decides the number of programs only, not
            the result. ``max_blocks * block_size`` if None.
        max_prompts: the most sequences that have more than one query. The decode kernel then runs
            for sequences with one query and the prefill kernel for the others; the result is the
            same. None: one kernel takes all sequences.
        scale, window, softcap, sinks: as in :func:`flash_attention`.
        tree_mask: bool ``[T, n]`` on q's device, its last stride 1; n is at least max_query_len
            and at most 64. ``tree_mask[t, j]`` says whether query t attends the j-th new token
            of its own sequence. It applies to the query's own token too.
        return_lse: also return the log of each softmax's denominator.

    Returns:
        ``out``, new, contiguous, of q's shape and dtype; with return_lse ``(out, lse)``, lse
        float32 ``[Hq, T]``, -inf (or the sink's logit) where a query attends no key. Rows from
        ``query_start[B]`` on are unspecified. No argument is changed.

    The values of query_start, context_len, block_table and tree_mask are only read on the device,
    so that a CUDA graph can be replayed with other values in the same buffers.
    On CUDA a value that breaks the contract (a sequence longer than max_query_len, more prompts
    than max_prompts, a context longer than its table, an entry that is no block) is not reported;
    on the CPU it raises.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: a shape, device, memory layout, block size or number that breaks the contract.
        NotImplementedError: v_cache's head dimension differs from k_cache's, or is too large on
            CUDA; tree_mask with window.
        RuntimeError: an argument requires grad in grad mode.

    Papers: as :func:`flash_attention`; the cache: Kwon et al., PagedAttention, arXiv:2309.06180;
    the tree mask: Miao et al., SpecInfer, arXiv:2305.09781, section 4.
    """
    op = "paged_attention"
    if q.ndim != 3 or k_cache.ndim != 4:
        raise ValueError(
            f"{op}: q and k_cache must be [T, Hq, D] and [num_blocks, Hkv, block_size, D], "
            f"got {tuple(q.shape)} and {tuple(k_cache.shape)}"
        )
    check(
        op, q, k_cache, v_cache, scale, window, softcap, sinks,
        names=("k_cache", "v_cache"), kv_heads_dim=1,
    )  # fmt: skip
    if k_cache.shape[2] not in BLOCK_SIZES:
        raise ValueError(
            f"{op}: k_cache's block size must be one of {BLOCK_SIZES}, got {k_cache.shape[2]} "
            f"in shape {tuple(k_cache.shape)}"
        )
    _check_sequences(op, q, query_start, context_len, block_table)
    if min(max_query_len, max_context_len or 0, max_prompts or 0) < 0:
        raise ValueError(
            f"{op}: max_query_len, max_context_len and max_prompts must be at least 0, "
            f"got {max_query_len}, {max_context_len} and {max_prompts}"
        )
    if tree_mask is not None:
        _check_tree(op, q, tree_mask, max_query_len, window)
    args = {
        "query_start": query_start,
        "context_len": context_len,
        "block_table": block_table,
        "max_query_len": max_query_len,
        "max_context_len": max_context_len,
        "max_prompts": max_prompts,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "tree_mask": tree_mask,
        "return_lse": return_lse,
    }
    if not q.is_cuda:
        _check_values(
            op, q, k_cache.shape[2], query_start, context_len, block_table, max_query_len,
            max_prompts,
        )  # fmt: skip
        return paged_attention_reference(q, k_cache, v_cache, **args)  # type: ignore[arg-type]
    from .kernel import launch_paged_attention  # imports Triton, which a CPU machine may lack

    return launch_paged_attention(q, k_cache, v_cache, **args)  # type: ignore[arg-type]


def _check_sequences(
    op: str,
    q: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    if context_len.ndim != 1:
        raise ValueError(f"{op}: context_len must have shape [B], got {tuple(context_len.shape)}")
    batch = context_len.shape[0]
    check_ints(op, "context_len", context_len, q, (batch,), (torch.int32,))
    check_ints(op, "query_start", query_start, q, (batch + 1,), (torch.int32,))
    if block_table.dtype != torch.int32:
        raise TypeError(f"{op}: block_table must be int32, got {block_table.dtype}")
    if (
        block_table.ndim != 2
        or block_table.shape[0] != batch
        or block_table.device != q.device
        or (block_table.shape[1] > 1 and block_table.stride(1) != 1)
    ):
        raise ValueError(
            f"{op}: block_table must be [{batch}, max_blocks] on {q.device} with a last stride of "
            f"1; got {tuple(block_table.shape)} on {block_table.device} "
            f"with strides {block_table.stride()}"
        )


def _check_tree(
    op: str, q: torch.Tensor, tree_mask: torch.Tensor, max_query_len: int, window: int | None
) -> None:
    if window is not None:
        raise NotImplementedError(f"{op}: window cannot be combined with tree_mask, got {window}")
    if tree_mask.dtype != torch.bool:
        raise TypeError(f"{op}: tree_mask must be bool, got {tree_mask.dtype}")
    if (
        tree_mask.ndim != 2
        or tree_mask.shape[0] != q.shape[0]
        or not max_query_len <= tree_mask.shape[1] <= MAX_TREE
        or tree_mask.device != q.device
        or (tree_mask.shape[1] > 1 and tree_mask.stride(1) != 1)
    ):
        raise ValueError(
            f"{op}: tree_mask must be [{q.shape[0]}, n] on {q.device} with a last stride of 1 and "
            f"max_query_len ({max_query_len}) <= n <= {MAX_TREE}; got {tuple(tree_mask.shape)} on "
            f"{tree_mask.device} with strides {tree_mask.stride()}"
        )


def _check_values(
    op: str,
    q: torch.Tensor,
    block_size: int,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    block_table: torch.Tensor,
    max_query_len: int,
    max_prompts: int | None,
) -> None:
    """Check the values, which on CUDA would synchronise."""
    starts, contexts = query_start.tolist(), context_len.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] > q.shape[0] or any(length < 0 for length in lengths):
        raise ValueError(
            f"{op}: query_start must rise from 0 to at most {q.shape[0]} (q's tokens), got {starts}"
        )
    if any(length > max_query_len for length in lengths):
        raise ValueError(
            f"{op}: no sequence may have more than max_query_len ({max_query_len}) queries, "
            f"got {lengths}"
        )
    if max_prompts is not None and sum(length > 1 for length in lengths) > max_prompts:
        raise ValueError(
            f"{op}: no more than max_prompts ({max_prompts}) sequences may have more than one "
            f"query, got {lengths}"
        )
    longest = block_table.shape[1] * block_size
    if any(not 0 <= context <= longest for context in contexts):
        raise ValueError(
            f"{op}: context_len must be from 0 to {longest} (block_table's blocks of "
            f"{block_size}), got {contexts}"
        )
