"""Top-k and top-p over the lists of a row's candidates, by one program.

A row has a list for each of its chunks: CHUNK scores apart, ``sizes`` long, in column order.
Weights are integers, so their sums are exact in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import ratio_and_weight
from .sort_keys import key_of, value_of

_VALUE_STEPS = tl.constexpr(12)  # bisections of an interval of scores before those of keys


@triton.jit
def load_top_k(top_k_ptr, row, n_vocab):
    """Return the number of scores that the row's top-k keeps; 0: all."""
    k = tl.load(top_k_ptr + row)
    return tl.where((k > 0) & (k < n_vocab), k, 0).to(tl.int32)


@triton.jit
def load_top_p(top_p_ptr, row):
    """Return the row's top-p, clamped to 0 to 1; NaN is 0. 1 keeps all."""
    p = tl.load(top_p_ptr + row)
    return tl.where(p >= 1.0, 1.0, tl.where(p > 0.0, p, 0.0))


@triton.jit
def load_min_p(min_p_ptr, row):
    """Return the row's min-p, at most 1; NaN is 1."""
    p = tl.load(min_p_ptr + row)
    return tl.where(p <= 1.0, p, 1.0)


@triton.jit
def _load_tile(lists_ptr, stride, sizes, start, WIDTH: tl.constexpr):
    """Load WIDTH scores of every list from ``start`` on, -inf past a list's end."""
    lists = tl.arange(0, sizes.shape[0])[:, None] * stride
    cols = start + tl.arange(0, WIDTH)[None, :]
    return tl.load(lists_ptr + lists + cols, mask=cols < sizes[:, None], other=float("-inf"))


@triton.jit
def _sum_above(
    lists_ptr, stride, sizes, longest, z_max, key, WEIGH: tl.constexpr, WIDTH: tl.constexpr
):
    """Return the number of scores above a key and their sum: of weights, or of ones."""
    ones = tl.zeros([sizes.shape[0], WIDTH], tl.int32)
    weights = tl.zeros([sizes.shape[0], WIDTH], tl.int64)
    for start in range(0, longest, WIDTH):
        z = _load_tile(lists_ptr, stride, sizes, start, WIDTH)
        above = key_of(z) > key
        ones += above.to(tl.int32)
        if WEIGH:
            _, weight = ratio_and_weight(z, z_max)
            weights += tl.where(above, weight, 0)
    n = tl.sum(ones)
    return n, tl.sum(weights) if WEIGH else n.to(tl.int64)


@triton.jit
def _compact(lists_ptr, stride, sizes, longest, scratch_ptr, low, high, WIDTH: tl.constexpr):
    """Copy the scores between two keys to ``scratch``, as lists WIDTH apart; return their sizes."""
    TILE: tl.constexpr = sizes.shape[0] * WIDTH
    n = tl.zeros([], tl.int32)
    for start in range(0, longest, WIDTH):
        z = tl.reshape(_load_tile(lists_ptr, stride, sizes, start, WIDTH), [TILE])
        between = ((key_of(z) > low) & (key_of(z) <= high)).to(tl.int32)
        tl.store(scratch_ptr + n + tl.cumsum(between, 0) - 1, z, mask=between > 0)
        n += tl.sum(between)
    tl.debug_barrier()  # other lanes of the program read what these wrote
    return tl.minimum(tl.maximum(n - tl.arange(0, sizes.shape[0]) * WIDTH, 0), WIDTH)


@triton.jit
def _middle(low, high, step):
    """Return a key between two: of the middle score in the first steps, then the middle key.

    Scores are spread evenly, so bisecting them converges faster; bisecting keys always ends.
    """
    # the distance of two keys may exceed an int32
    middle = (low.to(tl.int64) + ((high.to(tl.int64) - low.to(tl.int64)) >> 1)).to(tl.int32)
    guess = key_of(0.5 * value_of(low) + 0.5 * value_of(high))
    inside = (step < _VALUE_STEPS) & (guess > low) & (guess < high)
    return tl.where(inside, guess, middle)


