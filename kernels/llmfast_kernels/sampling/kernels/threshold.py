"""Between the two passes, a program per row: its largest score and its threshold.

No score that top-k or top-p keeps is below the threshold. After top-k the program also lists the
scores from the threshold on, if they fit into ``small``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.pdl import wait_for_inputs
from ..reference import ALL_MASKED, NOT_FINITE, OK
from .filters import load_top_k, load_top_p
from .scores import ratio_and_weight, scores_to_sample
from .sort_keys import NO_COL, key_then_col

_OK = tl.constexpr(OK)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_ALL_MASKED = tl.constexpr(ALL_MASKED)
_NO_WEIGHT = tl.constexpr(28.0)  # this far below the largest score, exp times 2**40 is below 1
_THRESHOLD_STEPS = tl.constexpr(12)  # bisections of that at most: a closer threshold gains nothing
_SAFE = tl.constexpr(0.99)  # factor by which a float32 sum bounds the exact one
_TILE = tl.constexpr(1024)  # scores that are computed at a time


@triton.jit
def _top_k_threshold(maxima, z_max, k):
    """Return a score that at least k maxima reach, or the least that has any weight."""
    low = z_max - _NO_WEIGHT
    high = z_max
    n_low = tl.full([], 2**30, tl.int32)
    step = 0
    while (step < _THRESHOLD_STEPS) & (n_low > k + k // 8):
        middle = 0.5 * (low + high)
        n = tl.sum((maxima >= middle).to(tl.int32))
        low, n_low = tl.where(n >= k, middle, low), tl.where(n >= k, n, n_low)
        high = tl.where(n >= k, high, middle)
        step += 1
    return low


@triton.jit
def _top_p_threshold(root_sum, sum, z_max, top_p, n_vocab):
    """Return a score below which the weights add up to at most 1 - top_p of ``sum``.

    With weights w = exp(z - z_max), those below b add up to at most n_vocab * b. Each is
    sqrt(w) * sqrt(w), so they also add up to at most sqrt(b) times the sum of all roots.
    """
    rest = _SAFE * sum * (1.0 - tl.where(top_p > 0.0, top_p, 0.0))
    by_number = tl.log(rest / n_vocab)
    by_roots = 2.0 * tl.log(rest / root_sum)
    below = tl.where(by_number > by_roots, by_number, by_roots)
    # if a sum is NaN, the comparison fails
    return z_max + tl.where(below > -_NO_WEIGHT, below, -_NO_WEIGHT)


@triton.jit
def _list_small(
    active,  # groups that hold a score from the threshold on
    threshold,
    z_max,
    groups_ptr,  # int32 scratch, SMALL long
    small_ptr,
    inputs,  # ScoreInputs
    row,
    n_vocab,
    MEMBERS: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Write the scores from the threshold on to ``small``. Return their number, 0 if too many."""
    N_GROUPS: tl.constexpr = active.shape[0] * active.shape[1]
    AT_ONCE: tl.constexpr = _TILE // MEMBERS if _TILE // MEMBERS < SMALL else SMALL
    active = tl.reshape(active.to(tl.int32), [N_GROUPS])
    n_active = tl.sum(active)
    n = tl.zeros([], tl.int32)
    if n_active <= SMALL:  # each has at least one score to list
        places = tl.cumsum(active, 0) - 1
        tl.store(groups_ptr + places, tl.arange(0, N_GROUPS), mask=active > 0)
        tl.debug_barrier()  # other lanes of the program read what these wrote
        for start in range(0, n_active, AT_ONCE):
            entries = start + tl.arange(0, AT_ONCE)
            group = tl.load(groups_ptr + entries, mask=entries < n_active, other=0)
            cols = group[:, None] * MEMBERS + tl.arange(0, MEMBERS)[None, :]
            cols = tl.where((entries < n_active)[:, None], cols, n_vocab)
            cols = tl.reshape(cols, [AT_ONCE * MEMBERS])
            z = scores_to_sample(inputs, row, cols, n_vocab)
            listed = (z >= threshold).to(tl.int32)
            slots = n + tl.cumsum(listed, 0) - 1
            mask = (listed > 0) & (slots < SMALL)
            _, weight = ratio_and_weight(z, z_max)
            tl.store(small_ptr + slots, key_then_col(z, cols), mask=mask)
            tl.store(small_ptr + SMALL + slots, weight, mask=mask)
            n += tl.sum(listed)
    return tl.where(n <= SMALL, n, 0)


