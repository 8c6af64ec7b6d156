"""A row's program between the two passes over its scores.

It finds the largest score and a bound that nothing which top-k or top-p keeps is below, and, after
top-k, lists what is not, unless it is too much for one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.pdl import wait_for_inputs
from .filters import load_top_k, load_top_p
from .keys import NO_COL, place_of, ratio_and_weight
from .reference import ALL_MASKED, NOT_FINITE, OK
from .scores import drawn

_OK = tl.constexpr(OK)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_ALL_MASKED = tl.constexpr(ALL_MASKED)
_NO_WEIGHT = tl.constexpr(28.0)  # so far below the largest score, exp times 2**40 is below 1
_BOUND_STEPS = tl.constexpr(12)  # halvings of that at most: a closer bound gains nothing
_SAFE = tl.constexpr(0.99)  # of a float32 sum that is to bound an exact one
_TILE = tl.constexpr(1024)  # scores that are looked at at a time


@triton.jit
def _top_k_bound(maxima, z_max, k):
    """What k groups' largest scores are no less than; at the least, what has any weight."""
    low = z_max - _NO_WEIGHT
    high = z_max
    n_low = tl.full([], 2**30, tl.int32)
    step = 0
    while (step < _BOUND_STEPS) & (n_low > k + k // 8):
        middle = 0.5 * (low + high)
        n = tl.sum((maxima >= middle).to(tl.int32))
        low, n_low = tl.where(n >= k, middle, low), tl.where(n >= k, n, n_low)
        high = tl.where(n >= k, high, middle)
        step += 1
    return low


@triton.jit
def _top_p_bound(root_sum, sum, z_max, top_p, n_vocab):
    """What all that lies below it weighs at most 1 - top_p of the sum.

    With weights w = exp(z - z_max), those below b weigh at most n_vocab * b; and, since each is
    sqrt(w) * sqrt(w), at most sqrt(b) times the sum of all roots.
    """
    rest = _SAFE * sum * (1.0 - tl.where(top_p > 0.0, top_p, 0.0))
    by_number = tl.log(rest / n_vocab)
    by_roots = 2.0 * tl.log(rest / root_sum)
    below = tl.where(by_number > by_roots, by_number, by_roots)
    # where a sum is no number, comparisons fail
    return z_max + tl.where(below > -_NO_WEIGHT, below, -_NO_WEIGHT)


@triton.jit
def _list_few(
    active,
    bound,
    z_max,
    groups_ptr,  # int32 scratch for FEW
    few_ptr,
    logits_ptr,
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
    temperature_ptr,
    row,
    n_vocab,
    MEMBERS: tl.constexpr,
    FEW: tl.constexpr,
):
    """List the scores from the bound on, which are in the active groups, as few.

    Returns how many, or 0 where they are too many.
    """
    N_GROUPS: tl.constexpr = active.shape[0] * active.shape[1]
    AT_ONCE: tl.constexpr = _TILE // MEMBERS if _TILE // MEMBERS < FEW else FEW
    active = tl.reshape(active.to(tl.int32), [N_GROUPS])
    n_active = tl.sum(active)
    n = tl.zeros([], tl.int32)
    if n_active <= FEW:  # in each one score at least is listed
        places = tl.cumsum(active, 0) - 1
        tl.store(groups_ptr + places, tl.arange(0, N_GROUPS), mask=active > 0)
        tl.debug_barrier()  # other lanes of the program read what these wrote
        for start in range(0, n_active, AT_ONCE):
            at = start + tl.arange(0, AT_ONCE)
            group = tl.load(groups_ptr + at, mask=at < n_active, other=0)
            cols = group[:, None] * MEMBERS + tl.arange(0, MEMBERS)[None, :]
            cols = tl.where((at < n_active)[:, None], cols, n_vocab)
            cols = tl.reshape(cols, [AT_ONCE * MEMBERS])
            z = drawn(
                logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr, counts_ptr,
                bias_ptr, stride_logits, stride_seen, stride_counts, stride_bias, temperature_ptr,
                row, cols, n_vocab,
            )  # fmt: skip
            listed = (z >= bound).to(tl.int32)
            rank = n + tl.cumsum(listed, 0) - 1
            mask = (listed > 0) & (rank < FEW)
            _, weight = ratio_and_weight(z, z_max)
            tl.store(few_ptr + rank, place_of(z, cols), mask=mask)
            tl.store(few_ptr + FEW + rank, weight, mask=mask)
            n += tl.sum(listed)
    return tl.where(n <= FEW, n, 0)


@triton.jit(do_not_specialize=["stride_lists"])
def _bound_kernel(
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
    maxima_ptr,  # [B, n_chunks, GROUPS]
    first_ptr,  # [B, n_chunks]
    sums_ptr,  # [B, n_chunks, 2]
    temperature_ptr,  # [B] or None, as the next two
    top_k_ptr,
    top_p_ptr,
    tokens_ptr,  # [B], written: the most likely token; no matter what in rows that are drawn
    status_ptr,  # [B], written
    z_max_ptr,  # [B], written: the largest score, or +inf where nothing is to be drawn
    bound_ptr,  # [B], written: weigh lists scores from here on; +inf where none need be listed
    lists_ptr,  # [B, stride_lists], scratch; None without top-k and top-p, as the next two
    n_listed_ptr,  # [B], written: how many scores few has
    few_ptr,  # [B, 2, FEW], written: places and weights of the listed scores, after top-k
    stride_lists,
    n_vocab,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    FEW: tl.constexpr,
    LIST: tl.constexpr,  # after top-k, what few may hold
):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    chunks = tl.arange(0, MAX_CHUNKS)
    mask = chunks < n_chunks
    at = (row * n_chunks + chunks[:, None]) * GROUPS + tl.arange(0, GROUPS)[None, :]
    maxima = tl.load(maxima_ptr + at, mask=mask[:, None], other=float("-inf"))
    chunk_max = tl.max(maxima, 1)
    z_max = tl.max(chunk_max, 0)
    first = tl.load(first_ptr + row * n_chunks + chunks, mask=mask, other=NO_COL)
    token = tl.min(tl.where(chunk_max == z_max, first, NO_COL), 0)
    status = tl.where(z_max == float("-inf"), _ALL_MASKED, _OK)
    status = tl.where(z_max == float("inf"), _NOT_FINITE, status)
    tl.store(status_ptr + row, status)
    tl.store(tokens_ptr + row, tl.where(status == _OK, token, 0).to(tl.int64))

    if temperature_ptr is not None:
        to_draw = (status == _OK) & ((tl.load(temperature_ptr + row) <= 0.0) == 0)
        tl.store(z_max_ptr + row, tl.where(to_draw, z_max, float("inf")))
        k = 0
        bound = float("inf")
        n_listed = tl.zeros([], tl.int32)
        if top_k_ptr is not None:
            k = load_top_k(top_k_ptr, row, n_vocab)
            if to_draw & (k > 0):
                bound = _top_k_bound(maxima, z_max, k)
                if LIST:
                    groups_ptr = (lists_ptr + row * stride_lists).to(tl.pointer_type(tl.int32))
                    n_listed = _list_few(
                        maxima >= bound, bound, z_max, groups_ptr, few_ptr + row * 2 * FEW,
                        logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr,
                        counts_ptr, bias_ptr, stride_logits, stride_seen, stride_counts,
                        stride_bias, temperature_ptr, row, n_vocab, CHUNK // GROUPS, FEW,
                    )  # fmt: skip
                    bound = tl.where(n_listed > 0, float("inf"), bound)
        if top_p_ptr is not None:
            top_p = load_top_p(top_p_ptr, row)
            # after top-k a nucleus is of what that keeps, so the lists must have all of it
            if (top_p < 1.0) & (k == 0):
                scale = tl.exp(0.5 * (chunk_max - z_max))
                sums = sums_ptr + 2 * (row * n_chunks + chunks)
                root_sum = tl.sum(scale * tl.load(sums, mask=mask, other=0.0))
                sum = tl.sum(scale * scale * tl.load(sums + 1, mask=mask, other=0.0))
                bound = _top_p_bound(root_sum, sum, z_max, top_p, n_vocab)
        tl.store(bound_ptr + row, bound)
        if n_listed_ptr is not None:
            tl.store(n_listed_ptr + row, n_listed)
