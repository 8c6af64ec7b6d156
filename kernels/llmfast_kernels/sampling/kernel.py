"""Launching the kernels of sampling. op.py has checked the arguments.

A row is cut into chunks, one per program. Four kernels run after one another, each in the file of
its name in ``kernels/``:

    chunk_max    per chunk   the largest scores
    threshold    per row     the row's largest score, and a threshold that no score which the
                             filters keep is below
    candidates   per chunk   the sum of the weights, and a list of the scores from the threshold on
    sample       per row     the filters' cut in the lists, the chunk that is drawn, its token

Up to SMALL candidates of a row are stored together as well, and sample reads nothing else. After
top-k, in a batch of many rows, threshold lists them and candidates has nothing to do.

Each kernel computes the scores it needs from the logits: reading them back would cost more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton

from ..common.launch import CachedLauncher
from .kernels.arguments import Candidates, ChunkMaxima, Filters, ScoreInputs
from .kernels.candidates import candidates_kernel
from .kernels.chunk_max import chunk_max_kernel
from .kernels.logprobs import chunk_logprobs_kernel, logprobs_kernel
from .kernels.sample import sample_kernel
from .kernels.threshold import threshold_kernel
from .reference import Sampled

_FEW_ROWS = 8  # their programs do not fill a GPU
_MAX_CHUNKS = 128  # a row's program holds a number for each
_GROUP = 64  # scores of a chunk whose largest is stored
_MAX_GROUPS = 2048  # of a row
_TILE = 1024  # candidates that a row's program reads at a time
_SMALL = 128  # candidates of a row that are compared each with each


@dataclass(frozen=True)
class Launch:
    """How a row is cut into chunks."""

    chunk: int  # scores of a program, a power of 2
    max_chunks: int  # of a row, rounded up to a power of 2
    groups: int  # of a chunk: their maxima give the threshold of top-k
    width: int  # columns of the tile in which a row's program reads the lists of all chunks
    small: int  # candidates of a row up to which sample compares each with each
    listed_by_row: bool  # candidates of top-k are listed by the row's program, else by the chunks'
    num_warps: int  # of a chunk's program
    row_warps: int  # of a row's program


@cache
def choose_launch(n_rows: int, n_vocab: int) -> Launch:
    """Pick the launch for ``n_rows`` rows of ``n_vocab`` logits. Pure: it asks no device."""
    # a few rows must fill the GPU; with many rows larger chunks need fewer programs
    wanted = 1024 if n_rows <= _FEW_ROWS else 2048
    chunk = max(wanted, triton.next_power_of_2(-(-n_vocab // _MAX_CHUNKS)))
    chunk = min(chunk, triton.next_power_of_2(n_vocab))
    max_chunks = triton.next_power_of_2(-(-n_vocab // chunk))
    return Launch(
        chunk,
        max_chunks,
        groups=max(min(chunk // _GROUP, _MAX_GROUPS // max_chunks), 1),
        width=_TILE // max_chunks,
        small=_SMALL,
        listed_by_row=n_rows > _FEW_ROWS,
        num_warps=min(max(chunk // 256, 1), 4 if chunk <= 2048 else 8),
        row_warps=4 if chunk <= 2048 else 8,
    )


_chunk_max = CachedLauncher(chunk_max_kernel, pdl=True)
_threshold = CachedLauncher(threshold_kernel, pdl=True)
_candidates = CachedLauncher(candidates_kernel, pdl=True)
_sample = CachedLauncher(sample_kernel, pdl=True)
_chunk_logprobs = CachedLauncher(chunk_logprobs_kernel)
_logprobs = CachedLauncher(logprobs_kernel)


class _Buffers(NamedTuple):
    """The tensors that the kernels of one call write."""

    tokens: torch.Tensor  # int64 [B]
    status: torch.Tensor  # int32 [B]
    chunk_maxima: ChunkMaxima
    candidates: Candidates
    stride_lists: int
    z_max: torch.Tensor | None  # [B]; None without a temperature, as the next two
    threshold: torch.Tensor | None  # [B]
    weights: torch.Tensor | None  # int64 [B, n_chunks]


def _allocate(inputs: ScoreInputs, filters: Filters, launch: Launch) -> _Buffers:
    n_rows, n_vocab = inputs.logits_ptr.shape
    n_chunks = -(-n_vocab // launch.chunk)
    groups = 1 if filters.top_k_ptr is None else launch.groups
    stride_lists = n_chunks * launch.chunk + launch.max_chunks * launch.width

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty((n_rows, *shape), dtype=dtype, device=inputs.logits_ptr.device)

    sums = z_max = threshold = weights = None
    candidates = Candidates(None, None, None, None)
    if inputs.temperature_ptr is not None:
        z_max = empty(torch.float32)
        threshold = empty(torch.float32)
        weights = empty(torch.int64, n_chunks)
    if filters.top_k_ptr is not None or filters.top_p_ptr is not None:
        candidates = Candidates(
            lists_ptr=empty(torch.float32, stride_lists),
            sizes_ptr=empty(torch.int32, n_chunks),
            n_listed_ptr=empty(torch.int32),
            small_ptr=empty(torch.int64, 2, launch.small),
        )
    if filters.top_p_ptr is not None:
        sums = empty(torch.float32, n_chunks, 2)
    return _Buffers(
        empty(torch.int64),
        empty(torch.int32),
        ChunkMaxima(empty(torch.float32, n_chunks, groups), empty(torch.int32, n_chunks), sums),
        candidates,
        stride_lists,
        z_max,
        threshold,
        weights,
    )


def launch_sample_tokens(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    repetition_penalty: torch.Tensor | None = None,
    presence_penalty: torch.Tensor | None = None,
    frequency_penalty: torch.Tensor | None = None,
    prompt_seen: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    logprobs: int | None = None,
) -> Sampled:
    if temperature is None:
        top_k = top_p = min_p = None

    def stride(x: torch.Tensor | None) -> int:
        return 1 if x is None else x.stride(0)  # of a bias for all rows it is 0

    inputs = ScoreInputs(
        logits_ptr=logits,
        repetition_ptr=repetition_penalty,
        presence_ptr=presence_penalty,
        frequency_ptr=frequency_penalty,
        seen_ptr=None if prompt_seen is None else prompt_seen.view(torch.uint8),
        counts_ptr=output_counts,
        bias_ptr=bias,
        temperature_ptr=temperature,
        stride_logits=logits.stride(0),
        stride_seen=stride(prompt_seen),
        stride_counts=stride(output_counts),
        stride_bias=stride(bias),
    )
    launch = choose_launch(*logits.shape)
    filters = Filters(top_k, top_p, min_p)
    buffers = _allocate(inputs, filters, launch)
    _launch(inputs, filters, buffers, launch, seeds, positions)
    if logprobs is None:
        return Sampled(buffers.tokens, buffers.status)
    of_tokens = launch_logprobs(logits, buffers.tokens, buffers.status, logprobs, launch)
    return Sampled(buffers.tokens, buffers.status, *of_tokens)


def _launch(
    inputs: ScoreInputs,
    filters: Filters,
    buffers: _Buffers,
    launch: Launch,
    seeds: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> None:
    n_rows, n_vocab = inputs.logits_ptr.shape
    tokens, status, chunk_maxima, candidates, stride_lists, z_max, threshold, weights = buffers
    by_chunk, by_row = (n_rows * -(-n_vocab // launch.chunk),), (n_rows,)
    chunk, small = launch.chunk, launch.small
    groups = chunk_maxima.maxima_ptr.shape[-1]
    # no product is fused with a sum: scores equal the reference's bit for bit
    chunk_options = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    row_options = {"num_warps": launch.row_warps, "enable_fp_fusion": False}
    # a filter that a kernel does not read is left out, so that no variant differs by it alone
    _chunk_max(
        by_chunk,
        (inputs, filters._replace(min_p_ptr=None), chunk_maxima, n_vocab, chunk, groups),
        **chunk_options,
    )
    written = (tokens, status, z_max, threshold, stride_lists)
    _threshold(
        by_row,
        (inputs, filters._replace(min_p_ptr=None), chunk_maxima, candidates, *written, n_vocab,
         chunk, launch.max_chunks, groups, small, launch.listed_by_row),
        **row_options,
    )  # fmt: skip
    if inputs.temperature_ptr is None:
        return
    row_results = (z_max, threshold, weights, stride_lists)
    _candidates(
        by_chunk,
        (inputs, filters._replace(top_p_ptr=None), candidates, chunk_maxima.maxima_ptr,
         *row_results, n_vocab, chunk, groups, small),
        **chunk_options,
    )  # fmt: skip
    _sample(
        by_row,
        (inputs, filters, candidates, seeds, positions, *row_results, tokens, n_vocab,
         chunk, launch.max_chunks, launch.width, small),
        **row_options,
    )  # fmt: skip


def launch_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, status: torch.Tensor, n_top: int, launch: Launch
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the fields of Sampled: logprobs, top_tokens and top_logprobs."""
    n_rows, n_vocab = logits.shape
    n_chunks = -(-n_vocab // launch.chunk)
    n_listed = min(n_top, launch.chunk)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty((n_rows, *shape), dtype=dtype, device=logits.device)

    logprobs = empty()
    sums = empty(n_chunks, 2)
    sort_keys = top_tokens = top_logprobs = None
    if n_top > 0:
        sort_keys = empty(n_chunks, n_listed, dtype=torch.int64)
        top_tokens = empty(n_top, dtype=torch.int64)
        top_logprobs = empty(n_top)
    sizes = (n_vocab, logits.stride(0), n_listed)
    _chunk_logprobs(
        (n_rows * n_chunks,),
        (logits, sums, sort_keys, *sizes, launch.chunk),
        num_warps=launch.num_warps,
    )
    written = (logprobs, top_tokens, top_logprobs)
    _logprobs(
        (n_rows,),
        (logits, tokens, status, sums, sort_keys, *written, *sizes, n_top,
         launch.chunk, launch.max_chunks, _TILE),
        num_warps=4,
    )  # fmt: skip
    return written
