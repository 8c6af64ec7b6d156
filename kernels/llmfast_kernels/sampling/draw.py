"""A row's program at the end: the filters' cut, the draw, and its token."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.pdl import wait_for_inputs
from .few import keep_few, sum_few
from .filters import cut_lists, load_min_p, load_top_k, load_top_p, weigh_lists
from .keys import NO_COL, key_of, ratio_and_weight
from .scores import drawn


@triton.jit
def _kept_weights(z, z_max, last, skip, min_p, ties_before):
    """What the scores of a chunk weigh in the draw."""
    ratio, weight = ratio_and_weight(z, z_max)
    key = key_of(z)
    is_tie = (key == last).to(tl.int32)
    rank = ties_before + tl.cumsum(is_tie, 0) - is_tie
    keep = (key >= last) & ((is_tie == 0) | (rank >= skip)) & (ratio >= min_p)
    return tl.where(keep, weight, 0)


@triton.jit
def _filter(
    row,
    z_max,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    bound_ptr,
    weights_ptr,
    lists_ptr,
    sizes_ptr,
    stride_lists,
    n_vocab,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What the kept scores of each chunk weigh, and which these are, as _kept_weights takes it.

    Returns (weights, last, skip, min_p, ties_before), the first and the last for all chunks.
    """
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    chunks = tl.arange(0, MAX_CHUNKS)
    mask = chunks < n_chunks
    weights = tl.load(weights_ptr + row * n_chunks + chunks, mask=mask, other=0)
    last = tl.full([], -(2**31), tl.int32)  # every key is more
    skip = tl.zeros([], tl.int32)
    min_p = 0.0
    if min_p_ptr is not None:
        min_p = load_min_p(min_p_ptr, row)
    ties_before = tl.zeros([MAX_CHUNKS], tl.int32)
    if lists_ptr is not None:
        bound = tl.load(bound_ptr + row)
        if bound < float("inf"):
            lists_row = lists_ptr + row * stride_lists
            sizes = tl.load(sizes_ptr + row * n_chunks + chunks, mask=mask, other=0)
            last, skip = cut_lists(
                lists_row, sizes, lists_row + n_chunks * CHUNK, z_max, bound, tl.sum(weights),
                row, n_vocab, top_k_ptr, top_p_ptr, CHUNK, WIDTH,
            )  # fmt: skip
            weights, ties_before = weigh_lists(
                lists_row, sizes, z_max, last, skip, min_p, CHUNK, WIDTH
            )
    return weights, last, skip, min_p, ties_before


@triton.jit
def _filter_few(
    row,
    n,
    z_max,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    weights_ptr,
    few_ptr,
    n_vocab,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    FEW: tl.constexpr,
):
    """The columns of a row's n listed scores, in any order, and what these weigh in the draw."""
    k = tl.zeros([], tl.int32)
    top_p = tl.full([], 1.0, tl.float32)
    min_p = 0.0
    if top_k_ptr is not None:
        k = load_top_k(top_k_ptr, row, n_vocab)
    if top_p_ptr is not None:
        top_p = load_top_p(top_p_ptr, row)
    if min_p_ptr is not None:
        min_p = load_min_p(min_p_ptr, row)
    whole = tl.zeros([], tl.int64)
    if k == 0:
        n_chunks = tl.cdiv(n_vocab, CHUNK)
        chunks = tl.arange(0, MAX_CHUNKS)
        whole = tl.sum(tl.load(weights_ptr + row * n_chunks + chunks, chunks < n_chunks, other=0))
    return keep_few(few_ptr + row * 2 * FEW, n, z_max, whole, k, top_p, min_p, FEW)


@triton.jit
def _random_below(total, seed, position):
    """A whole number in [0, total), total below 2**61, from the row's seed and position."""
    zero = tl.zeros([1], tl.int64)
    word0, word1, _, _ = tl.randint4x(seed, position + zero)
    a = tl.sum((word0.to(tl.uint32, bitcast=True) >> 1).to(tl.int64))
    b = tl.sum((word1.to(tl.uint32, bitcast=True) >> 1).to(tl.int64))
    # floor(total * (a * 2**31 + b) / 2**62) without passing 63 bits
    high = total >> 31
    low = total & 0x7FFFFFFF
    return high * a + ((high * b + low * a + ((low * b) >> 31)) >> 31)


@triton.jit(do_not_specialize=["stride_lists"])
def _draw_kernel(
    logits_ptr,  # this and the next ten: see penalised
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    seen_ptr,
    counts_ptr,
    bias_ptr,
    stride_logits,
    stride_seen,
    stride_counts,
    stride_bias,
    temperature_ptr,  # [B]
    top_k_ptr,  # [B] or None, as the next two
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,  # [B]
    positions_ptr,  # [B]
    z_max_ptr,  # this and the next seven: see _weigh_kernel
    bound_ptr,
    weights_ptr,
    lists_ptr,  # a row's last WIDTH * MAX_CHUNKS are scratch
    sizes_ptr,
    n_listed_ptr,
    few_ptr,
    stride_lists,
    tokens_ptr,  # [B], written
    n_vocab,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    FEW: tl.constexpr,
):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    z_max = tl.load(z_max_ptr + row)
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row).to(tl.int64)
    if few_ptr is not None:
        n = tl.load(n_listed_ptr + row)
    if z_max == float("inf"):
        return
    if few_ptr is not None:
        if (n > 0) & (n <= FEW):
            cols, weight = _filter_few(
                row, n, z_max, top_k_ptr, top_p_ptr, min_p_ptr, weights_ptr, few_ptr, n_vocab,
                CHUNK, MAX_CHUNKS, FEW,
            )  # fmt: skip
            at = _random_below(tl.sum(weight), seed, position)
            up_to = sum_few(few_ptr + row * 2 * FEW, n, cols, weight, FEW)
            token = tl.min(tl.where(up_to > at, cols, NO_COL), 0)
            tl.store(tokens_ptr + row, token.to(tl.int64))
            return
    weights, last, skip, min_p, ties_before = _filter(
        row, z_max, top_k_ptr, top_p_ptr, min_p_ptr, bound_ptr, weights_ptr, lists_ptr, sizes_ptr,
        stride_lists, n_vocab, CHUNK, MAX_CHUNKS, WIDTH,
    )  # fmt: skip
    chunks = tl.arange(0, MAX_CHUNKS)
    at = _random_below(tl.sum(weights), seed, position)
    chunk = tl.sum((tl.cumsum(weights, 0) <= at).to(tl.int32))
    before = tl.sum(tl.where(chunks < chunk, weights, 0))
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    z = drawn(
        logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr, counts_ptr, bias_ptr,
        stride_logits, stride_seen, stride_counts, stride_bias, temperature_ptr, row, cols, n_vocab,
    )  # fmt: skip
    ties_before = tl.sum(tl.where(chunks == chunk, ties_before, 0))
    up_to = before + tl.cumsum(_kept_weights(z, z_max, last, skip, min_p, ties_before), 0)
    token = tl.min(tl.where(up_to > at, cols, NO_COL), 0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