@triton.jit(do_not_specialize=["stride_lists"])
def threshold_kernel(
    inputs,  # ScoreInputs
    filters,  # Filters; min_p is not read
    chunk_maxima,  # ChunkMaxima
    candidates,  # Candidates; lists are scratch, n_listed and after top-k small are written
    tokens_ptr,  # [B], written: the most likely token; without meaning in rows that are sampled
    status_ptr,  # [B], written
    z_max_ptr,  # [B], written: the largest score, or +inf in a row that is not sampled
    threshold_ptr,  # [B], written; +inf in a row whose scores the candidates kernel need not list
    stride_lists,
    n_vocab,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    SMALL: tl.constexpr,
    LIST: tl.constexpr,  # after top-k, list the scores from the threshold on
):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    chunks = tl.arange(0, MAX_CHUNKS)
    mask = chunks < n_chunks
    entries = (row * n_chunks + chunks[:, None]) * GROUPS + tl.arange(0, GROUPS)[None, :]
    maxima = tl.load(chunk_maxima.maxima_ptr + entries, mask=mask[:, None], other=float("-inf"))
    chunk_max = tl.max(maxima, 1)
    z_max = tl.max(chunk_max, 0)
    first = tl.load(chunk_maxima.first_ptr + row * n_chunks + chunks, mask=mask, other=NO_COL)
    token = tl.min(tl.where(chunk_max == z_max, first, NO_COL), 0)
    status = tl.where(z_max == float("-inf"), _ALL_MASKED, _OK)
    status = tl.where(z_max == float("inf"), _NOT_FINITE, status)
    tl.store(status_ptr + row, status)
    tl.store(tokens_ptr + row, tl.where(status == _OK, token, 0).to(tl.int64))

    if inputs.temperature_ptr is not None:
        sampled = (status == _OK) & ((tl.load(inputs.temperature_ptr + row) <= 0.0) == 0)
        tl.store(z_max_ptr + row, tl.where(sampled, z_max, float("inf")))
        k = 0
        threshold = float("inf")
        n_listed = tl.zeros([], tl.int32)
        if filters.top_k_ptr is not None:
            k = load_top_k(filters.top_k_ptr, row, n_vocab)
            if sampled & (k > 0):
                threshold = _top_k_threshold(maxima, z_max, k)
                if LIST:
                    lists_row = candidates.lists_ptr + row * stride_lists
                    groups_ptr = lists_row.to(tl.pointer_type(tl.int32))
                    n_listed = _list_small(
                        maxima >= threshold, threshold, z_max, groups_ptr,
                        candidates.small_ptr + row * 2 * SMALL, inputs, row, n_vocab,
                        CHUNK // GROUPS, SMALL,
                    )  # fmt: skip
                    threshold = tl.where(n_listed > 0, float("inf"), threshold)
        if filters.top_p_ptr is not None:
            top_p = load_top_p(filters.top_p_ptr, row)
            # after top-k the nucleus is a part of what that keeps, which must be listed whole
            if (top_p < 1.0) & (k == 0):
                scale = tl.exp(0.5 * (chunk_max - z_max))
                sums = chunk_maxima.sums_ptr + 2 * (row * n_chunks + chunks)
                root_sum = tl.sum(scale * tl.load(sums, mask=mask, other=0.0))
                sum = tl.sum(scale * scale * tl.load(sums + 1, mask=mask, other=0.0))
                threshold = _top_p_threshold(root_sum, sum, z_max, top_p, n_vocab)
        tl.store(threshold_ptr + row, threshold)
        if candidates.n_listed_ptr is not None:
            tl.store(candidates.n_listed_ptr + row, n_listed)
