"""Two serving scenarios: shared prefixes, and long prompts that arrive during decoding."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ..engine.async_llm import AsyncLLM
from ..engine.llm import LLM
from ..engine.sampling_params import SamplingParams
from ..errors import UserError
from ..model.sizes import ModelSizes
from .figures import OURS, BenchResult, Progress, no_progress
from .serve import read_answer
from .shapes import Source
from .stats import median_estimate, percentile
from .workload import LAST_TOKEN, Timeline, engine_options, prepare_engine_model, time_generate

LONG_OUTPUT = 32  # tokens of the answer to a long prompt
_SETTLED = 8  # outputs of each running request before the first long prompt: all prefills are over


@dataclass(frozen=True)
class SharedPrefix:
    """Requests that are sent at once, and whose prompts share a prefix."""

    requests: int = 64
    prefix: int = 2048  # tokens that all prompts begin with
    input: int = 64  # further tokens of each prompt
    output: int = 16
    temperature: float = 0.6
    seed: int = 0

    def draw(self, vocabulary: int, again: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """Draw prompts and parameters; another ``again`` gives another prefix."""
        rng = random.Random(f"prefix {self.seed} {again}")
        prefix = _random_tokens(rng, vocabulary, self.prefix)
        prompts = [
            prefix + _random_tokens(rng, vocabulary, self.input) for _ in range(self.requests)
        ]
        return prompts, [_params(self.temperature, self.output)] * self.requests

    @property
    def key(self) -> dict[str, Any]:
        """The pairs of a results file's case."""
        return {
            "scenario": "prefix",
            "requests": self.requests,
            "prefix": self.prefix,
            "in": self.input,
            "out": self.output,
        }


@dataclass(frozen=True)
class LongPrompts:
    """Requests that decode while long prompts arrive, one every few seconds."""

    requests: int = 8  # with long prompts
    long: int = 8192  # tokens of each long prompt
    every: float = 2.0  # seconds between long prompts
    running: int = 32  # requests that decode
    input: int = 512  # prompt tokens of each request that decodes
    output: int = 4096  # their answer tokens at most: they are aborted after the last long prompt
    temperature: float = 0.6
    seed: int = 0

    def draw(self, vocabulary: int, again: int) -> tuple[list[list[int]], list[list[int]]]:
        """Draw the prompts of the running requests, and the long prompts."""
        rng = random.Random(f"long prompts {self.seed} {again}")
        short = [_random_tokens(rng, vocabulary, self.input) for _ in range(self.running)]
        long = [_random_tokens(rng, vocabulary, self.long) for _ in range(self.requests)]
        return short, long

    @property
    def key(self) -> dict[str, Any]:
        """The pairs of a results file's case."""
        return {
            "scenario": "long-prompts",
            "running": self.running,
            "in": self.input,
            "requests": self.requests,
            "long": self.long,
            "every": f"{self.every:g}",
        }


