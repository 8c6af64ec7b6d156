"""Attention of many queries: one program for a block of queries of one head."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ...common.device import Device
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
)

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@dataclass(frozen=True)
class PrefillLaunch:
    """The division of one head's queries into programs."""

    block_m: int  # queries per program
    block_n: int  # keys per step of its loop
    num_warps: int
    num_stages: int
    heads_first: bool = (
        False  # neighbouring programs take heads of one block, else blocks of one head
    )


def choose_prefill_launch(
    *, n_queries: int, head_dim: int, element_size: int, device: Device
) -> PrefillLaunch:
    """Choose the launch for ``n_queries`` per sequence. Pure: it asks no device."""
    width = pad_head_dim(head_dim)
    large = device.shared_memory >= 200 * 1024  # Hopper, and Blackwell for data centres
    if element_size == 4:  # full precision has no tensor cores: larger tiles only spill registers
        return PrefillLaunch(32, 32 if width <= 64 else 16, 8, 2)
    if width > 128:
        return (
            PrefillLaunch(128, 64, 8, 2)
            if large and n_queries > 64
            else PrefillLaunch(64, 32, 8, 2)
        )
    if large:
        # two programs per SM hide each other's softmax: on an H100 2 to 20% faster than tiles of
        # 128 rows below 16,384 queries
        heads_first = n_queries >= CONSTANTS.of(device).prefill_heads_first
        return PrefillLaunch(64, 64, 4, 3, heads_first)
    if n_queries <= 64:
        return PrefillLaunch(64, 64, 4, 3 if width <= 64 else 2)
    return PrefillLaunch(128, 64, 8, 2 if width == 128 else 3)


