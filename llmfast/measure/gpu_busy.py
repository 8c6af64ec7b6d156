"""The share of time in which the GPU is busy while the engine steps, and the host time per step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.core import EngineCore
from ..engine.llm import LLM
from ..engine.sampling_params import SamplingParams
from ..errors import UserError
from ..loading.embedded import INSTALL, embedded_model_path

CLOCKED_STEPS = 50  # in a workload of a hundred tokens or more no request ends in as many steps
TRACED_STEPS = 200

Interval = tuple[float, float]  # start and end, in seconds of one clock
Trace = Callable[[], AbstractContextManager[list[Interval]]]


@dataclass(frozen=True)
class StepProfile:
    """Host and GPU times of steps in which all requests decode."""

    host_seconds: list[float]  # host time of each clocked step, waiting excluded
    busy_share: float  # share of the traced time in which a kernel ran
    gpu_seconds: float  # time in which a kernel ran, per traced step


def union_length(intervals: Iterable[Interval]) -> float:
    """Return the length of the union of intervals, which may overlap and be in any order."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def busy_share(intervals: list[Interval]) -> float:
    """Return the covered share of the time from the first start to the last end.

    Raises:
        ValueError: there is no interval, or all have no length.
    """
    span = max((end for _, end in intervals), default=0.0) - min(
        (start for start, _ in intervals), default=0.0
    )
    if span <= 0:
        raise ValueError("busy_share: wanted intervals of some length")
    return union_length(intervals) / span


@contextmanager
def trace_kernels() -> Iterator[list[Interval]]:
    """Trace the block. The yielded list holds the kernels' intervals after the block has ended."""
    from torch.profiler import ProfilerActivity, profile

    intervals: list[Interval] = []
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield intervals
        torch.cuda.synchronize()
    for event in profiler.events():
        copies = event.name.startswith(("Memcpy", "Memset"))
        if event.device_type.name == "CUDA" and not copies and not event.is_user_annotation:
            intervals.append((event.time_range.start / 1e6, event.time_range.end / 1e6))


def profile_steps(
    llm: LLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    *,
    clocked: int = CLOCKED_STEPS,
    traced: int = TRACED_STEPS,
    trace: Trace = trace_kernels,
) -> StepProfile:
    """Run requests until all that fit decode, then clock some steps and trace the next ones.

    The host time of a step is the time of the engine's step, less the time it waits for the GPU:
    scheduling, inputs, launching, stop conditions and text. Only the clocked steps with the most
    sequences count.

    Raises:
        UserError: the answers end before all steps are done.
    """
    core = llm.core
    requests = core.processor.process(prompts, params)
    core.add(requests, streaming=True)  # streaming: text is made in every step

    def step() -> None:
        if all(request.finished for request in requests):
            raise UserError(
                f"--busy wants {clocked + traced} steps in which all requests decode, and the "
                "answers ended before; raise --output"
            )
        core.step()

    try:
        while not _all_decode(core, len(prompts)):
            step()
        steps = []
        for _ in range(clocked):
            rows, waited, started = len(core.scheduler.running), core.model_runner.waited, _now()
            step()
            took = _now() - started
            steps.append((rows, took - (core.model_runner.waited - waited)))
        with trace() as intervals:
            for _ in range(traced):
                step()
    finally:
        core.abort(requests)
    most = max(rows for rows, _ in steps)
    host = [seconds for rows, seconds in steps if rows == most]
    return StepProfile(host, busy_share(intervals), union_length(intervals) / traced)


def _now() -> float:
    return time.perf_counter()


def _all_decode(core: EngineCore, requests: int) -> bool:
    """Return whether as many requests run as can, with all their prompts computed."""
    scheduler = core.scheduler
    full = len(scheduler.running) == min(requests, scheduler.max_num_seqs)
    return (full or not scheduler.has_waiting) and all(s.remaining <= 1 for s in scheduler.running)


class FoldedTokenizer:
    """The embedded model's tokenizer for tokens of any model: it makes realistic text of them.

    Random weights draw all tokens alike, real text does not. So tokens are folded onto 4,096 of the
    first ones, which are the most frequent, without the single bytes.

    Raises:
        UserError: the embedded model is not installed.
    """

    FIRST, TOKENS = 512, 4096
    eos_token_id = None

    def __init__(self) -> None:
        from ..loading.gguf_file import GgufFile
        from ..loading.gguf_tokenizer import load_tokenizer

        path = embedded_model_path()
        if path is None:
            raise UserError(f"--busy makes text with the embedded model's tokenizer: {INSTALL}")
        self._tokenizer = load_tokenizer(GgufFile(path), 1)
        self.backend_tokenizer = self._tokenizer.backend_tokenizer

    def __len__(self) -> int:
        return self.TOKENS

    def decode(self, tokens: list[int], **options: Any) -> Any:
        """Decode as a transformers tokenizer does."""
        return self._tokenizer.decode(
            [self.FIRST + token % self.TOKENS for token in tokens], **options
        )