def measure_prefix(
    source: Source,
    scenario: SharedPrefix,
    *,
    repeats: int = 3,
    options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> BenchResult:
    """Measure the mean time to first token, with the prefix cache and without.

    The engine counts it, from ``generate`` queueing a request to its first token on the host. Both
    engines use the same model and prompts, one after the other. Each first answers prompts with
    another prefix, which do not count.

    Args:
        repeats: runs, each with a prefix of its own, which no cache knows.
        options: of :class:`llmfast.LLM`.

    Raises:
        UserError: the model cannot be run, its context is too short, or a request failed.
    """
    prompt = scenario.prefix + scenario.input
    result, model = prepare_engine_model(source, prompt, scenario.output, progress)
    vocabulary = ModelSizes.of(model).vocabulary
    for caching in (True, False):
        name = "on" if caching else "off"
        means = []
        given = {
            **engine_options(prompt + scenario.output, options),
            "enable_prefix_caching": caching,
        }
        with LLM(model, **given) as llm:
            for again in range(-1, repeats):
                progress(f"Prefix cache {name}", max(again, 0), repeats)
                _, outputs = time_generate(llm, *scenario.draw(vocabulary, again))
                times = [output.metrics.time_to_first_token or 0.0 for output in outputs]
                means.append(statistics.mean(times) * 1e3)
        key = {**scenario.key, "prefix_cache": name}
        result.add(OURS, key, "ttft_mean_ms", median_estimate(means[1:]), repeats)
    return result


def measure_long_prompts(
    source: Source,
    scenario: LongPrompts,
    *,
    budget: int,
    repeats: int = 1,
    options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> BenchResult:
    """Measure how long prompts delay running requests, with chunked prefill and prefill-first.

    Both engines use the same model and prompts, one after the other, through ``AsyncLLM``. Each
    first answers one long prompt, which does not count. :func:`summarize` defines the metrics.

    Args:
        budget: ``max_num_batched_tokens`` of the engine with chunked prefill.

    Other arguments and errors are those of :func:`measure_prefix`; UserError too if a running
    request ends before the last long prompt's answer.
    """
    sizes = max((scenario.input, scenario.output), (scenario.long, LONG_OUTPUT), key=sum)
    result, model = prepare_engine_model(source, *sizes, progress)
    vocabulary = ModelSizes.of(model).vocabulary
    for policy in ("chunked", "prefill-first"):
        key = {**scenario.key, "policy": policy}
        given = engine_options(sum(sizes), options)
        if policy == "chunked":
            key["budget"] = given["max_num_batched_tokens"] = budget
        else:
            given["enable_chunked_prefill"] = False
        llm = AsyncLLM(model, **given)
        try:
            samples = asyncio.run(_all_rounds(llm, scenario, vocabulary, repeats, policy, progress))
        finally:
            llm.close()
        for metric in samples[0]:
            figures = [sample[metric] for sample in samples]
            result.add(OURS, key, metric, median_estimate(figures), repeats)
    return result


async def _all_rounds(
    llm: AsyncLLM,
    scenario: LongPrompts,
    vocabulary: int,
    repeats: int,
    policy: str,
    progress: Progress,
) -> list[dict[str, float]]:
    progress(f"{policy}: warming up", 0, repeats)
    await _round(llm, replace(scenario, requests=1), vocabulary, -1)
    samples = []
    for again in range(repeats):
        progress(policy, again, repeats)
        samples.append(summarize(*await _round(llm, scenario, vocabulary, again)))
    return samples


async def _round(
    llm: AsyncLLM, scenario: LongPrompts, vocabulary: int, again: int
) -> tuple[list[Timeline], list[Timeline]]:
    """Return the timelines of the running requests and of the long prompts.

    The running requests are aborted when the last long prompt is answered.
    """
    short, long = scenario.draw(vocabulary, again)
    params = _params(scenario.temperature, scenario.output)
    running = [Timeline(time.perf_counter()) for _ in short]
    tasks = [
        asyncio.create_task(read_answer(llm, prompt, params, timeline))
        for prompt, timeline in zip(short, running, strict=True)
    ]
    try:
        while not all(len(timeline.received_at) >= _SETTLED for timeline in running):
            await asyncio.wait(tasks, timeout=0.005)
            _require_running(tasks, scenario)
        timelines = await _send_every(
            llm, long, _params(scenario.temperature, LONG_OUTPUT), scenario.every
        )
        _require_running(tasks, scenario)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return running, timelines


def _require_running(tasks: Sequence[asyncio.Task[None]], scenario: LongPrompts) -> None:
    for task in tasks:
        if task.done():
            task.result()  # raises the task's own error, if it has one
            raise UserError(
                f"an answer of {scenario.output} tokens ended before the last long prompt was "
                "answered; raise --output"
            )


async def _send_every(
    llm: AsyncLLM, prompts: Sequence[list[int]], params: SamplingParams, seconds: float
) -> list[Timeline]:
    started = time.perf_counter()

    async def read_at(prompt: list[int], at: float) -> Timeline:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        timeline = Timeline(time.perf_counter())
        await read_answer(llm, prompt, params, timeline)
        return timeline

    return await asyncio.gather(
        *(read_at(prompt, number * seconds) for number, prompt in enumerate(prompts))
    )


def summarize(running: Sequence[Timeline], long: Sequence[Timeline]) -> dict[str, float]:
    """Return the metrics of long prompts that arrive while other requests decode.

    - ``itl_p50_ms``, ``itl_p99_ms``: percentiles of the running requests' gaps between two
      outputs. A gap counts if it overlaps the time from a long prompt's sending to its first token.
    - ``ttft_p50_ms``: median time to first token of the long prompts.
    - ``out_tok_per_s``: tokens of all requests, from the first long prompt's sending to the last
      one's last token.
    """
    waits = [(line.sent_at, line.received_at[0]) for line in long]
    gaps = [
        after - before
        for line in running
        for before, after in pairwise(line.received_at)
        if any(before < end and start < after for start, end in waits)
    ]
    start = min(line.sent_at for line in long)
    end = max(line.received_at[-1] for line in long)
    tokens = sum(line.tokens_between(start, end) for line in (*running, *long))
    return {
        "itl_p50_ms": percentile(gaps, 0.5) * 1e3,
        "itl_p99_ms": percentile(gaps, 0.99) * 1e3,
        "ttft_p50_ms": percentile([line.time_to_first_token for line in long], 0.5) * 1e3,
        "out_tok_per_s": tokens / (end - start),
    }


def _params(temperature: float, tokens: int) -> SamplingParams:
    return SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=tokens)


def _random_tokens(rng: random.Random, vocabulary: int, count: int) -> list[int]:
    last = min(LAST_TOKEN, vocabulary - 1)
    return [rng.randint(0, last) for _ in range(count)]
