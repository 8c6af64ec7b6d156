"""Sampling in Triton. Arguments are checked by op.py; here they are taken as good.

A row is cut in chunks, each the work of a program. Four kernels follow each other, the last three
in files of their names:

    survey   by chunk   the largest scores
    bound    by row     the largest of all, and a bound that no score which filters keep is below
    weigh    by chunk   the sum of the weights; and the scores from the bound on, in a list
    draw     by row     the filters' cut in the lists, the chunk that is drawn, its token

Where few scores are listed, they stand together too, and draw needs nothing else. After top-k, in a
batch of many rows, bound lists them and weigh has nothing to do.

Scores are computed anew from the logits where they are needed: reading them back would cost more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ..common.launch import CachedLauncher
from ..common.pdl import wait_for_inputs
from .bound import _bound_kernel
from .draw import _draw_kernel
from .filters import load_top_k, load_top_p
from .keys import NO_COL
from .logprobs import launch_logprobs
from .reference import Sampled
from .scores import heated, penalised
from .weigh import _weigh_kernel

_FEW_ROWS = 8  # whose programs do not fill a GPU
_MAX_CHUNKS = 128  # a row's program holds a number for each
_GROUP = 64  # scores of a chunk whose largest is kept apart
_MAX_GROUPS = 2048  # of a row
_TILE = 1024  # listed scores that a row's program takes at a time
_FEW = 128  # listed scores of a row that are compared each with each


@dataclass(frozen=True)
class Launch:
    """How a row is cut."""

    chunk: int  # scores of a program, a power of 2
    max_chunks: int  # of a row, rounded up to a power of 2
    groups: int  # of a chunk: the largest score of each bounds top-k
    width: int  # columns of the tile in which a row's program takes the lists of all chunks
    few: int  # listed scores of a row up to which draw compares each with each
    listed_by_row: bool  # those after top-k, by a row's program; else by the chunks'
    num_warps: int  # of a chunk's program
    row_warps: int  # of a row's


@cache
def choose_launch(n_rows: int, n_vocab: int) -> Launch:
    """Pick the launch for ``n_rows`` rows of ``n_vocab`` logits. Pure: it asks no device."""
    # a few rows must fill the GPU; of many, larger chunks start fewer programs
    wanted = 1024 if n_rows <= _FEW_ROWS else 2048
    chunk = max(wanted, triton.next_power_of_2(-(-n_vocab // _MAX_CHUNKS)))
    chunk = min(chunk, triton.next_power_of_2(n_vocab))
    max_chunks = triton.next_power_of_2(-(-n_vocab // chunk))
    return Launch(
        chunk,
        max_chunks,
        groups=max(min(chunk // _GROUP, _MAX_GROUPS // max_chunks), 1),
        width=_TILE // max_chunks,
        few=_FEW,
        listed_by_row=n_rows > _FEW_ROWS,
        num_warps=min(max(chunk // 256, 1), 4 if chunk <= 2048 else 8),
        row_warps=4 if chunk <= 2048 else 8,
    )


@triton.jit
def _survey_kernel(
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
    temperature_ptr,  # [B] or None, as the next two
    top_k_ptr,
    top_p_ptr,
    maxima_ptr,  # [B, n_chunks, GROUPS], written: the largest scores
    first_ptr,  # [B, n_chunks], written in greedy rows: where the chunk's largest stands first
    sums_ptr,  # [B, n_chunks, 2], written: see _top_p_bound; None without top-p
    n_vocab,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    wait_for_inputs()
    pid = tl.program_id(0)
    n_chunks = tl.cdiv(n_vocab, CHUNK)
    row = (pid // n_chunks).to(tl.int64)  # int64: rows times columns may pass 2**31
    groups = tl.arange(0, GROUPS)
    members = tl.arange(0, CHUNK // GROUPS)
    cols = pid % n_chunks * CHUNK + groups[:, None] * (CHUNK // GROUPS) + members[None, :]
    z = penalised(
        logits_ptr, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr, counts_ptr, bias_ptr,
        stride_logits, stride_seen, stride_counts, stride_bias, row, cols, n_vocab,
    )  # fmt: skip
    greedy = True
    if temperature_ptr is not None:
        heat = tl.load(temperature_ptr + row)
        greedy = heat <= 0.0
        if (heat < float("inf")) == 0:  # even -inf is no number then
            z = tl.where((z == float("-inf")) & (cols < n_vocab), float("inf"), z)
    maxima = tl.max(z, 1)  # division keeps the order, so that these alone need be divided
    largest = tl.max(maxima, 0)
    tl.store(maxima_ptr + pid.to(tl.int64) * GROUPS + groups, heated(maxima, temperature_ptr, row))
    if greedy:
        tl.store(first_ptr + pid, tl.min(tl.where(z == largest, cols, NO_COL)))
    k = 0
    if top_k_ptr is not None:
        k = load_top_k(top_k_ptr, row, n_vocab)
    if top_p_ptr is not None:
        if (load_top_p(top_p_ptr, row) < 1.0) & (k == 0):
            largest = tl.where(largest == float("-inf"), 0.0, largest)
            root = tl.exp((z - largest) * (0.5 / heat))
            tl.store(sums_ptr + 2 * pid, tl.sum(root))
            tl.store(sums_ptr + 2 * pid + 1, tl.sum(root * root))


_survey = CachedLauncher(_survey_kernel, pdl=True)
_bound = CachedLauncher(_bound_kernel, pdl=True)
_weigh = CachedLauncher(_weigh_kernel, pdl=True)
_draw = CachedLauncher(_draw_kernel, pdl=True)


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
    scored = (
        logits,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        None if prompt_seen is None else prompt_seen.view(torch.uint8),
        output_counts,
        bias,
    )
    options = (temperature, top_k, top_p, min_p, seeds, positions)
    if temperature is None:
        options = (None,) * 6
    return _launch(scored, options, logprobs)


def _launch(
    scored: tuple[torch.Tensor | None, ...],
    options: tuple[torch.Tensor | None, ...],
    logprobs: int | None,
) -> Sampled:
    logits, _, _, _, seen, counts, bias = scored
    temperature, top_k, top_p, min_p, *_ = options
    assert logits is not None
    n_rows, n_vocab = logits.shape
    launch = choose_launch(n_rows, n_vocab)
    n_chunks = -(-n_vocab // launch.chunk)
    groups = 1 if top_k is None else launch.groups
    strides = tuple(1 if t is None else t.stride(0) for t in (logits, seen, counts, bias))

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    tokens = empty(n_rows, dtype=torch.int64)
    status = empty(n_rows, dtype=torch.int32)
    maxima = empty(n_rows, n_chunks, groups, dtype=torch.float32)
    first = empty(n_rows, n_chunks, dtype=torch.int32)
    stride_lists = n_chunks * launch.chunk + launch.max_chunks * launch.width
    sums = z_max = bound = lists = sizes = n_listed = few = None
    if temperature is not None:
        z_max = empty(n_rows, dtype=torch.float32)
        bound = empty(n_rows, dtype=torch.float32)
    if top_k is not None or top_p is not None:
        n_listed = empty(n_rows, dtype=torch.int32)
        few = empty(n_rows, 2, launch.few, dtype=torch.int64)
        lists = empty(n_rows, stride_lists, dtype=torch.float32)
        sizes = empty(n_rows, n_chunks, dtype=torch.int32)
    if top_p is not None:
        sums = empty(n_rows, n_chunks, 2, dtype=torch.float32)
    surveyed = (maxima, first, sums)
    bounded = (tokens, status, z_max, bound, lists, n_listed, few, stride_lists)
    # no product is fused with a sum: scores are bit for bit the reference's
    by_chunk = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    by_row = {"num_warps": launch.row_warps, "enable_fp_fusion": False}
    _survey(
        (n_rows * n_chunks,),
        (*scored, *strides, *options[:3], *surveyed, n_vocab, launch.chunk, groups),
        **by_chunk,
    )
    of_row = (launch.chunk, launch.max_chunks)
    of_bound = (*of_row, groups, launch.few, launch.listed_by_row)
    _bound(
        (n_rows,),
        (*scored, *strides, *surveyed, *options[:3], *bounded, n_vocab, *of_bound),
        **by_row,
    )
    if temperature is not None:
        weights = empty(n_rows, n_chunks, dtype=torch.int64)
        weighed = (z_max, bound, weights, lists, sizes, n_listed, few, stride_lists)
        tile = (launch.chunk, groups, launch.few)
        of_draw = (*of_row, launch.width, launch.few)
        _weigh(
            (n_rows * n_chunks,),
            (*scored, *strides, temperature, top_k, min_p, maxima, *weighed, n_vocab, *tile),
            **by_chunk,
        )
        _draw(
            (n_rows,),
            (*scored, *strides, *options, *weighed, tokens, n_vocab, *of_draw),
            **by_row,
        )
    if logprobs is None:
        return Sampled(tokens, status)
    of_tokens = launch_logprobs(logits, tokens, status, logprobs, launch.chunk, launch.num_warps)
    return Sampled(tokens, status, *of_tokens)
