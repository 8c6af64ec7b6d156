"""The loop over keys that both attention kernels share: online softmax over tiles of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Heads, Scoring

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E): the hardware has exp2
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def pad_head_dim(head_dim):
    """Return the width of a tile: a power of 2, at least the 16 that tl.dot takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def shared_bytes(
    block_m: int, block_n: int, num_stages: int, head_dim: int, element_size: int
) -> int:
    """Return an upper bound of the shared memory of one program, in bytes.

    It holds the queries and, for each stage that is loaded ahead, a block of K and one of V.
    From 64 rows on, Hopper multiplies straight from shared memory, which keeps one stage more.
    Below, the weights pass through shared memory on their way to the product with V.
    """
    stages, weights = num_stages, 0
    if block_m < 64:
        stages, weights = max(num_stages - 1, 1), block_m * block_n
    rows = block_m + 2 * stages * block_n
    reductions = 2048  # and barriers; 1,024 is the most seen
    width: int = pad_head_dim(head_dim)
    return (rows * width + weights) * element_size + reductions


@triton.jit
def needed_keys(key_lo, key_hi, first_pos, last_pos, window, CAUSAL: tl.constexpr):
    """Return the range of keys that queries at positions first_pos to last_pos attend together."""
    if CAUSAL:
        key_hi = tl.minimum(key_hi, last_pos + 1)
    if window is not None:
        key_lo = tl.maximum(key_lo, first_pos - window + 1)
    return key_lo, key_hi


@triton.jit
def load_tile(ptrs, row_mask, col_mask, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Load ``[rows, cols]``; masked elements are not read and count as 0."""
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
    """Load each query's row of the tree mask into the bits of an int64: 64 new tokens at most."""
    new = tl.arange(0, 64)[None, :]
    mask = row_mask[:, None] & (new < n_queries)
    allowed = tl.load(tree_mask_ptr + (tokens * stride_tree)[:, None] + new, mask=mask, other=0)
    return tl.sum(allowed.to(tl.int64) << new.to(tl.int64), 1)


@triton.jit
def load_blocks(block_table_ptr, start, hi, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load the block numbers of the keys from start on: one for the tile, or one for each key."""
    if BLOCK_N <= BLOCK_SIZE:
        keys = start
    else:
        keys = start + tl.arange(0, BLOCK_N)[:, None]
    return tl.load(block_table_ptr + keys // BLOCK_SIZE, mask=keys < hi, other=0)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """Compute tanh with exp2; PRECISE: to float32's last bit near 0 too."""
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
    k: Heads,  # its strides
    v: Heads,
    k_ptrs,  # [BLOCK_N, BLOCK_D], the sequence's first keys; with a block table the cache's
    v_ptrs,
    block_table_ptr,  # int32 [max_blocks], the sequence's; or None: its keys lie in a row
    lo,
    hi,
    first,  # the first key that is attended, where lo is rounded down; or None
    pos,  # int32 [BLOCK_M], the positions of the queries
    tree,  # int64 [BLOCK_M], bit j: the query attends the key first_new + j; or None
    first_new,
    scoring: Scoring,
    window,  # int or None
    MASKED: tl.constexpr,  # False: every query attends every key of the range, whole blocks
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Run one pass of online softmax over the keys lo to hi; return acc, row_sum and row_max."""
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
            at = tl.cast(start, tl.int64)
            k_offset, v_offset = at * k.stride_m, at * v.stride_m
        else:
            inside = tl.cast(start % BLOCK_SIZE, tl.int64)  # 0 if a tile holds several blocks
            k_offset = blocks.to(tl.int64) * k.stride_b + inside * k.stride_m
            v_offset = blocks.to(tl.int64) * v.stride_b + inside * v.stride_m
            # read a tile ahead: Triton pipelines loads that wait for a load only half as deep
            blocks = load_blocks(block_table_ptr, start + BLOCK_N, hi, BLOCK_SIZE, BLOCK_N)
        k_tile = load_tile(k_ptrs + k_offset, in_range, dim_mask, MASKED, PAD)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if scoring.softcap is not None:
            scores = scoring.softcap * tanh(scores * scoring.scale, q.dtype == tl.float32)
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
        if scoring.softcap is not None:
            new_max = tl.maximum(row_max, tl.max(scores, 1))
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scoring.scale)
        shift = new_max
        if MASKED:
            # a row that has met no key yet: -inf minus -inf would be NaN
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        if scoring.softcap is not None:
            weights = tl.exp2(scores - shift[:, None])
        else:
            weights = tl.exp2(scores * scoring.scale - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
        v_tile = load_tile(v_ptrs + v_offset, in_range, dim_mask, MASKED, PAD)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
    return acc, row_sum, row_max


@triton.jit
def finish(acc, row_sum, row_max):
    """Return the output and its log-sum-exp in units of log2. Without a key they are 0 and -inf."""
    lse = row_max + tl.log2(row_sum)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    return acc, lse
