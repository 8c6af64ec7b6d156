"""Top-k, top-p and min-p over at most SMALL candidates: each is compared with each.

That takes hundreds of comparisons per lane, but they do not depend on one another. Bisection has to
wait for every step. ``small``, int64 [2, SMALL], holds the candidates in any order: their
key_then_col and their weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import ratio_and_weight
from .sort_keys import LOWEST, col_part, key_part, value_of

_NO_LIMIT = tl.constexpr(2**62)  # above any sum of weights
_ROWS = tl.constexpr(32)  # candidates that are compared with all others at a time


@triton.jit
def filter_small(small_ptr, n, z_max, whole, k, top_p, min_p, SMALL: tl.constexpr):
    """Return (cols, weights) of n candidates, [SMALL] each; the weight is 0 if a filter removes it.

    ``k`` 0 and ``top_p`` 1 keep all. ``whole`` is the sum that top-p takes its share of if k is 0.
    """
    entries = tl.arange(0, SMALL)
    sort_key = tl.load(small_ptr + entries, mask=entries < n, other=LOWEST)
    weight = tl.load(small_ptr + SMALL + entries, mask=entries < n, other=0)
    key = key_part(sort_key)
    # of the candidates above each: their number, by score alone; their weight, by score and column
    n_above = tl.zeros([_ROWS, SMALL], tl.int32)
    above = tl.zeros([_ROWS, SMALL], tl.int64)
    for start in range(0, n, _ROWS):
        others = start + tl.arange(0, _ROWS)
        other_sort_key = tl.load(small_ptr + others, mask=others < n, other=LOWEST)
        other_weight = tl.load(small_ptr + SMALL + others, mask=others < n, other=0)
        n_above += (key_part(other_sort_key)[:, None] > key[None, :]).to(tl.int32)
        above += tl.where(other_sort_key[:, None] > sort_key[None, :], other_weight[:, None], 0)
    if k > 0:
        weight = tl.where(tl.sum(n_above, 0) < k, weight, 0)
        whole = tl.sum(weight)
    target = tl.maximum((top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1)
    target = tl.where(top_p < 1.0, target, _NO_LIMIT)
    ratio, _ = ratio_and_weight(value_of(key), z_max)
    kept = tl.where(tl.sum(above, 0) < target, weight, 0)
    return col_part(sort_key), tl.where(ratio >= min_p, kept, 0)


@triton.jit
def cumulate_small(small_ptr, n, cols, weights, SMALL: tl.constexpr):
    """Return the weight of the candidates up to each column. OVERWRITES the weights of ``small``.

    ``cols``, ``weights``: as filter_small returns them.
    """
    tl.debug_barrier()  # all lanes have read what is overwritten
    tl.store(small_ptr + SMALL + tl.arange(0, SMALL), weights)
    tl.debug_barrier()  # other lanes of the program read what these wrote
    up_to = tl.zeros([_ROWS, SMALL], tl.int64)
    for start in range(0, n, _ROWS):
        others = start + tl.arange(0, _ROWS)
        col = col_part(tl.load(small_ptr + others, mask=others < n, other=0))
        weight = tl.load(small_ptr + SMALL + others, mask=others < n, other=0)
        up_to += tl.where(col[:, None] <= cols[None, :], weight[:, None], 0)
    return tl.sum(up_to, 0)
