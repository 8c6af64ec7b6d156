"""Top-k, top-p and min-p where few scores are listed: each is compared with each.

That is hundreds of comparisons a lane, but none waits for another; to halve an interval waits for
every step. The scores come as ``few``, int64 [2, FEW]: their places, in any order, and weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .keys import NO_RANK, placed_col, placed_key, ratio_and_weight, value_of

_ENDLESS = tl.constexpr(2**62)  # no sum of weights reaches it
_ROWS = tl.constexpr(32)  # scores that are compared with all others at a time


@triton.jit
def keep_few(few_ptr, n, z_max, whole, k, top_p, min_p, FEW: tl.constexpr):
    """What n scores weigh after the filters: 0 for what these remove.

    ``k`` 0 and ``top_p`` 1 keep all; ``whole`` is what top-p takes its share of if k is 0.
    Returns (cols, weights), both [FEW].
    """
    at = tl.arange(0, FEW)
    place = tl.load(few_ptr + at, mask=at < n, other=NO_RANK)
    weight = tl.load(few_ptr + FEW + at, mask=at < n, other=0)
    key = placed_key(place)
    # of the scores above each: their number, by the score alone, and their weight, by the place
    n_above = tl.zeros([_ROWS, FEW], tl.int32)
    above = tl.zeros([_ROWS, FEW], tl.int64)
    for start in range(0, n, _ROWS):
        others = start + tl.arange(0, _ROWS)
        place_other = tl.load(few_ptr + others, mask=others < n, other=NO_RANK)
        weight_other = tl.load(few_ptr + FEW + others, mask=others < n, other=0)
        n_above += (placed_key(place_other)[:, None] > key[None, :]).to(tl.int32)
        above += tl.where(place_other[:, None] > place[None, :], weight_other[:, None], 0)
    if k > 0:
        weight = tl.where(tl.sum(n_above, 0) < k, weight, 0)
        whole = tl.sum(weight)
    target = tl.maximum((top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1)
    target = tl.where(top_p < 1.0, target, _ENDLESS)
    ratio, _ = ratio_and_weight(value_of(key), z_max)
    kept = tl.where(tl.sum(above, 0) < target, weight, 0)
    return placed_col(place), tl.where(ratio >= min_p, kept, 0)


@triton.jit
def sum_few(few_ptr, n, cols, weights, FEW: tl.constexpr):
    """What the scores up to each column weigh. Writes the weights, as keep_few returns them."""
    at = tl.arange(0, FEW)
    tl.debug_barrier()  # all have read what is overwritten
    tl.store(few_ptr + FEW + at, weights)
    tl.debug_barrier()  # other lanes of the program read what these wrote
    up_to = tl.zeros([_ROWS, FEW], tl.int64)
    for start in range(0, n, _ROWS):
        others = start + tl.arange(0, _ROWS)
        col = placed_col(tl.load(few_ptr + others, mask=others < n, other=0))
        weight = tl.load(few_ptr + FEW + others, mask=others < n, other=0)
        up_to += tl.where(col[:, None] <= cols[None, :], weight[:, None], 0)
    return tl.sum(up_to, 0)
