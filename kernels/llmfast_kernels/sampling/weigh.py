"""A chunk's program, the second time: what its scores weigh, and which of them are listed."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.pdl import wait_for_inputs
from .filters import load_min_p, load_top_k
from .keys import place_of, ratio_and_weight, weight_of
from .scores import drawn

_PIECE = tl.constexpr(512)  # of a chunk, taken at a time where many scores are listed


@triton.jit
def _list(z, cols, z_max, bound, size, lists_ptr, n_listed_ptr, few_ptr, FEW: tl.constexpr):
    """Add what is from the bound on to a chunk's list of ``size``, and to the row's few.

    Returns the list's size.
    """
    listed = (z >= bound).to(tl.int32)
    added = tl.sum(listed)
    if added > 0:
        rank = tl.cumsum(listed, 0) - 1
        tl.store(lists_ptr + size + rank, z, mask=listed > 0)
        if size <= FEW:
            n = tl.atomic_add(n_listed_ptr, added, sem="relaxed")  # programs come in any order
            if n + added <= FEW:
                _, weight = ratio_and_weight(z, z_max)
                tl.store(few_ptr + n + rank, place_of(z, cols), mask=listed > 0)
                tl.store(few_ptr + FEW + n + rank, weight, mask=listed > 0)
    return size + added


@triton.jit(do_not_specialize=["stride_lists"])
def _weigh_kernel(
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
    top_k_ptr,  # [B] or None, as the next
    min_p_ptr,
    maxima_ptr,  # [B, n_chunks, GROUPS]
    z_max_ptr,  # [B]
    bound_ptr,  # [B]
    weights_ptr,  # [B, n_chunks], written: after min-p in rows without lists; not after top-k
    lists_ptr,  # [B, stride_lists], written: what is from the bound on, CHUNK for each chunk
    sizes_ptr,  # [B, n_chunks], written: how many these are; None without top-k and top-p, as lists
    n_listed_ptr,  # [B], added to where bound has listed none: how many of the row are
    few_ptr,  # [B, 2, FEW], written: places and weights of the listed, unless these are more
    stride_lists,
    n_vocab,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    FEW: tl.constexpr,
):
    PIECE: tl.constexpr = CHUNK if CHUNK < _PIECE else _PIECE
    wait_for_inputs()
    # backwards: what was surveyed last may still be in the L2 cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    row = (pid // n_chunks).to(tl.int64)
    z_max = tl.load(z_max_ptr + row)
    bound = tl.load(bound_ptr + row)
    groups = tl.arange(0, GROUPS)
    if top_k_ptr is not None:  # loaded before anything is known of the row: loads take long
        k = load_top_k(top_k_ptr, row, n_vocab)
        maxima = tl.load(maxima_ptr + pid.to(tl.int64) * GROUPS + groups)
    if z_max == float("inf"):
        return
    if top_k_ptr is not None:
        if (k > 0) & (bound == float("inf")):  # all are listed
            return
    first = pid % n_chunks * CHUNK
    if lists_ptr is not None:
        lists_ptr += row * stride_lists + first
        n_listed_ptr += row
        few_ptr += row * 2 * FEW
    if top_k_ptr is not None:
        if k > 0:  # only groups whose largest is listed are read again, and in most chunks none
            group = tl.min(tl.where(maxima >= bound, groups, GROUPS), 0)
            size = tl.zeros([], tl.int32)
            while group < GROUPS:
                piece = first + group * (CHUNK // GROUPS) + tl.arange(0, CHUNK // GROUPS)
                scores = drawn(
                    logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr, counts_ptr,
                    bias_ptr, stride_logits, stride_seen, stride_counts, stride_bias,
                    temperature_ptr, row, piece, n_vocab,
                )  # fmt: skip
                size = _list(
                    scores, piece, z_max, bound, size, lists_ptr, n_listed_ptr, few_ptr, FEW
                )
                group = tl.min(tl.where((maxima >= bound) & (groups > group), groups, GROUPS), 0)
            tl.store(sizes_ptr + pid, size)
            return
    cols = first + tl.arange(0, CHUNK)
    z = drawn(
        logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr, counts_ptr, bias_ptr,
        stride_logits, stride_seen, stride_counts, stride_bias, temperature_ptr, row, cols, n_vocab,
    )  # fmt: skip
    ratio, weight = ratio_and_weight(z, z_max)
    if min_p_ptr is not None:  # in rows with lists it comes later, after top-p
        min_p = tl.where(bound < float("inf"), 0.0, load_min_p(min_p_ptr, row))
        weight = weight_of(tl.where(ratio >= min_p, ratio, 0.0))
    tl.store(weights_ptr + pid, tl.sum(weight))
    if lists_ptr is not None:
        if bound < float("inf"):
            size = tl.zeros([], tl.int32)
            if tl.max(z, 0) >= bound:
                # anew and piece by piece: a whole chunk with its places is more than registers hold
                for start in range(0, CHUNK, PIECE):
                    piece = first + start + tl.arange(0, PIECE)
                    scores = drawn(
                        logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr,
                        counts_ptr, bias_ptr, stride_logits, stride_seen, stride_counts,
                        stride_bias, temperature_ptr, row, piece, n_vocab,
                    )  # fmt: skip
                    size = _list(
                        scores, piece, z_max, bound, size, lists_ptr, n_listed_ptr, few_ptr, FEW
                    )
            tl.store(sizes_ptr + pid, size)
