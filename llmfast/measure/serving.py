"""Many requests at once: throughput, the latency of a batch, and requests that arrive over time."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..engine.async_llm import AsyncLLM
from ..engine.llm import LLM
from ..engine.request import RequestOutput
from ..engine.sampling_params import SamplingParams
from ..errors import UserError
from ..weights.model_weights import label_of, quantized_weights_of
from .busy import Observed, Text, observe
from .decode import OURS, Measured, Progress
from .record import make_row
from .results import CEILING_CASE
from .shapes import DTYPE_NAMES, Source
from .stats import median_estimate, percentile
from .timing import copy_bandwidth, copy_bytes

LAST_TOKEN = 10_000  # of random prompts, or the vocabulary's last
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Workload:
    """Requests with random prompts. With its defaults the 256 that nano-vllm's bench.py draws."""

    requests: int = 256
    input: tuple[int, int] = (100, 1024)  # tokens of a prompt, least and most
    output: tuple[int, int] = (100, 1024)  # tokens of an answer; end tokens do not end it
    temperature: float = 0.6
    seed: int = 0

    def draw(self, vocabulary: int, again: int = 0) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompts and parameters, by Python's own generator.

        Args:
            again: other numbers give other prompts, which the prefix cache does not know.
        """
        rng = random.Random(self.seed + again)
        last = min(LAST_TOKEN, vocabulary - 1)
        prompts = [
            [rng.randint(0, last) for _ in range(rng.randint(*self.input))]
            for _ in range(self.requests)
        ]
        params = [
            SamplingParams(
                temperature=self.temperature, ignore_eos=True, max_tokens=rng.randint(*self.output)
            )
            for _ in range(self.requests)
        ]
        return prompts, params

    @property
    def longest(self) -> int:
        return self.input[1] + self.output[1]

    @property
    def key(self) -> dict[str, Any]:
        """Its part of a case in a results file; usual values go without saying."""
        usual = Workload()
        key: dict[str, Any] = {
            "requests": self.requests,
            "in": _range(self.input),
            "out": _range(self.output),
        }
        if self.temperature != usual.temperature:
            key["temperature"] = self.temperature
        if self.seed != usual.seed:
            key["seed"] = self.seed
        return key


def _range(ends: tuple[int, int]) -> str:
    low, high = ends
    return str(low) if low == high else f"{low}-{high}"


@dataclass(frozen=True)
class Batch:
    """Requests of one length that arrive together."""

    batch: int = 8
    input: int = 512
    output: int = 128

    @property
    def workload(self) -> Workload:
        return Workload(self.batch, (self.input, self.input), (self.output, self.output))

    @property
    def key(self) -> dict[str, Any]:
        return {"batch": self.batch, "in": self.input, "out": self.output}


@dataclass
class Timeline:
    """When the tokens of one request came, in seconds of one clock."""

    sent: float
    came: list[float] = field(default_factory=list)  # each time that there were more
    counts: list[int] = field(default_factory=list)  # how many there were then

    def note(self, tokens: int) -> None:
        """There are ``tokens`` tokens now."""
        if tokens > self.tokens:
            self.came.append(time.perf_counter())
            self.counts.append(tokens)

    @property
    def tokens(self) -> int:
        return self.counts[-1] if self.counts else 0

    def tokens_between(self, start: float, end: float) -> int:
        """Tokens that came after ``start``, up to ``end``."""
        known = [count for at, count in zip(self.came, self.counts, strict=True) if at <= end]
        before = sum(at <= start for at in self.came)
        return max(known, default=0) - (self.counts[before - 1] if before else 0)

    @property
    def first(self) -> float:
        return self.came[0] - self.sent

    @property
    def whole(self) -> float:
        return self.came[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.came)]


# --------------------------------------------------------------------------- measurements


def measure_throughput(
    source: Source,
    workload: Workload,
    *,
    repeats: int = 1,
    busy: bool = False,
    options: dict[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Measured:
    """All requests at once: tokens a second from the call of ``generate`` to its return.

    Args:
        repeats: each draws prompts of its own.
        busy: then run the workload once more, to see how busy the GPU is and what a step costs
            the host (:func:`.busy.observe`).
        options: of :class:`llmfast.LLM`.

    Raises:
        UserError: the model cannot be run, its context is too short, or a request failed; busy
            without a GPU.
    """
    if busy and not torch.cuda.is_available():
        raise UserError("--busy needs a CUDA device: it reads the times of kernels")
    found, model = prepare(source, workload.input[1], workload.output[1], progress)
    vocabulary = vocabulary_of(model)
    walls, outs, totals = [], [], []
    with LLM(model, **options_for(workload.longest, options)) as llm:
        label_weights(found, model, options)
        warm_up(llm)
        for again in range(repeats):
            progress("Answering", again, repeats)
            prompts, params = workload.draw(vocabulary, again)
            wall, outputs = timed(llm, prompts, params)
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            walls.append(wall)
            outs.append(tokens / wall)
            totals.append((tokens + sum(map(len, prompts))) / wall)
    for metric, samples in (("out_tok_per_s", outs), ("total_tok_per_s", totals), ("s", walls)):
        found.add(OURS, workload.key, metric, median_estimate(samples), repeats)
    if busy:
        progress("Tracing steps", 0, 0)
        with LLM(model, tokenizer=Text(), **options_for(workload.longest, options)) as llm:
            warm_up(llm)
            add_observed(found, workload.key, observe(llm, *workload.draw(vocabulary, repeats)))
    return found


def add_observed(found: Measured, key: dict[str, Any], observed: Observed) -> None:
    """Add the figures of steps: of the host a median, of the GPU one trace."""
    host = median_estimate([seconds * 1e3 for seconds in observed.host])
    found.add(OURS, key, "host_ms_per_step", host, len(observed.host))
    for metric, figure in (
        ("gpu_ms_per_step", observed.gpu * 1e3),
        ("gpu_busy_share", observed.busy),
    ):
        found.add(OURS, key, metric, median_estimate([figure]), 1)


def measure_latency(
    source: Source,
    batch: Batch,
    *,
    repeats: int = 3,
    options: dict[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Measured:
    """Seconds from the call of ``generate`` until a batch is answered, each output in full.

    Arguments and errors are those of :func:`measure_throughput`.
    """
    workload = batch.workload
    found, model = prepare(source, workload.input[1], workload.output[1], progress)
    walls = []
    with LLM(model, **options_for(workload.longest, options)) as llm:
        label_weights(found, model, options)
        warm_up(llm)
        for again in range(repeats):
            progress("Answering", again, repeats)
            walls.append(timed(llm, *workload.draw(vocabulary_of(model), again))[0])
    found.add(OURS, batch.key, "s", median_estimate(walls), repeats)
    return found


def measure_serve(
    source: Source,
    workload: Workload,
    rates: Sequence[float],
    *,
    repeats: int = 1,
    options: dict[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Measured:
    """Requests that arrive as a Poisson process, at each of several rates, through ``AsyncLLM``.

    Times are those of a reader in the event loop: from sending a request to what it yields.

    Args:
        rates: requests a second on average; infinity sends all at once.

    Other arguments and errors are those of :func:`measure_throughput`.
    """
    found, model = prepare(source, workload.input[1], workload.output[1], progress)
    llm = AsyncLLM(model, **options_for(workload.longest, options))
    try:
        asyncio.run(_all_rates(found, llm, model, workload, rates, repeats, progress))
    finally:
        llm.close()
    return found


async def _all_rates(
    found: Measured,
    llm: AsyncLLM,
    model: Any,
    workload: Workload,
    rates: Sequence[float],
    repeats: int,
    progress: Progress,
) -> None:
    await send(llm, [[1, 2, 3]] * 2, [SamplingParams(max_tokens=4, ignore_eos=True)] * 2, math.inf)
    for number, rate in enumerate(rates):
        samples: dict[str, list[float]] = {}
        for again in range(number * repeats, (number + 1) * repeats):
            progress(f"{rate:g} requests/s", again, len(rates) * repeats)
            prompts, params = workload.draw(vocabulary_of(model), again)
            timelines = await send(llm, prompts, params, rate, seed=workload.seed + again)
            for metric, figure in summarize(timelines).items():
                samples.setdefault(metric, []).append(figure)
        for metric, figures in samples.items():
            key = {**workload.key, "rate": f"{rate:g}"}
            found.add(OURS, key, metric, median_estimate(figures), repeats)


async def send(
    llm: AsyncLLM,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    rate: float,
    *,
    seed: int = 0,
) -> list[Timeline]:
    """Send requests at random times, ``rate`` a second on average, and read all of them."""
    started = time.perf_counter()

    async def read_at(prompt: list[int], own: SamplingParams, at: float) -> Timeline:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        line = Timeline(time.perf_counter())
        await read(llm, prompt, own, line)
        return line

    times = arrivals(len(prompts), rate, seed)
    return await asyncio.gather(
        *(read_at(*request) for request in zip(prompts, params, times, strict=True))
    )


async def read(llm: AsyncLLM, prompt: list[int], params: SamplingParams, line: Timeline) -> None:
    """Send a request and note when its tokens come.

    Raises:
        UserError: it failed.
    """
    async for output in llm.generate(prompt, params):
        check_answered(output)
        line.note(len(output.outputs[0].token_ids))


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds at which a Poisson process of ``rate`` a second has its events, the first at 0."""
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(f"arrivals {seed}")
    return list(accumulate([0.0, *(rng.expovariate(rate) for _ in range(count - 1))]))


