"""Sampling on the device, for every kind of step."""

from __future__ import annotations

from typing import Any

import torch

from llmfast_kernels import sample_tokens
from llmfast_kernels.sampling.reference import Sampled

from .inputs import SamplingOps, StepTensors


def sample_rows(
    logits: torch.Tensor,
    tensors: StepTensors,
    ops: SamplingOps,
    **more: Any,
) -> Sampled:
    """Sample a token from each row of ``logits`` by the parameters of a step's first rows.

    Args:
        logits: ``[n, vocabulary]``, raw.
        ops: the parts of sampling to run.
        more: arguments of ``sample_tokens`` that are not fields of a step, or replace one.
    """
    n = len(logits)
    options: dict[str, Any] = {}
    if ops.draws:
        options["temperature"] = tensors.temperature[:n]
        options["seeds"] = tensors.seeds[:n]
        options["positions"] = tensors.draws[:n]
    if ops.filters:
        options["top_k"] = tensors.top_k[:n]
        options["top_p"] = tensors.top_p[:n]
        options["min_p"] = tensors.min_p[:n]
    return sample_tokens(logits, **(options | more))


def stop_token_bias(
    stop_tokens: torch.Tensor, suppressed: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """Return the bias that keeps some rows from choosing a stop token.

    Args:
        stop_tokens: int64 ``[rows or 1, n]``; entries outside the vocabulary name no token.
        suppressed: bool ``[rows]``, the rows that may not stop yet.

    Returns:
        float32 ``[rows, vocabulary]``: -inf at the stop tokens of suppressed rows, 0 elsewhere.
    """
    named = (stop_tokens >= 0) & (stop_tokens < vocabulary) & suppressed[:, None]
    width = -(-(vocabulary + 1) // 16) * 16  # aligned rows, and a column for entries without a name
    bias = torch.zeros(len(suppressed), width, dtype=torch.float32, device=suppressed.device)
    places = torch.where(named, stop_tokens, vocabulary)
    return bias.scatter_(1, places, -torch.inf)[:, :vocabulary]
