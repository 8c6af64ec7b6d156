"""Online benchmark of ``AsyncLLM``: requests that arrive over time."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..engine.async_llm import AsyncLLM
from ..engine.sampling_params import SamplingParams
from ..model.sizes import ModelSizes
from .figures import OURS, BenchResult, Progress, no_progress
from .shapes import Source
from .stats import median_estimate, percentile
from .workload import Timeline, Workload, check_answered, engine_options, prepare_engine_model

PERCENTILES = (50, 90, 99)


def measure_serve(
    source: Source,
    workload: Workload,
    rates: Sequence[float],
    *,
    repeats: int = 1,
    options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> BenchResult:
    """Measure requests that arrive as a Poisson process, at each of several rates.

    Times are those of a reader in the event loop, from sending a request to receiving its outputs.

    Args:
        rates: requests per second on average; infinity sends all at once.

    Other arguments and errors are those of :func:`.offline.measure_throughput`.
    """
    result, model = prepare_engine_model(source, workload.input[1], workload.output[1], progress)
    llm = AsyncLLM(model, **engine_options(workload.longest, options))
    try:
        asyncio.run(_all_rates(result, llm, model, workload, rates, repeats, progress))
    finally:
        llm.close()
    return result


async def _all_rates(
    result: BenchResult,
    llm: AsyncLLM,
    model: Any,
    workload: Workload,
    rates: Sequence[float],
    repeats: int,
    progress: Progress,
) -> None:
    short = SamplingParams(max_tokens=4, ignore_eos=True)
    await send_requests(llm, [[1, 2, 3]] * 2, [short] * 2, math.inf)
    for number, rate in enumerate(rates):
        samples: dict[str, list[float]] = {}
        for again in range(number * repeats, (number + 1) * repeats):
            progress(f"{rate:g} requests/s", again, len(rates) * repeats)
            prompts, params = workload.draw(ModelSizes.of(model).vocabulary, again)
            seed = workload.seed + again
            timelines = await send_requests(llm, prompts, params, rate, seed=seed)
            for metric, figure in summarize(timelines).items():
                samples.setdefault(metric, []).append(figure)
        for metric, figures in samples.items():
            key = {**workload.key, "rate": f"{rate:g}"}
            result.add(OURS, key, metric, median_estimate(figures), repeats)


async def send_requests(
    llm: AsyncLLM,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    rate: float,
    *,
    seed: int = 0,
) -> list[Timeline]:
    """Send requests at random times, ``rate`` per second on average, and read all answers."""
    started = time.perf_counter()

    async def read_at(prompt: list[int], own: SamplingParams, at: float) -> Timeline:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        timeline = Timeline(time.perf_counter())
        await read_answer(llm, prompt, own, timeline)
        return timeline

    times = poisson_arrivals(len(prompts), rate, seed)
    return await asyncio.gather(
        *(read_at(*request) for request in zip(prompts, params, times, strict=True))
    )


async def read_answer(
    llm: AsyncLLM, prompt: list[int], params: SamplingParams, timeline: Timeline
) -> None:
    """Send a request and record when its tokens arrive.

    Raises:
        UserError: the request failed.
    """
    async for output in llm.generate(prompt, params):
        check_answered(output)
        timeline.record(len(output.outputs[0].token_ids))


def poisson_arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Draw the times in seconds of ``count`` events of a Poisson process, the first at 0."""
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(f"arrivals {seed}")
    return list(accumulate([0.0, *(rng.expovariate(rate) for _ in range(count - 1))]))


def summarize(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Return the metrics of the suite ``serve``.

    Percentiles are over requests, those of ``itl`` over the gaps of all requests.
    """
    span = max(t.received_at[-1] for t in timelines) - min(t.sent_at for t in timelines)
    figures = {
        "req_per_s": len(timelines) / span,
        "out_tok_per_s": sum(t.tokens for t in timelines) / span,
    }
    for name, samples in (
        ("ttft", [t.time_to_first_token for t in timelines]),
        ("itl", [gap for t in timelines for gap in t.gaps]),
        ("e2e", [t.end_to_end for t in timelines]),
    ):
        for share in PERCENTILES if samples else ():
            figures[f"{name}_p{share}_ms"] = percentile(samples, share / 100) * 1e3
    return figures
