"""Two cases that a policy is for: prompts that begin alike, and long prompts beside answers."""

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
from .decode import OURS, Measured, Progress
from .serving import LAST_TOKEN, Timeline, options_for, prepare, read, timed, vocabulary_of
from .shapes import Source
from .stats import median_estimate, percentile

LONG_OUTPUT = 32  # tokens of the answer to a long prompt
_SETTLED = 8  # outputs of each running request before the first long prompt: none waits to begin


@dataclass(frozen=True)
class SharedPrefix:
    """Requests that are sent at once, whose prompts begin alike."""

    requests: int = 64
    prefix: int = 2048  # tokens that all prompts begin with
    input: int = 64  # of each prompt's own
    output: int = 16
    temperature: float = 0.6
    seed: int = 0

    def draw(self, vocabulary: int, again: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompts and parameters; other numbers ``again`` give another prefix."""
        rng = random.Random(f"prefix {self.seed} {again}")
        prefix = _random_tokens(rng, vocabulary, self.prefix)
        prompts = [
            prefix + _random_tokens(rng, vocabulary, self.input) for _ in range(self.requests)
        ]
        return prompts, [_params(self.temperature, self.output)] * self.requests

    @property
    def key(self) -> dict[str, Any]:
        """Its part of a case in a results file."""
        return {
            "scenario": "prefix",
            "requests": self.requests,
            "prefix": self.prefix,
            "in": self.input,
            "out": self.output,
        }


@dataclass(frozen=True)
class LongPrompts:
    """Requests that are being answered while long prompts arrive, one every few seconds."""

    requests: int = 8  # with long prompts
    long: int = 8192  # tokens of each of these
    every: float = 2.0  # seconds
    running: int = 32  # requests that are being answered
    input: int = 512  # tokens of each of their prompts
    output: int = 4096  # tokens of their answers at most: they end with the last long prompt's
    temperature: float = 0.6
    seed: int = 0

    def draw(self, vocabulary: int, again: int) -> tuple[list[list[int]], list[list[int]]]:
        """The running requests' prompts, and the long ones."""
        rng = random.Random(f"long prompts {self.seed} {again}")
        short = [_random_tokens(rng, vocabulary, self.input) for _ in range(self.running)]
        long = [_random_tokens(rng, vocabulary, self.long) for _ in range(self.requests)]
        return short, long

    @property
    def key(self) -> dict[str, Any]:
        """Its part of a case in a results file."""
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
    progress: Progress = lambda what, done, total: None,
) -> Measured:
    """The mean time to first token, with the prefix cache and without.

    It is counted in the engine, from ``generate`` queueing the request to its token on the host.
    One engine after another over the same model and the same prompts; each answers prompts of
    another prefix first, which is not counted.

    Args:
        repeats: each with a prefix of its own, which no cache knows.
        options: of :class:`llmfast.LLM`.

    Raises:
        UserError: the model cannot be run, its context is too short, or a request failed.
    """
    prompt = scenario.prefix + scenario.input
    found, model = prepare(source, prompt, scenario.output, progress)
    for caching in (True, False):
        name = "on" if caching else "off"
        means = []
        given = {**options_for(prompt + scenario.output, options), "enable_prefix_caching": caching}
        with LLM(model, **given) as llm:
            for again in range(-1, repeats):
                progress(f"Prefix cache {name}", max(again, 0), repeats)
                _, outputs = timed(llm, *scenario.draw(vocabulary_of(model), again))
                times = [output.metrics.time_to_first_token or 0.0 for output in outputs]
                means.append(statistics.mean(times) * 1e3)
        key = {**scenario.key, "prefix_cache": name}
        found.add(OURS, key, "ttft_mean_ms", median_estimate(means[1:]), repeats)
    return found