@triton.jit
def _find_cut(
    lists_ptr,
    sizes,
    scratch_ptr,
    z_max,
    target,
    low,
    n_low,
    sum_low,
    WEIGH: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Find the largest scores whose sum reaches the target, by bisecting an interval of keys.

    Returns (last, n, above). ``last`` is the lowest key of these scores, ``n`` how many have it,
    ``above`` the sum of the others. The n are one token, share one key, or are all needed.
    """
    TILE: tl.constexpr = sizes.shape[0] * WIDTH
    stride = tl.full([], CHUNK, tl.int32)
    longest = tl.max(sizes, 0)
    high = key_of(z_max)
    # n and sum are of the scores above a key; sum_low >= target > sum_high
    n_high, sum_high = tl.zeros([], tl.int32), tl.zeros([], tl.int64)
    n_left_out, sum_left_out = n_high, sum_high  # above high too, but no longer in the lists
    step = 0
    while (n_low - n_high > 1) & (sum_low > target) & (high.to(tl.int64) - low > 1):
        key = _middle(low, high, step)
        step += 1
        n, sum = _sum_above(lists_ptr, stride, sizes, longest, z_max, key, WEIGH, WIDTH)
        n += n_left_out
        sum += sum_left_out
        if sum < target:
            high, n_high, sum_high = key, n, sum
        else:
            low, n_low, sum_low = key, n, sum
        if (longest > WIDTH) & (n_low - n_high <= TILE):  # the interval's scores fit in one tile
            sizes = _compact(lists_ptr, stride, sizes, longest, scratch_ptr, low, high, WIDTH)
            lists_ptr = scratch_ptr
            stride = tl.full([], WIDTH, tl.int32)
            longest = stride
            n_left_out, sum_left_out = n_high, sum_high
    return low + 1, n_low - n_high, sum_high


@triton.jit
def cut_lists(
    lists_ptr,
    sizes,
    scratch_ptr,  # sizes.shape[0] * WIDTH scores
    z_max,
    threshold,  # no listed score is lower
    weight,  # sum of the whole row
    row,
    n_vocab,
    top_k_ptr,
    top_p_ptr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Apply top-k and top-p. Return (last, skip).

    Kept are the keys above ``last``, and the scores with key ``last`` except the row's first
    ``skip``.
    """
    low = key_of(threshold) - 1
    n = tl.sum(sizes)
    skip = tl.zeros([], tl.int32)
    k = tl.zeros([], tl.int32)
    if top_k_ptr is not None:
        k = load_top_k(top_k_ptr, row, n_vocab)
    top_p = tl.full([], 1.0, tl.float32)
    if top_p_ptr is not None:
        top_p = load_top_p(top_p_ptr, row)
    if k > 0:
        last, _, _ = _find_cut(
            lists_ptr, sizes, scratch_ptr, z_max, k.to(tl.int64), low, n, n.to(tl.int64),
            False, CHUNK, WIDTH,
        )  # fmt: skip
        low = last - 1  # all that equal the k-th are kept
    if top_p < 1.0:
        n, listed = _sum_above(lists_ptr, CHUNK, sizes, tl.max(sizes, 0), z_max, low, True, WIDTH)
        if k > 0:
            weight = listed
        target = tl.maximum((top_p.to(tl.float64) * weight.to(tl.float64)).to(tl.int64), 1)
        last, n_ties, above = _find_cut(
            lists_ptr, sizes, scratch_ptr, z_max, target, low, n, listed, True, CHUNK, WIDTH
        )
        low = last - 1
        _, each = ratio_and_weight(value_of(last), z_max)
        each = tl.maximum(each, 1)
        skip = tl.maximum(n_ties - (target - above + each - 1) // each, 0).to(tl.int32)
    return low + 1, skip


@triton.jit
def weigh_lists(
    lists_ptr, sizes, z_max, last, skip, min_p, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):
    """Return the weight of each list's kept scores, and the number of ``last`` in earlier lists."""
    weights = tl.zeros([sizes.shape[0], WIDTH], tl.int64)
    ties = tl.zeros([sizes.shape[0], WIDTH], tl.int32)
    for start in range(0, tl.max(sizes, 0), WIDTH):
        z = _load_tile(lists_ptr, CHUNK, sizes, start, WIDTH)
        ratio, weight = ratio_and_weight(z, z_max)
        weights += tl.where((key_of(z) >= last) & (ratio >= min_p), weight, 0)
        ties += (key_of(z) == last).to(tl.int32)
    weight = tl.sum(weights, 1)
    n_ties = tl.sum(ties, 1)
    ties_before = tl.cumsum(n_ties, 0) - n_ties
    ratio, each = ratio_and_weight(value_of(last), z_max)
    skipped = tl.minimum(tl.maximum(skip - ties_before, 0), n_ties)
    return weight - tl.where(ratio >= min_p, each, 0) * skipped, ties_before
