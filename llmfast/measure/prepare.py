"""Preparation that all benchmarks of a model share: the copy bandwidth, the model, its limits."""

from __future__ import annotations

from typing import Any

import torch

from .figures import BenchResult, Progress, make_row, no_progress
from .results import CEILING_CASE
from .shapes import Source, dtype_name
from .timing import copy_bandwidth, copy_bytes


def prepare(source: Source, progress: Progress = no_progress) -> tuple[BenchResult, Any]:
    """Measure the copy bandwidth if there is a GPU, and make the model on that device.

    Returns:
        A result with the copy's row and no others, and the model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    progress(f"Preparing the model on {device}", 0, 0)
    result = BenchResult(source.case)
    if device.type == "cuda":
        copy = copy_bandwidth()
        result.bandwidth = copy.per_second(copy_bytes())
        row = make_row(CEILING_CASE, "torch", "gb_per_s", result.bandwidth, copy.rounds)
        result.rows.append(row)
    model = source.make(device)
    dtype = dtype_name(model.dtype)
    result.model |= {"weights": dtype, "kv": dtype}
    return result, model


def weight_options(label: str) -> dict[str, Any]:
    """Return the options of ``patch`` and ``LLM`` that round weights as ``int4-g64`` or ``int8``.

    Without a group the options choose it by the weights: one scale per output for int8.
    """
    weights, _, group = label.partition("-g")
    return {"weights": weights, "group_size": int(group) if group else "auto"}