def measure_long_prompts(
    source: Source,
    scenario: LongPrompts,
    *,
    budget: int,
    repeats: int = 1,
    options: dict[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Measured:
    """What those that are being answered wait for long prompts, in chunks and prefill-first.

    One engine after another over the same model and the same prompts, through ``AsyncLLM``; a
    long prompt is answered first, which is not counted. :func:`summarize` says what the metrics
    are.

    Args:
        budget: ``max_num_batched_tokens`` of the engine with chunks.

    Other arguments and errors are those of :func:`measure_prefix`; UserError too if an answer
    that should be running ends before the last long prompt's.
    """
    sizes = max((scenario.input, scenario.output), (scenario.long, LONG_OUTPUT), key=sum)
    found, model = prepare(source, *sizes, progress)
    for policy in ("chunked", "prefill-first"):
        key = {**scenario.key, "policy": policy}
        given = options_for(sum(sizes), options)
        if policy == "chunked":
            key["budget"] = given["max_num_batched_tokens"] = budget
        else:
            given["enable_chunked_prefill"] = False
        llm = AsyncLLM(model, **given)
        try:
            samples = asyncio.run(
                _all_rounds(llm, scenario, vocabulary_of(model), repeats, policy, progress)
            )
        finally:
            llm.close()
        for metric in samples[0]:
            figures = [sample[metric] for sample in samples]
            found.add(OURS, key, metric, median_estimate(figures), repeats)
    return found


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
    """The running requests' timelines, up to the end of the last long one, and the long ones'."""
    short, long = scenario.draw(vocabulary, again)
    params = _params(scenario.temperature, scenario.output)
    running = [Timeline(time.perf_counter()) for _ in short]
    tasks = [
        asyncio.create_task(read(llm, prompt, params, line))
        for prompt, line in zip(short, running, strict=True)
    ]
    try:
        while not all(len(line.came) >= _SETTLED for line in running):
            await asyncio.wait(tasks, timeout=0.005)
            _require_running(tasks, scenario)
        lines = await _send_every(
            llm, long, _params(scenario.temperature, LONG_OUTPUT), scenario.every
        )
        _require_running(tasks, scenario)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return running, lines


def _require_running(tasks: Sequence[asyncio.Task[None]], scenario: LongPrompts) -> None:
    for task in tasks:
        if task.done():
            task.result()  # raises what it raised
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
        line = Timeline(time.perf_counter())
        await read(llm, prompt, params, line)
        return line

    return await asyncio.gather(
        *(read_at(prompt, number * seconds) for number, prompt in enumerate(prompts))
    )


def summarize(running: Sequence[Timeline], long: Sequence[Timeline]) -> dict[str, float]:
    """The metrics of long prompts that arrive while requests are being answered.

    ``itl_p50_ms`` and ``itl_p99_ms`` are of the running requests' gaps between two outputs, of
    those gaps that overlap the time from a long prompt's sending to its first token.
    ``ttft_p50_ms`` is of the long prompts. ``out_tok_per_s`` counts the tokens of all requests
    from the first long prompt's sending to the last one's last token.
    """
    waits = [(line.sent, line.came[0]) for line in long]
    gaps = [
        after - before
        for line in running
        for before, after in pairwise(line.came)
        if any(before < end and start < after for start, end in waits)
    ]
    start, end = min(line.sent for line in long), max(line.came[-1] for line in long)
    tokens = sum(line.tokens_between(start, end) for line in (*running, *long))
    return {
        "itl_p50_ms": percentile(gaps, 0.5) * 1e3,
        "itl_p99_ms": percentile(gaps, 0.99) * 1e3,
        "ttft_p50_ms": percentile([line.first for line in long], 0.5) * 1e3,
        "out_tok_per_s": tokens / (end - start),
    }


def _params(temperature: float, tokens: int) -> SamplingParams:
    return SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=tokens)


def _random_tokens(rng: random.Random, vocabulary: int, count: int) -> list[int]:
    last = min(LAST_TOKEN, vocabulary - 1)
    return [rng.randint(0, last) for _ in range(count)]