@triton.jit
def find_block(index, cu_q_ptr, batch, BLOCK_M: tl.constexpr):
    """Return the sequence and the block of its queries that program ``index`` takes.

    The blocks of all sequences with several queries are numbered in order. Past the last one the
    sequence is ``batch``.
    """
    b = 0
    before = 0  # blocks of the sequences before b
    total = 0
    for start in range(0, batch, 256):
        rows = start + tl.arange(0, 256)
        inside = rows < batch
        first = tl.load(cu_q_ptr + rows, mask=inside, other=0)
        n_queries = tl.load(cu_q_ptr + rows + 1, mask=inside, other=0) - first
        blocks = tl.where(n_queries > 1, tl.cdiv(n_queries, BLOCK_M), 0)
        passed = total + tl.cumsum(blocks, 0) <= index
        b += tl.sum((passed & inside).to(tl.int32), 0)
        before += tl.sum(tl.where(passed, blocks, 0), 0)
        total += tl.sum(blocks, 0)
    return b, index - before


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "n_heads", "batch"])
def _prefill_kernel(
    q: Heads,
    k: Heads,
    v: Heads,
    out: Output,
    sequences: Sequences,
    scoring: Scoring,
    stride_lse_h,
    stride_offset,
    stride_table,
    stride_tree,
    n_heads,  # Hq
    batch,  # read only if MIXED
    n_queries,  # the most of any sequence
    n_keys,
    query_offset,
    window,
    CAUSAL: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    MIXED: tl.constexpr,  # only sequences with several queries, the grid as find_block counts
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # keys in a block of the paged cache; or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend with one block of queries of one head, over all of its keys."""
    BLOCK_D: tl.constexpr = pad_head_dim(HEAD_DIM)
    pid = tl.program_id(0)
    if MIXED:
        index = (tl.num_programs(0) - 1 - pid) // n_heads  # the last first, as below
        head = pid % n_heads
        b, block = find_block(index, sequences.cu_q_ptr, batch, BLOCK_M)
        if b == batch:
            return
    else:
        n_blocks = tl.cdiv(n_queries, BLOCK_M)
        if HEADS_FIRST:
            n_rest = tl.num_programs(0) // n_blocks
            block = pid // n_rest
            head = pid % n_rest
        else:
            block = pid % n_blocks
            head = pid // n_blocks
        if CAUSAL:
            block = n_blocks - 1 - block  # the last queries have the most keys: start them first
        b = head // n_heads
        head = head % n_heads

    max_queries = n_queries
    q_start, k_start, n_queries, key_lo, key_hi, offset = locate_sequence(
        b, sequences, stride_offset, n_queries, n_keys, query_offset, window
    )
    m_start = block * BLOCK_M
    if m_start >= n_queries:
        return

    rows = m_start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    PAD: tl.constexpr = BLOCK_D != HEAD_DIM
    row_mask = rows < n_queries
    dim_mask = dims < HEAD_DIM
    # int64: a sequence's or a token's number times its stride passes 2**31
    b64, kv_head = b.to(tl.int64), (head // GROUP).to(tl.int64)
    q_ptr = q.ptr + b64 * q.stride_b + q_start * q.stride_m + head.to(tl.int64) * q.stride_h
    k_ptr = k.ptr + kv_head * k.stride_h
    v_ptr = v.ptr + kv_head * v.stride_h
    keys = tl.arange(0, BLOCK_N)
    block_table_ptr = sequences.block_table_ptr
    if block_table_ptr is None:
        k_ptr += b64 * k.stride_b + k_start * k.stride_m
        v_ptr += b64 * v.stride_b + k_start * v.stride_m
    else:  # the loop adds where the blocks lie
        block_table_ptr += b64 * stride_table
        keys = keys % BLOCK_SIZE
    q_rows = rows[:, None].to(tl.int64) * q.stride_m
    q_tile = load_tile(q_ptr + q_rows + dims[None, :], row_mask, dim_mask, True, PAD)
    keys = keys[:, None].to(tl.int64)
    k_ptrs = k_ptr + keys * k.stride_m + dims[None, :]
    v_ptrs = v_ptr + keys * v.stride_m + dims[None, :]
    tree = None
    if sequences.tree_mask_ptr is not None:
        tree = load_tree(sequences.tree_mask_ptr, q_start + rows, row_mask, stride_tree, n_queries)

    # keys lo to lead are masked on the window's side, lead to main are whole blocks that every
    # query attends, main to hi are masked on the diagonal and at the end
    pos = offset + rows
    first_pos = offset + m_start
    last_pos = offset + tl.minimum(m_start + BLOCK_M, n_queries) - 1
    lo, hi = needed_keys(key_lo, key_hi, first_pos, last_pos, window, CAUSAL)
    first = None
    if window is not None:
        if block_table_ptr is not None:  # tiles must not cross from block to block
            first = lo
            lo = lo // BLOCK_N * BLOCK_N
    lead = lo
    if window is not None:
        lead += tl.cdiv(tl.maximum(last_pos - window + 1 - lo, 0), BLOCK_N) * BLOCK_N
        lead = tl.minimum(lead, hi)
    free = hi
    if CAUSAL:
        free = tl.minimum(hi, first_pos + 1)
    if sequences.tree_mask_ptr is not None:
        free = tl.minimum(hi, offset)
    main = lead + tl.maximum(free - lead, 0) // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if scoring.sinks_ptr is None:
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
    else:  # a key with this score and the value 0
        sink = tl.load(scoring.sinks_ptr + head).to(tl.float32) * _LOG2_E
        row_max = tl.zeros([BLOCK_M], tl.float32) + sink
        row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    if window is not None:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q_tile, k, v, k_ptrs, v_ptrs, block_table_ptr,
            lo, lead, first, pos, tree, offset, scoring, window,
            True, CAUSAL, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q_tile, k, v, k_ptrs, v_ptrs, block_table_ptr,
        lead, main, first, pos, tree, offset, scoring, window,
        False, CAUSAL, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q_tile, k, v, k_ptrs, v_ptrs, block_table_ptr,
        main, hi, first, pos, tree, offset, scoring, window,
        True, CAUSAL, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, lse = finish(acc, row_sum, row_max)

    out_row = first_row(b, q_start, max_queries, sequences)
    out_ptr = out.ptr + out_row * (n_heads * HEAD_DIM) + head * HEAD_DIM
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * (n_heads * HEAD_DIM) + dims[None, :]
    mask = row_mask[:, None] & dim_mask[None, :] if PAD else row_mask[:, None]
    tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=mask)
    if out.lse_ptr is not None:
        lse_ptr = lse_rows(out.lse_ptr, b, head, q_start, n_heads, stride_lse_h, sequences)
        tl.store(lse_ptr + rows, lse * LN_2, mask=row_mask)
