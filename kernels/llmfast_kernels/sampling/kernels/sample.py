"""The last kernel, a program per row: the filters' cut, the random number and its token."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.pdl import wait_for_inputs
from .filters import cut_lists, load_min_p, load_top_k, load_top_p, weigh_lists
from .scores import ratio_and_weight, scores_to_sample
from .small_candidates import cumulate_small, filter_small
from .sort_keys import NO_COL, key_of


@triton.jit
def kept_weights(z, z_max, last, skip, min_p, ties_before):
    """Return the weights of a chunk's scores in the draw, 0 for those that are not kept."""
    ratio, weight = ratio_and_weight(z, z_max)
    key = key_of(z)
    is_tie = (key == last).to(tl.int32)
    nth_tie = ties_before + tl.cumsum(is_tie, 0) - is_tie
    keep = (key >= last) & ((is_tie == 0) | (nth_tie >= skip)) & (ratio >= min_p)
    return tl.where(keep, weight, 0)


@triton.jit
def filter_lists(
    row,
    z_max,
    filters,  # Filters
    threshold_ptr,
    weights_ptr,
    candidates,  # Candidates
    stride_lists,
    n_vocab,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Apply the filters. Return (weights, last, skip, min_p, ties_before).

    ``weights`` is the weight of each chunk's kept scores. The others are arguments of
    kept_weights, ``ties_before`` for each chunk.
    """
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    chunks = tl.arange(0, MAX_CHUNKS)
    mask = chunks < n_chunks
    weights = tl.load(weights_ptr + row * n_chunks + chunks, mask=mask, other=0)
    last = tl.full([], -(2**31), tl.int32)  # every key is larger
    skip = tl.zeros([], tl.int32)
    min_p = 0.0
    if filters.min_p_ptr is not None:
        min_p = load_min_p(filters.min_p_ptr, row)
    ties_before = tl.zeros([MAX_CHUNKS], tl.int32)
    if candidates.lists_ptr is not None:
        threshold = tl.load(threshold_ptr + row)
        if threshold < float("inf"):
            lists_row = candidates.lists_ptr + row * stride_lists
            sizes = tl.load(candidates.sizes_ptr + row * n_chunks + chunks, mask=mask, other=0)
            last, skip = cut_lists(
                lists_row, sizes, lists_row + n_chunks * CHUNK, z_max, threshold, tl.sum(weights),
                row, n_vocab, filters.top_k_ptr, filters.top_p_ptr, CHUNK, WIDTH,
            )  # fmt: skip
            weights, ties_before = weigh_lists(
                lists_row, sizes, z_max, last, skip, min_p, CHUNK, WIDTH
            )
    return weights, last, skip, min_p, ties_before


@triton.jit
def filter_small_candidates(
    row,
    n,
    z_max,
    filters,  # Filters
    weights_ptr,
    small_ptr,
    n_vocab,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Return the columns of the n scores in ``small``, in any order, and their kept weights."""
    k = tl.zeros([], tl.int32)
    top_p = tl.full([], 1.0, tl.float32)
    min_p = 0.0
    if filters.top_k_ptr is not None:
        k = load_top_k(filters.top_k_ptr, row, n_vocab)
    if filters.top_p_ptr is not None:
        top_p = load_top_p(filters.top_p_ptr, row)
    if filters.min_p_ptr is not None:
        min_p = load_min_p(filters.min_p_ptr, row)
    whole = tl.zeros([], tl.int64)
    if k == 0:
        n_chunks = tl.cdiv(n_vocab, CHUNK)
        chunks = tl.arange(0, MAX_CHUNKS)
        whole = tl.sum(tl.load(weights_ptr + row * n_chunks + chunks, chunks < n_chunks, other=0))
    return filter_small(small_ptr + row * 2 * SMALL, n, z_max, whole, k, top_p, min_p, SMALL)


@triton.jit
def _random_below(total, seed, position):
    """Return a random integer in [0, total), total below 2**61, for a seed and a position."""
    zero = tl.zeros([1], tl.int64)
    word0, word1, _, _ = tl.randint4x(seed, position + zero)
    a = tl.sum((word0.to(tl.uint32, bitcast=True) >> 1).to(tl.int64))
    b = tl.sum((word1.to(tl.uint32, bitcast=True) >> 1).to(tl.int64))
    # floor(total * (a * 2**31 + b) / 2**62) within 63 bits
    high = total >> 31
    low = total & 0x7FFFFFFF
    return high * a + ((high * b + low * a + ((low * b) >> 31)) >> 31)


@triton.jit(do_not_specialize=["stride_lists"])
def sample_kernel(
    inputs,  # ScoreInputs
    filters,  # Filters
    candidates,  # Candidates; the end of a row's lists, WIDTH * MAX_CHUNKS, is scratch
    seeds_ptr,  # [B]
    positions_ptr,  # [B]
    z_max_ptr,  # [B]; +inf: the row is not sampled
    threshold_ptr,  # [B]
    weights_ptr,  # [B, n_chunks]
    stride_lists,
    tokens_ptr,  # [B], written
    n_vocab,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SMALL: tl.constexpr,
):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    z_max = tl.load(z_max_ptr + row)
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row).to(tl.int64)
    if candidates.small_ptr is not None:
        n = tl.load(candidates.n_listed_ptr + row)
    if z_max == float("inf"):
        return
    if candidates.small_ptr is not None:
        if (n > 0) & (n <= SMALL):
            cols, weight = filter_small_candidates(
                row, n, z_max, filters, weights_ptr, candidates.small_ptr, n_vocab,
                CHUNK, MAX_CHUNKS, SMALL,
            )  # fmt: skip
            drawn = _random_below(tl.sum(weight), seed, position)
            small_row = candidates.small_ptr + row * 2 * SMALL
            up_to = cumulate_small(small_row, n, cols, weight, SMALL)
            token = tl.min(tl.where(up_to > drawn, cols, NO_COL), 0)
            tl.store(tokens_ptr + row, token.to(tl.int64))
            return
    weights, last, skip, min_p, ties_before = filter_lists(
        row, z_max, filters, threshold_ptr, weights_ptr, candidates, stride_lists, n_vocab,
        CHUNK, MAX_CHUNKS, WIDTH,
    )  # fmt: skip
    chunks = tl.arange(0, MAX_CHUNKS)
    drawn = _random_below(tl.sum(weights), seed, position)
    chunk = tl.sum((tl.cumsum(weights, 0) <= drawn).to(tl.int32))
    before = tl.sum(tl.where(chunks < chunk, weights, 0))
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    z = scores_to_sample(inputs, row, cols, n_vocab)
    ties_before = tl.sum(tl.where(chunks == chunk, ties_before, 0))
    up_to = before + tl.cumsum(kept_weights(z, z_max, last, skip, min_p, ties_before), 0)
    token = tl.min(tl.where(up_to > drawn, cols, NO_COL), 0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
