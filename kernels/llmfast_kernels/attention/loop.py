"""What both attention kernels share: where a sequence lies, which keys it needs, and the loop."""

from __future__ import annotations

import triton
import triton.language as tl

# arguments that change from call to call and that no variant should be compiled for
NOT_SPECIALIZED = (
    "stride_lse_b",
    "stride_lse_h",
    "stride_offset",
    "stride_table",
    "stride_tree",
    "n_queries",
    "n_keys",
    "query_offset",
    "window",
)
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E): the hardware has exp2
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


def pad_head_dim(head_dim: int) -> int:
    """The width of a tile: a power of 2, at least what a product of matrices takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def shared_bytes(
    block_m: int, block_n: int, num_stages: int, head_dim: int, element_size: int
) -> int:
    """An upper bound of the shared memory of one program.

    It holds the queries and, for each stage that is loaded ahead, a block of K and one of V.
    From 64 rows on, Hopper multiplies straight from shared memory, which keeps one stage more;
    below, the weights pass through shared memory on their way to the product with V.
    """
    stages, weights = num_stages, 0
    if block_m < 64:
        stages, weights = max(num_stages - 1, 1), block_m * block_n
    rows = block_m + 2 * stages * block_n
    reductions = 2048  # and barriers; 1,024 is the most seen
    return (rows * pad_head_dim(head_dim) + weights) * element_size + reductions


@triton.jit
def locate_sequence(
    b,
    cu_q_ptr,  # int [B + 1], or None: batched
    cu_k_ptr,
    key_start_ptr,  # int [B] or None
    key_end_ptr,
    offset_ptr,  # int [B] or [1], or None: query_offset holds it
    context_len_ptr,  # int32 [B]: the keys of a paged cache; or None. Then cu_k_ptr is not read
    stride_offset,
    n_queries,
    n_keys,
    query_offset,
):
    """The rows where sequence b starts in q and k, its lengths, its range of keys, its offset."""
    q_start = b.to(tl.int64) * 0
    k_start = q_start
    if cu_q_ptr is not None:
        q_start = tl.load(cu_q_ptr + b).to(tl.int64)
        n_queries = (tl.load(cu_q_ptr + b + 1) - q_start).to(tl.int32)
        if context_len_ptr is None:
            k_start = tl.load(cu_k_ptr + b).to(tl.int64)
            n_keys = (tl.load(cu_k_ptr + b + 1) - k_start).to(tl.int32)
        else:
            n_keys = tl.load(context_len_ptr + b)
        query_offset = n_keys - n_queries
    if offset_ptr is not None:
        query_offset = tl.load(offset_ptr + b * stride_offset).to(tl.int32)
    key_lo = 0
    if key_start_ptr is not None:
        key_lo = tl.maximum(tl.load(key_start_ptr + b).to(tl.int32), 0)
    key_hi = n_keys
    if key_end_ptr is not None:
        key_hi = tl.minimum(tl.load(key_end_ptr + b).to(tl.int32), n_keys)
    return q_start, k_start, n_queries, key_lo, key_hi, query_offset


@triton.jit
def needed_keys(key_lo, key_hi, first_pos, last_pos, window, CAUSAL: tl.constexpr):
    """The range of keys that queries at positions first_pos to last_pos attend together."""
    if CAUSAL:
        key_hi = tl.minimum(key_hi, last_pos + 1)
    if window is not None:
        key_lo = tl.maximum(key_lo, first_pos - window + 1)
    return key_lo, key_hi


@triton.jit
def load_tile(ptrs, row_mask, col_mask, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Load ``[rows, cols]``; what is masked is not read and counts as 0."""
    if MASK_ROWS and MASK_COLS:
        tile = tl.load(ptrs, mask=row_mask[:, None] & col_mask[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(ptrs, mask=row_mask[:, None], other=0.0)
    elif MASK_COLS:
        tile = tl.load(ptrs, mask=col_mask[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def load_tree(tree_mask_ptr, tokens, row_mask, stride_tree, n_queries):
    """Each query's row of the tree mask, as the bits of an integer: 64 new tokens at most."""
    new = tl.arange(0, 64)[None, :]
    mask = row_mask[:, None] & (new < n_queries)
    allowed = tl.load(tree_mask_ptr + (tokens * stride_tree)[:, None] + new, mask=mask, other=0)
    return tl.sum(allowed.to(tl.int64) << new.to(tl.int64), 1)


@triton.jit
def load_blocks(block_table_ptr, start, hi, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the table has the keys from start on: one block for the tile, or one for each key."""
    if BLOCK_N <= BLOCK_SIZE:
        keys = start
    else:
        keys = start + tl.arange(0, BLOCK_N)[:, None]
    return tl.load(block_table_ptr + keys // BLOCK_SIZE, mask=keys < hi, other=0)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    y = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    if PRECISE:
        # the difference above cancels near 0; there the series is good to float32's last bit
        s = x * x
        series = 0.13333333333333333 + s * (-0.05396825396825397 + s * 0.021869488536155203)
        y = tl.where(s < 0.0625, x + x * s * (-0.3333333333333333 + s * series), y)
    return y


@triton.jit
def attend(
    acc,  # float32 [BLOCK_M, BLOCK_D], sum of weighted values
    row_sum,  # float32 [BLOCK_M], sum of weights
    row_max,  # float32 [BLOCK_M], largest score so far in units of log2
    q,  # [BLOCK_M, BLOCK_D]
    k_ptrs,  # [BLOCK_N, BLOCK_D], the sequence's first keys; with a block table the cache's
    v_ptrs,
    block_table_ptr,  # int32 [max_blocks], the sequence's; or None: its keys lie in a row
    stride_kb,
    stride_kn,
    stride_vb,
    stride_vn,
    lo,
    hi,
    first,  # the first key that is attended, where lo is rounded down; or None
    pos,  # int32 [BLOCK_M], the positions of the queries
    tree,  # int64 [BLOCK_M], bit j: the query attends the key first_new + j; or None
    first_new,
    scale,  # times LOG2_E, or divided by the soft cap if there is one
    window,  # int or None
    softcap,  # times LOG2_E, or None
    MASKED: tl.constexpr,  # False: every query attends every key of the range, whole blocks
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One pass of online softmax over the keys lo to hi."""
    cols = tl.arange(0, BLOCK_N)
    dim_mask = tl.arange(0, BLOCK_D) < HEAD_DIM
    PAD: tl.constexpr = BLOCK_D != HEAD_DIM
    if block_table_ptr is not None:
        blocks = load_blocks(block_table_ptr, lo, hi, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(lo, hi, BLOCK_N):
        keys = start + cols
        in_range = keys < hi
        if first is not None:
            in_range = in_range & (keys >= first)
        if block_table_ptr is None:
            k_offset, v_offset = start * stride_kn, start * stride_vn
        else:
            inside = start % BLOCK_SIZE  # 0 if a tile holds several blocks
            k_offset = blocks.to(tl.int64) * stride_kb + inside * stride_kn
            v_offset = blocks.to(tl.int64) * stride_vb + inside * stride_vn
            # read a tile ahead: Triton pipelines loads that wait for a load only half as deep
            blocks = load_blocks(block_table_ptr, start + BLOCK_N, hi, BLOCK_SIZE, BLOCK_N)
        k = load_tile(k_ptrs + k_offset, in_range, dim_mask, MASKED, PAD)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if softcap is not None:
            scores = softcap * tanh(scores * scale, q.dtype == tl.float32)
        if MASKED:
            keep = in_range[None, :]
            if CAUSAL:
                keep = keep & (keys[None, :] <= pos[:, None])
            if window is not None:
                keep = keep & (keys[None, :] > pos[:, None] - window)
            if tree is not None:
                new = (keys - first_new)[None, :]
                keep = keep & ((new < 0) | (tree[:, None] >> (new & 63) & 1 != 0))
            scores = tl.where(keep, scores, float("-inf"))

        # without a soft cap the scale waits for exp2's argument, where it costs nothing
        if softcap is not None:
            new_max = tl.maximum(row_max, tl.max(scores, 1))
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        shift = new_max
        if MASKED:
            # a row that has met no key yet: -inf minus -inf would be NaN
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        if softcap is not None:
            weights = tl.exp2(scores - shift[:, None])
        else:
            weights = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
        v = load_tile(v_ptrs + v_offset, in_range, dim_mask, MASKED, PAD)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, row_sum, row_max


@triton.jit
def finish(acc, row_sum, row_max):
    """Divide by the sum of weights; the log-sum-exp in units of log2. No key gives 0 and -inf."""
    lse = row_max + tl.log2(row_sum)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    return acc, lse