def summarize(timelines: Sequence[Timeline]) -> dict[str, float]:
    """The metrics of the suite ``serve``: percentiles over requests, of gaps over all gaps."""
    span = max(t.came[-1] for t in timelines) - min(t.sent for t in timelines)
    figures = {
        "req_per_s": len(timelines) / span,
        "out_tok_per_s": sum(t.tokens for t in timelines) / span,
    }
    for name, samples in (
        ("ttft", [t.first for t in timelines]),
        ("itl", [gap for t in timelines for gap in t.gaps]),
        ("e2e", [t.whole for t in timelines]),
    ):
        for share in PERCENTILES if samples else ():
            figures[f"{name}_p{share}_ms"] = percentile(samples, share / 100) * 1e3
    return figures


# ---------------------------------------------------------------------------------- parts


def prepare(source: Source, prompt: int, answer: int, progress: Progress) -> tuple[Measured, Any]:
    """The model, its copy bandwidth on a GPU, and a place for figures.

    Args:
        prompt, answer: tokens of the longest.

    Raises:
        UserError: they are longer than the model's context.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    progress(f"Preparing the model on {device}", 0, 0)
    found = Measured(source.case)
    if device.type == "cuda":
        copy = copy_bandwidth()
        found.bandwidth = copy.per_second(copy_bytes())
        row = make_row(CEILING_CASE, "torch", "gb_per_s", found.bandwidth, copy.rounds)
        found.rows.append(row)
    model = source.make(device)
    dtype = DTYPE_NAMES.get(model.dtype, str(model.dtype).removeprefix("torch."))
    found.model |= {"weights": dtype, "kv": dtype}
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and prompt + answer > context:
        raise UserError(
            f"a prompt of {prompt} tokens and an answer of {answer} are "
            f"longer than the model's context of {context} tokens"
        )
    return found, model


def options_for(longest: int, given: dict[str, Any] | None) -> dict[str, Any]:
    """Options of ``LLM`` for requests of ``longest`` tokens, prompt and answer."""
    return {"max_model_len": max(longest, 8), **(given or {})}  # 8: to warm up


def label_weights(found: Measured, model: Any, options: dict[str, Any] | None) -> None:
    """Name the weights that an engine was asked to round, in cases that are added from now on."""
    if (options or {}).get("weights"):
        found.model["weights"] = label_of(quantized_weights_of(model) or {})


def vocabulary_of(model: Any) -> int:
    """Tokens that the model knows."""
    size: int = model.get_input_embeddings().weight.shape[0]
    return size


def warm_up(llm: LLM) -> None:
    """A short call."""
    llm.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)


def timed(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> tuple[float, list[RequestOutput]]:
    """Seconds that ``generate`` takes, and its outputs.

    Raises:
        UserError: a request failed.
    """
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    wall = time.perf_counter() - started
    for output in outputs:
        check_answered(output)
    return wall, outputs


def check_answered(output: RequestOutput) -> None:
    """
    Raises:
        UserError: the request failed.
    """
    error = output.outputs[0].error
    if error is not None:
        raise UserError(f"a request failed: {error}")
