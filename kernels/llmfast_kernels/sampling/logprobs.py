"""Log-probabilities of raw logits in Triton: of a token, and of the most likely."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import CachedLauncher
from .keys import NO_RANK, rank_of, ranked_col, ranked_value
from .reference import OK

_OK = tl.constexpr(OK)
_TILE = 1024  # ranks that a row's program takes at a time


@triton.jit(do_not_specialize=["n_listed"])
def _chunk_logprobs_kernel(
    logits_ptr,  # [B, n_vocab]
    sums_ptr,  # [B, n_chunks, 2], written: the largest of a chunk, and the sum of exp beside it
    ranks_ptr,  # [B, n_chunks, n_listed], written: the largest ranks; None without n_top
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
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 equals 0.0, and must have its key
    x_max = tl.max(x, 0)
    ratio = tl.where(x == float("-inf"), 0.0, tl.exp(x - x_max))
    tl.store(sums_ptr + 2 * pid, x_max)
    tl.store(sums_ptr + 2 * pid + 1, tl.sum(ratio, 0))
    if ranks_ptr is not None:
        rank = rank_of(x, cols)
        for i in range(0, n_listed):
            largest = tl.max(rank, 0)
            tl.store(ranks_ptr + pid.to(tl.int64) * n_listed + i, largest)
            rank = tl.where(rank == largest, NO_RANK, rank)


@triton.jit(do_not_specialize=["n_listed", "n_top"])
def _logprobs_kernel(
    logits_ptr,  # [B, n_vocab]
    tokens_ptr,  # [B]
    status_ptr,  # [B]
    sums_ptr,  # [B, n_chunks, 2]
    ranks_ptr,  # [B, n_chunks, n_listed]
    logprobs_ptr,  # [B], written
    top_tokens_ptr,  # [B, n_top], written
    top_logprobs_ptr,  # [B, n_top], written
    n_vocab,
    stride_logits,
    n_listed,
    n_top,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    chunks = tl.arange(0, MAX_CHUNKS)
    sums = sums_ptr + 2 * (row * n_chunks + chunks)
    chunk_max = tl.load(sums, mask=chunks < n_chunks, other=float("-inf"))
    x_max = tl.max(chunk_max, 0)
    sum = tl.load(sums + 1, mask=chunks < n_chunks, other=0.0)
    log_sum = tl.log(tl.sum(sum * tl.exp(chunk_max - x_max), 0))

    broken = tl.load(status_ptr + row) != _OK
    x = tl.load(logits_ptr + row * stride_logits + tl.load(tokens_ptr + row)).to(tl.float32)
    tl.store(logprobs_ptr + row, tl.where(broken, float("nan"), x - x_max - log_sum))

    if ranks_ptr is not None:
        ranks_row = ranks_ptr + row * n_chunks * n_listed
        last = tl.full([], 2**63 - 1, tl.int64)
        for i in range(0, n_top):
            best = tl.full([TILE], NO_RANK, tl.int64)
            for start in range(0, n_chunks * n_listed, TILE):
                at = start + tl.arange(0, TILE)
                rank = tl.load(ranks_row + at, mask=at < n_chunks * n_listed, other=NO_RANK)
                best = tl.where(rank < last, tl.maximum(best, rank), best)
            last = tl.max(best, 0)
            logprob = ranked_value(last) - x_max - log_sum
            tl.store(top_tokens_ptr + row * n_top + i, tl.where(broken, 0, ranked_col(last)))
            tl.store(top_logprobs_ptr + row * n_top + i, tl.where(broken, float("nan"), logprob))


_chunk_logprobs = CachedLauncher(_chunk_logprobs_kernel)
_logprobs = CachedLauncher(_logprobs_kernel)


def launch_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    status: torch.Tensor,
    n_top: int,
    chunk: int,
    num_warps: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(those of tokens, the n_top most likely tokens, theirs): the fields of Sampled."""
    n_rows, n_vocab = logits.shape
    n_chunks = -(-n_vocab // chunk)
    max_chunks = triton.next_power_of_2(n_chunks)
    n_listed = min(n_top, chunk)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    logprobs = empty(n_rows)
    sums = empty(n_rows, n_chunks, 2)
    ranks = top_tokens = top_logprobs = None
    if n_top > 0:
        ranks = empty(n_rows, n_chunks, n_listed, dtype=torch.int64)
        top_tokens = empty(n_rows, n_top, dtype=torch.int64)
        top_logprobs = empty(n_rows, n_top)
    numbers = (n_vocab, logits.stride(0))
    _chunk_logprobs(
        (n_rows * n_chunks,),
        (logits, sums, ranks, *numbers, n_listed, chunk),
        num_warps=num_warps,
    )
    written = (logprobs, top_tokens, top_logprobs)
    lengths, constexprs = (n_listed, n_top), (chunk, max_chunks, _TILE)
    _logprobs(
        (n_rows,),
        (logits, tokens, status, sums, ranks, *written, *numbers, *lengths, *constexprs),
        num_warps=4,
    )
    return written
