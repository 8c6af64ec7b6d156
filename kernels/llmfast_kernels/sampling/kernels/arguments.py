"""Groups of kernel arguments. The host fills them with tensors; in a kernel they hold pointers.

A member that is None is absent. The kernel is then compiled without it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ScoreInputs(NamedTuple):
    """Raw logits and the parameters that turn them into scores."""

    logits_ptr: torch.Tensor  # [B, n_vocab]
    repetition_ptr: torch.Tensor | None  # [B]
    presence_ptr: torch.Tensor | None  # [B]
    frequency_ptr: torch.Tensor | None  # [B]
    seen_ptr: torch.Tensor | None  # [B, n_vocab] bytes
    counts_ptr: torch.Tensor | None  # [B, n_vocab]
    bias_ptr: torch.Tensor | None  # [B, n_vocab]
    temperature_ptr: torch.Tensor | None  # [B]; None: all rows are greedy
    stride_logits: int
    stride_seen: int
    stride_counts: int
    stride_bias: int


class Filters(NamedTuple):
    """The filters' parameters, [B] each."""

    top_k_ptr: torch.Tensor | None
    top_p_ptr: torch.Tensor | None
    min_p_ptr: torch.Tensor | None


class ChunkMaxima(NamedTuple):
    """The results of chunk_max, the first pass over the logits."""

    maxima_ptr: torch.Tensor  # [B, n_chunks, GROUPS]: the largest score of each group
    first_ptr: torch.Tensor  # [B, n_chunks], in greedy rows: the first column with the largest
    sums_ptr: torch.Tensor | None  # [B, n_chunks, 2]: see _top_p_threshold; with top-p only


class Candidates(NamedTuple):
    """The scores from a row's threshold on; all None without top-k and top-p."""

    lists_ptr: torch.Tensor | None  # [B, stride_lists]: a list for each chunk, CHUNK scores apart
    sizes_ptr: torch.Tensor | None  # [B, n_chunks]: lengths of the lists
    n_listed_ptr: torch.Tensor | None  # [B]: scores in small_ptr; 0 or above SMALL: unused
    small_ptr: torch.Tensor | None  # [B, 2, SMALL]: sort keys and weights of at most SMALL scores
