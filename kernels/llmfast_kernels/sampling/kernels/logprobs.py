"""Log-probabilities of raw logits: of the chosen tokens, and of the most likely.

Two kernels: a program per chunk finds the chunk's sum and its largest logits, a program per row
those of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import OK
from .sort_keys import LOWEST, col_part_desc, key_part, key_then_col_desc, value_of

_OK = tl.constexpr(OK)


@triton.jit(do_not_specialize=["n_listed"])
def chunk_logprobs_kernel(
    logits_ptr,  # [B, n_vocab]
    sums_ptr,  # [B, n_chunks, 2], written: the chunk's largest logit, the sum of exp relative to it
    sort_keys_ptr,  # [B, n_chunks, n_listed], written: the chunk's largest; None without n_top
    n_vocab,
    stride_logits,
    n_listed,
    CHUNK: tl.constexpr,
):
    pid = tl.program_id(0)
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    row = (pid // n_chunks).to(tl.int64)
    cols = pid % n_chunks * CHUNK + tl.arange(0, CHUNK)
    mask = cols < n_vocab
    x = tl.load(logits_ptr + row * stride_logits + cols, mask=mask, other=float("-inf"))
    x = x.to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 equals 0.0 and must have its sort key
    x_max = tl.max(x, 0)
    ratio = tl.where(x == float("-inf"), 0.0, tl.exp(x - x_max))
    tl.store(sums_ptr + 2 * pid, x_max)
    tl.store(sums_ptr + 2 * pid + 1, tl.sum(ratio, 0))
    if sort_keys_ptr is not None:
        sort_key = key_then_col_desc(x, cols)
        for i in range(0, n_listed):
            largest = tl.max(sort_key, 0)
            tl.store(sort_keys_ptr + pid.to(tl.int64) * n_listed + i, largest)
            sort_key = tl.where(sort_key == largest, LOWEST, sort_key)


@triton.jit(do_not_specialize=["n_listed", "n_top"])
def logprobs_kernel(
    logits_ptr,  # [B, n_vocab]
    tokens_ptr,  # [B]
    status_ptr,  # [B]
    sums_ptr,  # [B, n_chunks, 2]
    sort_keys_ptr,  # [B, n_chunks, n_listed]
    logprobs_ptr,  # [B], written
    top_tokens_ptr,  # [B, n_top], written
    top_logprobs_ptr,  # [B, n_top], written
    n_vocab,
    stride_logits,
    n_listed,
    n_top,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,  # sort keys that are read at a time
):
    row = tl.program_id(0).to(tl.int64)
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    chunks = tl.arange(0, MAX_CHUNKS)
    sums = sums_ptr + 2 * (row * n_chunks + chunks)
    chunk_max = tl.load(sums, mask=chunks < n_chunks, other=float("-inf"))
    x_max = tl.max(chunk_max, 0)
    sum = tl.load(sums + 1, mask=chunks < n_chunks, other=0.0)
    log_sum = tl.log(tl.sum(sum * tl.exp(chunk_max - x_max), 0))

    failed = tl.load(status_ptr + row) != _OK
    x = tl.load(logits_ptr + row * stride_logits + tl.load(tokens_ptr + row)).to(tl.float32)
    tl.store(logprobs_ptr + row, tl.where(failed, float("nan"), x - x_max - log_sum))

    if sort_keys_ptr is not None:
        sort_keys_row = sort_keys_ptr + row * n_chunks * n_listed
        last = tl.full([], 2**63 - 1, tl.int64)
        for i in range(0, n_top):
            best = tl.full([TILE], LOWEST, tl.int64)
            for start in range(0, n_chunks * n_listed, TILE):
                entries = start + tl.arange(0, TILE)
                mask = entries < n_chunks * n_listed
                sort_key = tl.load(sort_keys_row + entries, mask=mask, other=LOWEST)
                best = tl.where(sort_key < last, tl.maximum(best, sort_key), best)
            last = tl.max(best, 0)
            token = tl.where(failed, 0, col_part_desc(last))
            logprob = value_of(key_part(last)) - x_max - log_sum
            tl.store(top_tokens_ptr + row * n_top + i, token)
            tl.store(top_logprobs_ptr + row * n_top + i, tl.where(failed, float("nan"), logprob))
