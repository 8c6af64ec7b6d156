"""The groups of arguments that attention's kernels share, and the location of a sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# integers that change from call to call and that no variant should be compiled for. They are not
# in the groups below, because Triton specializes on all integers of a group
NOT_SPECIALIZED = (
    "stride_lse_h",
    "stride_offset",
    "stride_table",
    "stride_tree",
    "n_queries",
    "n_keys",
    "query_offset",
    "window",
)


class Heads(NamedTuple):
    """Queries, keys or values: a pointer and its strides in elements, the last one being 1.

    ``[B, L, H, D]``; ``[T, H, D]`` if sequences have different lengths; the blocks
    ``[num_blocks, block_size, H, D]`` of a paged cache.
    """

    ptr: Any
    stride_b: Any  # from sequence to sequence, or from block to block
    stride_m: Any  # from token to token
    stride_h: Any  # from head to head


class Output(NamedTuple):
    """The tensors that are written, both contiguous."""

    ptr: Any  # as q
    lse_ptr: Any  # float32 [B, Hq, Lq] or [Hq, Tq]; or None


class Sequences(NamedTuple):
    """Pointers that say which rows and which keys belong to each sequence; each may be None."""

    cu_q_ptr: Any = None  # int [B + 1]: where queries start in [Tq, Hq, D]; None: batched
    cu_k_ptr: Any = None  # int [B + 1]: where keys start; None in a paged cache
    key_start_ptr: Any = None  # int [B]
    key_end_ptr: Any = None  # int [B]
    offset_ptr: Any = None  # int [B] or [1]: the position of the first query; None: an argument
    context_len_ptr: Any = None  # int32 [B]: the keys of each sequence in a paged cache
    block_table_ptr: Any = None  # int32 [B, max_blocks], if and only if there is context_len_ptr
    tree_mask_ptr: Any = None  # bool [Tq, n], n <= 64, only with a block table, without CAUSAL


class Scoring(NamedTuple):
    """How products of queries and keys become softmax weights."""

    scale: Any  # times LOG2_E, or divided by the soft cap if there is one
    softcap: Any  # times LOG2_E, or None
    sinks_ptr: Any  # [Hq] or None


@triton.jit
def locate_sequence(
    b,
    sequences: Sequences,
    stride_offset,
    n_queries,
    n_keys,
    query_offset,
    window,
):
    """Return sequence b's first rows in q and k, its length, its range of keys, and its offset.

    Ranges and offsets may be int64. They are clamped before they are narrowed to int32.
    """
    q_start = b.to(tl.int64) * 0
    k_start = q_start
    if sequences.cu_q_ptr is not None:
        q_start = tl.load(sequences.cu_q_ptr + b).to(tl.int64)
        n_queries = (tl.load(sequences.cu_q_ptr + b + 1) - q_start).to(tl.int32)
        if sequences.context_len_ptr is None:
            k_start = tl.load(sequences.cu_k_ptr + b).to(tl.int64)
            n_keys = (tl.load(sequences.cu_k_ptr + b + 1) - k_start).to(tl.int32)
        else:
            n_keys = tl.load(sequences.context_len_ptr + b)
        query_offset = n_keys - n_queries
    if sequences.offset_ptr is not None:
        query_offset = tl.load(sequences.offset_ptr + b * stride_offset).to(tl.int64)
        # beyond these bounds the attended keys stay the same: all, or none inside the window
        highest = n_keys.to(tl.int64)
        if window is not None:
            highest += window
        highest = tl.minimum(highest, 2**31 - 1 - n_queries)
        query_offset = tl.minimum(tl.maximum(query_offset, -n_queries), highest).to(tl.int32)
    key_lo = 0
    if sequences.key_start_ptr is not None:
        key_start = tl.load(sequences.key_start_ptr + b)
        key_lo = tl.minimum(tl.maximum(key_start, 0), n_keys).to(tl.int32)
    key_hi = n_keys
    if sequences.key_end_ptr is not None:
        key_end = tl.load(sequences.key_end_ptr + b)
        key_hi = tl.maximum(tl.minimum(key_end, n_keys), 0).to(tl.int32)
    return q_start, k_start, n_queries, key_lo, key_hi, query_offset


@triton.jit
def first_row(b, q_start, n_queries, sequences: Sequences):
    """Return sequence b's first row in the contiguous output; n_queries is the most of any."""
    if sequences.cu_q_ptr is None:
        row = b.to(tl.int64) * n_queries
    else:
        row = q_start
    return row


@triton.jit
def lse_rows(lse_ptr, b, heads, q_start, n_heads, stride_lse_h, sequences: Sequences):
    """Return pointers to the first log-sum-exp of sequence b for each of ``heads``."""
    if sequences.cu_q_ptr is None:
        lse_ptr += b.to(tl.int64) * n_heads * stride_lse_h
    return lse_ptr + (q_start + heads.to(tl.int64) * stride_lse_h)
