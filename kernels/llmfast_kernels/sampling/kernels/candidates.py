"""The second pass, a program per chunk: the sum of its weights, and its candidates."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.pdl import wait_for_inputs
from .filters import load_min_p, load_top_k
from .scores import ratio_and_weight, scores_to_sample, weight_of
from .sort_keys import key_then_col

_PIECE = tl.constexpr(512)  # scores of a chunk that are listed at a time


@triton.jit
def _append(
    z, cols, z_max, threshold, size, list_ptr, n_listed_ptr, small_ptr, SMALL: tl.constexpr
):
    """Append the scores from the threshold on to a chunk's list, and to the row's ``small``.

    Returns the list's new size.
    """
    listed = (z >= threshold).to(tl.int32)
    added = tl.sum(listed)
    if added > 0:
        slots = tl.cumsum(listed, 0) - 1
        tl.store(list_ptr + size + slots, z, mask=listed > 0)
        if size <= SMALL:
            n = tl.atomic_add(n_listed_ptr, added, sem="relaxed")  # chunks append in any order
            if n + added <= SMALL:
                _, weight = ratio_and_weight(z, z_max)
                tl.store(small_ptr + n + slots, key_then_col(z, cols), mask=listed > 0)
                tl.store(small_ptr + SMALL + n + slots, weight, mask=listed > 0)
    return size + added


@triton.jit(do_not_specialize=["stride_lists"])
def candidates_kernel(
    inputs,  # ScoreInputs
    filters,  # Filters; top_p is not read
    written,  # Candidates; those of rows that the threshold kernel has listed stay as they are
    maxima_ptr,  # [B, n_chunks, GROUPS]
    z_max_ptr,  # [B]
    threshold_ptr,  # [B]
    weights_ptr,  # [B, n_chunks], written: after min-p in rows without lists; not after top-k
    stride_lists,
    n_vocab,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    SMALL: tl.constexpr,
):
    PIECE: tl.constexpr = CHUNK if CHUNK < _PIECE else _PIECE
    wait_for_inputs()
    # last chunks first: what chunk_max read last may still be in the L2 cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    row = (pid // n_chunks).to(tl.int64)
    z_max = tl.load(z_max_ptr + row)
    threshold = tl.load(threshold_ptr + row)
    groups = tl.arange(0, GROUPS)
    if filters.top_k_ptr is not None:  # loaded before the row's kind is known, to hide the latency
        k = load_top_k(filters.top_k_ptr, row, n_vocab)
        maxima = tl.load(maxima_ptr + pid.to(tl.int64) * GROUPS + groups)
    if z_max == float("inf"):
        return
    if filters.top_k_ptr is not None:
        if (k > 0) & (threshold == float("inf")):  # all candidates are listed
            return
    first = pid % n_chunks * CHUNK
    list_ptr, n_listed_ptr, small_ptr = written.lists_ptr, written.n_listed_ptr, written.small_ptr
    if written.lists_ptr is not None:
        list_ptr += row * stride_lists + first
        n_listed_ptr += row
        small_ptr += row * 2 * SMALL
    if filters.top_k_ptr is not None:
        if k > 0:  # only groups whose largest is listed are read again: in most chunks none
            group = tl.min(tl.where(maxima >= threshold, groups, GROUPS), 0)
            size = tl.zeros([], tl.int32)
            while group < GROUPS:
                piece = first + group * (CHUNK // GROUPS) + tl.arange(0, CHUNK // GROUPS)
                scores = scores_to_sample(inputs, row, piece, n_vocab)
                size = _append(
                    scores, piece, z_max, threshold, size, list_ptr, n_listed_ptr, small_ptr, SMALL
                )
                later = (maxima >= threshold) & (groups > group)
                group = tl.min(tl.where(later, groups, GROUPS), 0)
            tl.store(written.sizes_ptr + pid, size)
            return
    cols = first + tl.arange(0, CHUNK)
    z = scores_to_sample(inputs, row, cols, n_vocab)
    ratio, weight = ratio_and_weight(z, z_max)
    if filters.min_p_ptr is not None:  # in rows with lists it is applied later, after top-p
        min_p = tl.where(threshold < float("inf"), 0.0, load_min_p(filters.min_p_ptr, row))
        weight = weight_of(tl.where(ratio >= min_p, ratio, 0.0))
    tl.store(weights_ptr + pid, tl.sum(weight))
    if written.lists_ptr is not None:
        if threshold < float("inf"):
            size = tl.zeros([], tl.int32)
            if tl.max(z, 0) >= threshold:
                # computed again, piece by piece: a whole chunk with its slots exceeds the registers
                for start in range(0, CHUNK, PIECE):
                    piece = first + start + tl.arange(0, PIECE)
                    scores = scores_to_sample(inputs, row, piece, n_vocab)
                    size = _append(
                        scores, piece, z_max, threshold, size, list_ptr, n_listed_ptr, small_ptr,
                        SMALL,
                    )  # fmt: skip
            tl.store(written.sizes_ptr + pid, size)
