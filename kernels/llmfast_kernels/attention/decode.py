"""Attention of few queries over many keys: the keys are split over programs, then merged."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from ..common.pdl import wait_for_inputs
from .loop import (
    LN_2,
    LOG2_E,
    NOT_SPECIALIZED,
    attend,
    finish,
    load_tile,
    load_tree,
    locate_sequence,
    needed_keys,
    pad_head_dim,
    shared_bytes,
)

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@dataclass(frozen=True)
class DecodeLaunch:
    """How the keys of one KV head are cut into programs."""

    block_m: int  # rows: queries times the query heads of one KV head
    block_n: int  # keys of a step of the loop
    num_splits: int  # programs that share the keys of one KV head of one sequence
    num_warps: int
    num_stages: int


def max_rows(element_size: int) -> int:
    """How many queries times query heads of one KV head a program takes at most."""
    return 32 if element_size == 4 else 64


@functools.lru_cache(maxsize=4096)
def choose_decode_launch(
    *,
    sequences: int,
    rows: int,
    key_blocks: int,
    head_dim: int,
    element_size: int,
    sm_count: int,
    shared_memory: int,
) -> DecodeLaunch:
    """Pick the launch for ``sequences`` times ``rows``. Pure: it asks no device.

    ``sequences`` counts KV heads too, ``key_blocks`` is the longest sequence's keys in units of
    64, ``shared_memory`` is what one program may use, in bytes.
    """
    block_m = max(16, triton.next_power_of_2(rows))
    width = pad_head_dim(head_dim)
    if element_size == 4:  # full precision has no tensor cores: larger tiles only spill registers
        block_n, num_warps, num_stages = 32 if block_m == 16 else 16, 8, 2
    else:  # a stage of 32 KiB of K and V, three of them on their way where they fit
        block_n = min(128, 8192 // width)
        num_warps = 8 if block_m == 64 and width >= 128 else 4
        num_stages = 2 if block_m == 64 else 4
        while shared_bytes(block_m, block_n, num_stages, head_dim, element_size) > shared_memory:
            num_stages -= 1
    splits = _choose_splits(sequences, -(-key_blocks * 64 // block_n), sm_count)
    return DecodeLaunch(block_m, block_n, splits, num_warps, num_stages)


def _choose_splits(sequences: int, blocks: int, sm_count: int) -> int:
    """The number of splits that ends first; the unit is a block at a fair share of the memory.

    A multiprocessor alone reads faster than its share, so all of them need not be busy, but none
    may have much more to do than others. What starting and merging cost was measured on an H100.
    """
    best, best_cost = 1, float("inf")
    for programs in (0, 1, 2, 3, 4):  # of a multiprocessor; 0: no splits
        splits = min(max(programs * sm_count // max(sequences, 1), 1), blocks)
        per_split = -(-blocks // splits) if splits else 0
        splits = -(-blocks // per_split) if per_split else 1
        busiest = -(-sequences * splits // sm_count)
        cost = max(0.72 * busiest * per_split, sequences * blocks / sm_count) + 0.7 * busiest
        if splits > 1:
            cost += 1.75
        if cost < best_cost:
            best, best_cost = splits, cost
    return best


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "n_kv_heads", "num_splits"])
def _decode_kernel(
    q_ptr,  # [B, Lq, Hq, D], or [Tq, Hq, D] with cu_q_ptr
    k_ptr,  # [B, Lk, Hkv, D], or [Tk, Hkv, D], or with block_table_ptr [Nb, BLOCK_SIZE, Hkv, D]
    v_ptr,
    out_ptr,  # as q but contiguous, written; SPLIT: float32 partials, see _merge_kernel
    lse_ptr,  # float32 [B, Hq, Lq] or [Hq, Tq], written; or None. Not read if SPLIT
    sinks_ptr,  # [Hq] or None
    key_start_ptr,  # int [B] or None
    key_end_ptr,
    offset_ptr,  # int [B] or [1], or None
    cu_q_ptr,  # int [B + 1], or None: batched
    cu_k_ptr,
    block_table_ptr,  # int32 [B, max_blocks]: a paged cache, only with cu_q_ptr; or None
    context_len_ptr,  # int32 [B], if and only if there is a block table
    tree_mask_ptr,  # bool [Tq, n], n <= 64, only with a block table and without CAUSAL; or None
    stride_qb: tl.int64,
    stride_qm: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kn: tl.int64,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vn: tl.int64,
    stride_vh: tl.int64,
    stride_out_b: tl.int64,
    stride_lse_b: tl.int64,
    stride_lse_h: tl.int64,
    stride_offset,
    stride_table,
    stride_tree,
    n_kv_heads,
    n_queries,  # the most of any sequence
    n_keys,
    query_offset,
    num_splits,
    scale,
    window,
    softcap,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,  # num_splits is more than 1
    ONE_QUERY: tl.constexpr,  # n_queries is 1: the range of keys says all, no mask is left
    MIXED: tl.constexpr,  # only sequences with one query; the others are the prefill kernel's
    GROUP: tl.constexpr,  # query heads of one KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # keys of a block of the paged cache; or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_inputs()
    pid = tl.program_id(0)
    kv_head = pid % n_kv_heads
    split = pid // n_kv_heads % num_splits
    b = pid // n_kv_heads // num_splits
    max_rows = n_queries * GROUP

    q_start, k_start, n_queries, key_lo, key_hi, offset = locate_sequence(
        b,
        cu_q_ptr,
        cu_k_ptr,
        key_start_ptr,
        key_end_ptr,
        offset_ptr,
        context_len_ptr,
        stride_offset,
        n_queries,
        n_keys,
        query_offset,
    )
    if MIXED:
        if n_queries != 1:
            return
    rows = tl.arange(0, BLOCK_M)
    queries = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_D)
    PAD: tl.constexpr = BLOCK_D != HEAD_DIM
    row_mask = queries < n_queries
    dim_mask = dims < HEAD_DIM
    q_ptr += b * stride_qb + q_start * stride_qm
    keys = tl.arange(0, BLOCK_N)
    if block_table_ptr is None:
        k_ptr += b * stride_kb + k_start * stride_kn + kv_head * stride_kh
        v_ptr += b * stride_vb + k_start * stride_vn + kv_head * stride_vh
    else:  # the loop adds where the blocks lie
        k_ptr += kv_head * stride_kh
        v_ptr += kv_head * stride_vh
        block_table_ptr += b.to(tl.int64) * stride_table
        keys = keys % BLOCK_SIZE
    q_ptrs = q_ptr + (queries * stride_qm + heads * stride_qh)[:, None] + dims[None, :]
    q = load_tile(q_ptrs, row_mask, dim_mask, True, PAD)
    k_ptrs = k_ptr + keys[:, None] * stride_kn + dims[None, :]
    v_ptrs = v_ptr + keys[:, None] * stride_vn + dims[None, :]
    tree = None
    if tree_mask_ptr is not None:
        tree = load_tree(tree_mask_ptr, q_start + queries, row_mask, stride_tree, n_queries)

    # the sequence's own keys are shared out here, on the device: how many there are may change
    # between the replays of a CUDA graph. Every split but the last has whole blocks
    lo, hi = needed_keys(key_lo, key_hi, offset, offset + n_queries - 1, window, CAUSAL)
    first = None
    if window is not None:
        if block_table_ptr is not None:  # tiles must not cross from block to block
            first = lo
            lo = lo // BLOCK_N * BLOCK_N
    per_split = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), num_splits), BLOCK_N) * BLOCK_N
    lo += split * per_split
    hi = tl.minimum(hi, lo + per_split)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        if split == 0:  # a key with this score and the value 0
            row_max = tl.load(sinks_ptr + heads, mask=row_mask, other=0.0).to(tl.float32) * _LOG2_E
            row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    if ONE_QUERY:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, k_ptrs, v_ptrs, block_table_ptr,
            stride_kb, stride_kn, stride_vb, stride_vn, lo, hi, first,
            queries, None, None, scale, None, softcap,
            True, False, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, k_ptrs, v_ptrs, block_table_ptr,
            stride_kb, stride_kn, stride_vb, stride_vn, lo, hi, first,
            offset + queries, tree, offset, scale, window, softcap,
            True, CAUSAL, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, lse = finish(acc, row_sum, row_max)

    mask = row_mask[:, None] & dim_mask[None, :] if PAD else row_mask[:, None]
    if SPLIT:
        first_row = pid.to(tl.int64) * max_rows
        lse_ptrs = (
            out_ptr + tl.num_programs(0).to(tl.int64) * max_rows * HEAD_DIM + first_row + rows
        )
        tl.store(lse_ptrs, lse, mask=row_mask)
        out_ptrs = out_ptr + (first_row + rows)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptrs, acc, mask=mask)
    else:
        n_heads = n_kv_heads * GROUP
        out_rows = (q_start + queries) * n_heads + heads
        out_ptrs = out_ptr + b * stride_out_b + out_rows[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None:
            lse_ptr += b * stride_lse_b + q_start
            tl.store(lse_ptr + heads * stride_lse_h + queries, lse * LN_2, mask=row_mask)


@triton.jit(
    do_not_specialize=[
        "stride_lse_b",
        "stride_lse_h",
        "n_queries",
        "n_kv_heads",
        "num_splits",
        "n_partials",
    ]
)
def _merge_kernel(
    # float32: outputs [B, num_splits, Hkv, Lq, GROUP, D], each a softmax of its own keys, then
    # their log-sum-exp [B, num_splits, Hkv, Lq, GROUP] in units of log2
    partial_ptr,
    out_ptr,  # [B, Lq, Hq, D] or [Tq, Hq, D], written
    lse_ptr,  # float32 [B, Hq, Lq] or [Hq, Tq], written; or None
    cu_q_ptr,  # int [B + 1], or None: batched
    stride_out_b: tl.int64,
    stride_lse_b: tl.int64,
    stride_lse_h: tl.int64,
    n_kv_heads,
    n_queries,
    num_splits,
    n_partials,  # rows of partial outputs
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_inputs()
    pid = tl.program_id(0)
    max_rows = n_queries * GROUP
    row = pid % max_rows
    kv_head = pid // max_rows % n_kv_heads
    b = pid // max_rows // n_kv_heads
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    q_start = b.to(tl.int64) * 0
    if cu_q_ptr is not None:
        q_start = tl.load(cu_q_ptr + b).to(tl.int64)
        n_own = tl.load(cu_q_ptr + b + 1) - q_start
        if (query >= n_own) | (n_own > n_queries):  # more: the prefill kernel's
            return

    splits = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    first = (b.to(tl.int64) * num_splits * n_kv_heads + kv_head) * max_rows + row
    stride_split = n_kv_heads * max_rows
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    top = float("-inf")
    for start in range(0, num_splits, BLOCK_S):
        split_mask = start + splits < num_splits
        rows = first + (start + splits) * stride_split
        lse_ptrs = partial_ptr + n_partials.to(tl.int64) * HEAD_DIM + rows
        lse = tl.load(lse_ptrs, mask=split_mask, other=float("-inf"))
        mask = split_mask[:, None] & dim_mask[None, :]
        part = tl.load(partial_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: not -inf - -inf
        decay = tl.exp2(top - shift)
        weights = tl.exp2(lse - shift)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(part * weights[:, None], 0)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)

    out_ptr += b * stride_out_b + ((q_start + query) * n_kv_heads * GROUP + head) * HEAD_DIM
    tl.store(out_ptr + dims, acc.to(out_ptr.dtype.element_ty), mask=dim_mask)
    if lse_ptr is not None:
        lse_ptr += b * stride_lse_b + head * stride_lse_h + q_start + query
        tl.store(lse_ptr, (top + tl.log2(total)) * LN_2)
