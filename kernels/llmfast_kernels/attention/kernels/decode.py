"""Attention of few queries over many keys: split-KV decoding (flash-decoding), then a merge."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from ...common.device import Device
from ...common.pdl import wait_for_inputs
from ..tables import CONSTANTS
from .arguments import (
    NOT_SPECIALIZED,
    Heads,
    Output,
    Scoring,
    Sequences,
    first_row,
    locate_sequence,
    lse_rows,
)
from .loop import (
    LN_2,
    LOG2_E,
    attend,
    finish,
    load_tile,
    load_tree,
    needed_keys,
    pad_head_dim,
    shared_bytes,
)

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@dataclass(frozen=True)
class DecodeLaunch:
    """The division of one KV head's keys into programs."""

    block_m: int  # rows: queries times query heads per KV head
    block_n: int  # keys per step of the loop
    num_splits: int  # programs that share the keys of one KV head of one sequence
    num_warps: int
    num_stages: int


def max_rows(element_size: int) -> int:
    """Return how many rows one program takes at most: queries times query heads per KV head."""
    return 32 if element_size == 4 else 64


@functools.lru_cache(maxsize=4096)
def choose_decode_launch(
    *,
    sequences: int,
    rows: int,
    key_blocks: int,
    head_dim: int,
    element_size: int,
    device: Device,
) -> DecodeLaunch:
    """Choose the launch for ``sequences`` times ``rows``. Pure: it asks no device.

    ``sequences`` counts KV heads too; ``key_blocks`` is the longest sequence's keys in units of 64.
    """
    block_m = max(16, triton.next_power_of_2(rows))
    width = pad_head_dim(head_dim)
    if element_size == 4:  # full precision has no tensor cores: larger tiles only spill registers
        block_n, num_warps, num_stages = 32 if block_m == 16 else 16, 8, 2
    else:  # a stage of 32 KiB of K and V; three of them in flight where they fit
        block_n = min(128, 8192 // width)
        num_warps = 8 if block_m == 64 and width >= 128 else 4
        num_stages = 2 if block_m == 64 else 4
        limit = device.shared_memory
        while shared_bytes(block_m, block_n, num_stages, head_dim, element_size) > limit:
            num_stages -= 1
    splits = _choose_splits(sequences, -(-key_blocks * 64 // block_n), device)
    return DecodeLaunch(block_m, block_n, splits, num_warps, num_stages)


def _choose_splits(sequences: int, blocks: int, device: Device) -> int:
    """Return the number of splits that ends first; costs are in the units of :mod:`.tables`.

    One SM reads faster than its share of the bandwidth, so not all SMs need work, but none may have
    much more to do than the others.
    """
    constants, sm_count = CONSTANTS.of(device), device.sm_count
    best, best_cost = 1, float("inf")
    for programs in (0, 1, 2, 3, 4):  # per SM; 0: no splits
        splits = min(max(programs * sm_count // max(sequences, 1), 1), blocks)
        per_split = -(-blocks // splits) if splits else 0
        splits = -(-blocks // per_split) if per_split else 1
        busiest = -(-sequences * splits // sm_count)  # programs of the SM that has the most
        cost = max(constants.decode_block * busiest * per_split, sequences * blocks / sm_count)
        cost += constants.decode_program * busiest
        if splits > 1:
            cost += constants.decode_merge
        if cost < best_cost:
            best, best_cost = splits, cost
    return best


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "n_kv_heads", "num_splits"])
def _decode_kernel(
    q: Heads,
    k: Heads,
    v: Heads,
    out: Output,  # SPLIT: float32 partials, see _merge_kernel; then lse_ptr is not read
    sequences: Sequences,
    scoring: Scoring,
    stride_lse_h,
    stride_offset,
    stride_table,
    stride_tree,
    n_kv_heads,
    n_queries,  # the most of any sequence
    n_keys,
    query_offset,
    num_splits,
    window,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,  # num_splits is more than 1
    ONE_QUERY: tl.constexpr,  # n_queries is 1: the range of keys says all, no mask is left
    MIXED: tl.constexpr,  # only sequences with one query; the prefill kernel takes the others
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # keys in a block of the paged cache; or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend with all queries of one KV head of one sequence, over one split of its keys."""
    wait_for_inputs()
    BLOCK_D: tl.constexpr = pad_head_dim(HEAD_DIM)
    pid = tl.program_id(0)
    kv_head = pid % n_kv_heads
    split = pid // n_kv_heads % num_splits
    b = pid // n_kv_heads // num_splits
    max_queries = n_queries

    q_start, k_start, n_queries, key_lo, key_hi, offset = locate_sequence(
        b, sequences, stride_offset, n_queries, n_keys, query_offset, window
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
    # int64: a sequence's or a token's number times its stride passes 2**31
    batch = b.to(tl.int64)
    q_ptr = q.ptr + batch * q.stride_b + q_start * q.stride_m
    k_ptr = k.ptr + kv_head.to(tl.int64) * k.stride_h
    v_ptr = v.ptr + kv_head.to(tl.int64) * v.stride_h
    keys = tl.arange(0, BLOCK_N)
    block_table_ptr = sequences.block_table_ptr
    if block_table_ptr is None:
        k_ptr += batch * k.stride_b + k_start * k.stride_m
        v_ptr += batch * v.stride_b + k_start * v.stride_m
    else:  # the loop adds where the blocks lie
        block_table_ptr += batch * stride_table
        keys = keys % BLOCK_SIZE
    q_rows = queries.to(tl.int64) * q.stride_m + heads.to(tl.int64) * q.stride_h
    q_tile = load_tile(q_ptr + q_rows[:, None] + dims[None, :], row_mask, dim_mask, True, PAD)
    keys = keys[:, None].to(tl.int64)
    k_ptrs = k_ptr + keys * k.stride_m + dims[None, :]
    v_ptrs = v_ptr + keys * v.stride_m + dims[None, :]
    tree = None
    if sequences.tree_mask_ptr is not None:
        tree = load_tree(
            sequences.tree_mask_ptr, q_start + queries, row_mask, stride_tree, n_queries
        )

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
    if scoring.sinks_ptr is not None:
        if split == 0:  # a key with this score and the value 0
            sinks = tl.load(scoring.sinks_ptr + heads, mask=row_mask, other=0.0)
            row_max = sinks.to(tl.float32) * _LOG2_E
            row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    if ONE_QUERY:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q_tile, k, v, k_ptrs, v_ptrs, block_table_ptr,
            lo, hi, first, queries, None, None, scoring, None,
            True, False, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q_tile, k, v, k_ptrs, v_ptrs, block_table_ptr,
            lo, hi, first, offset + queries, tree, offset, scoring, window,
            True, CAUSAL, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, lse = finish(acc, row_sum, row_max)

    mask = row_mask[:, None] & dim_mask[None, :] if PAD else row_mask[:, None]
    if SPLIT:
        max_rows = max_queries * GROUP
        first_partial = pid.to(tl.int64) * max_rows
        n_partials = tl.num_programs(0).to(tl.int64) * max_rows
        lse_ptrs = out.ptr + n_partials * HEAD_DIM + first_partial + rows
        tl.store(lse_ptrs, lse, mask=row_mask)
        out_ptrs = out.ptr + (first_partial + rows)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptrs, acc, mask=mask)
    else:
        n_heads = n_kv_heads * GROUP
        out_rows = first_row(b, q_start, max_queries, sequences) + queries
        out_ptrs = out.ptr + (out_rows * n_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=mask)
        if out.lse_ptr is not None:
            lse_ptrs = lse_rows(out.lse_ptr, b, heads, q_start, n_heads, stride_lse_h, sequences)
            tl.store(lse_ptrs + queries, lse * LN_2, mask=row_mask)


@triton.jit(
    do_not_specialize=["stride_lse_h", "n_kv_heads", "n_queries", "num_splits", "n_partials"]
)
def _merge_kernel(
    out: Output,
    sequences: Sequences,
    # float32: outputs [B, num_splits, Hkv, Lq, GROUP, D], each a softmax of its own keys, then
    # their log-sum-exp [B, num_splits, Hkv, Lq, GROUP] in units of log2
    partial_ptr,
    stride_lse_h,
    n_kv_heads,
    n_queries,
    num_splits,
    n_partials,  # rows of partial outputs
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the splits of one query of one head, each weighted by its own sum of weights."""
    wait_for_inputs()
    BLOCK_D: tl.constexpr = pad_head_dim(HEAD_DIM)
    pid = tl.program_id(0)
    max_rows = n_queries * GROUP
    row = pid % max_rows
    kv_head = pid // max_rows % n_kv_heads
    b = pid // max_rows // n_kv_heads
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    q_start = b.to(tl.int64) * 0
    if sequences.cu_q_ptr is not None:
        q_start = tl.load(sequences.cu_q_ptr + b).to(tl.int64)
        n_own = tl.load(sequences.cu_q_ptr + b + 1) - q_start
        if (query >= n_own) | (n_own > n_queries):  # more: the prefill kernel has them
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

    out_row = first_row(b, q_start, n_queries, sequences) + query
    out_ptr = out.ptr + (out_row * n_kv_heads * GROUP + head) * HEAD_DIM
    tl.store(out_ptr + dims, acc.to(out.ptr.dtype.element_ty), mask=dim_mask)
    if out.lse_ptr is not None:
        n_heads = n_kv_heads * GROUP
        lse_ptr = lse_rows(out.lse_ptr, b, head, q_start, n_heads, stride_lse_h, sequences)
        tl.store(lse_ptr + query, (top + tl.log2(total)) * LN_2)
