"""Attention of many queries: one program for a block of queries of one head."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

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
)

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@dataclass(frozen=True)
class PrefillLaunch:
    """How the queries of one head are cut into programs."""

    block_m: int  # queries of a program
    block_n: int  # keys of a step of its loop
    num_warps: int
    num_stages: int
    heads_first: bool = False  # neighbouring programs: heads of one block, or blocks of one head


def choose_prefill_launch(
    *, n_queries: int, head_dim: int, element_size: int, shared_memory: int
) -> PrefillLaunch:
    """Pick the launch for ``n_queries`` a sequence. Pure: it asks no device.

    ``shared_memory`` is what one program may use, in bytes.
    """
    width = pad_head_dim(head_dim)
    large = shared_memory >= 200 * 1024  # Hopper, and Blackwell for data centres
    if element_size == 4:  # full precision has no tensor cores: larger tiles only spill registers
        return PrefillLaunch(32, 32 if width <= 64 else 16, 8, 2)
    if width > 128:
        return (
            PrefillLaunch(128, 64, 8, 2)
            if large and n_queries > 64
            else PrefillLaunch(64, 32, 8, 2)
        )
    if large:
        # two programs an SM hide each other's softmax: on an H100 2 to 20% ahead of tiles of 128
        # rows below 16,384 queries. Long loops gain from neighbours that read the same keys
        return PrefillLaunch(64, 64, 4, 3, heads_first=n_queries >= 2048)
    if n_queries <= 64:
        return PrefillLaunch(64, 64, 4, 3 if width <= 64 else 2)
    return PrefillLaunch(128, 64, 8, 2 if width == 128 else 3)


@triton.jit
def find_block(index, cu_q_ptr, batch, BLOCK_M: tl.constexpr):
    """The sequence and the block of its queries at ``index``, of those with several queries.

    All blocks of such sequences are counted in order; past the last the sequence is ``batch``.
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
    q_ptr,  # [B, Lq, Hq, D], or [Tq, Hq, D] with cu_q_ptr
    k_ptr,  # [B, Lk, Hkv, D], or [Tk, Hkv, D], or with block_table_ptr [Nb, BLOCK_SIZE, Hkv, D]
    v_ptr,
    out_ptr,  # as q but contiguous, written
    lse_ptr,  # float32 [B, Hq, Lq] or [Hq, Tq], written; or None
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
    n_heads,  # Hq
    batch,  # read only if MIXED
    n_queries,  # the most of any sequence
    n_keys,
    query_offset,
    scale,
    window,
    softcap,
    CAUSAL: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    MIXED: tl.constexpr,  # only sequences with several queries, the grid as find_block counts
    GROUP: tl.constexpr,  # query heads of one KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # keys of a block of the paged cache; or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    if MIXED:
        index = (tl.num_programs(0) - 1 - pid) // n_heads  # the last first, as below
        head = pid % n_heads
        b, block = find_block(index, cu_q_ptr, batch, BLOCK_M)
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
    m_start = block * BLOCK_M
    if m_start >= n_queries:
        return

    rows = m_start + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    PAD: tl.constexpr = BLOCK_D != HEAD_DIM
    row_mask = rows < n_queries
    dim_mask = dims < HEAD_DIM
    q_ptr += b * stride_qb + q_start * stride_qm + head * stride_qh
    keys = tl.arange(0, BLOCK_N)
    if block_table_ptr is None:
        k_ptr += b * stride_kb + k_start * stride_kn + (head // GROUP) * stride_kh
        v_ptr += b * stride_vb + k_start * stride_vn + (head // GROUP) * stride_vh
    else:  # the loop adds where the blocks lie
        k_ptr += (head // GROUP) * stride_kh
        v_ptr += (head // GROUP) * stride_vh
        block_table_ptr += b.to(tl.int64) * stride_table
        keys = keys % BLOCK_SIZE
    q = load_tile(q_ptr + rows[:, None] * stride_qm + dims[None, :], row_mask, dim_mask, True, PAD)
    k_ptrs = k_ptr + keys[:, None] * stride_kn + dims[None, :]
    v_ptrs = v_ptr + keys[:, None] * stride_vn + dims[None, :]
    tree = None
    if tree_mask_ptr is not None:
        tree = load_tree(tree_mask_ptr, q_start + rows, row_mask, stride_tree, n_queries)

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
    if tree_mask_ptr is not None:
        free = tl.minimum(hi, offset)
    main = lead + tl.maximum(free - lead, 0) // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if sinks_ptr is None:
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
    else:  # a key with this score and the value 0
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E
        row_max = tl.zeros([BLOCK_M], tl.float32) + sink
        row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    if window is not None:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, k_ptrs, v_ptrs, block_table_ptr,
            stride_kb, stride_kn, stride_vb, stride_vn, lo, lead, first,
            pos, tree, offset, scale, window, softcap,
            True, CAUSAL, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, k_ptrs, v_ptrs, block_table_ptr,
        stride_kb, stride_kn, stride_vb, stride_vn, lead, main, first,
        pos, tree, offset, scale, window, softcap,
        False, CAUSAL, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, k_ptrs, v_ptrs, block_table_ptr,
        stride_kb, stride_kn, stride_vb, stride_vn, main, hi, first,
        pos, tree, offset, scale, window, softcap,
        True, CAUSAL, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, lse = finish(acc, row_sum, row_max)

    out_ptr += b * stride_out_b + (q_start * n_heads + head) * HEAD_DIM
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * (n_heads * HEAD_DIM) + dims[None, :]
    mask = row_mask[:, None] & dim_mask[None, :] if PAD else row_mask[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        lse_ptr += b * stride_lse_b + head * stride_lse_h + q_start
        tl.store(lse_ptr + rows, lse * LN_2, mask=row_mask)
