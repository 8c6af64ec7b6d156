"""Compiling and capturing before the first call, so that no call waits for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import track

from .runner import PREFILL_TOKENS, Runner, Sampling

# lengths of prompts that between them reach every kernel variant of a prefill
_PROMPTS = (1, 3, 6, 12, 40, 200, 2500)


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did."""

    seconds: float
    graphs: int  # that the runner has now


def warm_up(
    runner: Runner,
    rows: Sequence[int],
    samplings: Sequence[Sampling] = (Sampling(),),
    *,
    progress: bool = False,
) -> WarmUp:
    """Run prompts of every kind of length, and capture the graphs of some batch sizes.

    Args:
        runner: idle.
        rows: sizes of batches.
        samplings: ways of choosing tokens; those that differ in numbers alone share a graph.
        progress: show a bar.
    """
    started = time.perf_counter()
    jobs = [(1, n) for n in _PROMPTS if n + 1 <= min(runner.max_length, PREFILL_TOKENS)]
    jobs += [(n, 1) for n in rows]
    todo = [(job, sampling) for sampling in samplings for job in jobs]
    for (batch, length), sampling in track(
        todo, description="compiling and capturing", disable=not progress, transient=True
    ):
        ids = torch.zeros(batch * length, dtype=torch.int64, device=runner.device)
        seeds = torch.zeros(batch, dtype=torch.int64, device=runner.device)
        try:
            runner.start(ids, [length] * batch, 1, sampling, seeds)
        finally:
            runner.end()
    runner.warm = True
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return WarmUp(time.perf_counter() - started, runner.num_graphs)
