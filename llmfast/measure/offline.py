"""Offline benchmarks of ``LLM``: the throughput of many requests and the latency of one batch."""

from __future__ import annotations

from typing import Any

import torch

from ..engine.llm import LLM
from ..errors import UserError
from ..model.sizes import ModelSizes
from .figures import OURS, BenchResult, Progress, no_progress
from .gpu_busy import FoldedTokenizer, StepProfile, profile_steps
from .shapes import Source
from .stats import median_estimate
from .workload import (
    Batch,
    Workload,
    engine_options,
    label_weights,
    prepare_engine_model,
    time_generate,
    warm_up,
)


def measure_throughput(
    source: Source,
    workload: Workload,
    *,
    repeats: int = 1,
    busy: bool = False,
    options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> BenchResult:
    """Measure tokens per second, from the call of ``generate`` with all requests to its return.

    Args:
        repeats: runs, each with prompts of its own.
        busy: run the workload once more, and measure how busy the GPU is and what a step costs
            the host (:func:`.gpu_busy.profile_steps`).
        options: of :class:`llmfast.LLM`.

    Raises:
        UserError: the model cannot be run, its context is too short, or a request failed; busy
            without a GPU.
    """
    if busy and not torch.cuda.is_available():
        raise UserError("--busy needs a CUDA device: it reads the times of kernels")
    result, model = prepare_engine_model(source, workload.input[1], workload.output[1], progress)
    vocabulary = ModelSizes.of(model).vocabulary
    times, output_rates, total_rates = [], [], []
    with LLM(model, **engine_options(workload.longest, options)) as llm:
        label_weights(result, model, options)
        warm_up(llm)
        for again in range(repeats):
            progress("Answering", again, repeats)
            prompts, params = workload.draw(vocabulary, again)
            seconds, outputs = time_generate(llm, prompts, params)
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            times.append(seconds)
            output_rates.append(tokens / seconds)
            total_rates.append((tokens + sum(map(len, prompts))) / seconds)
    for metric, samples in (
        ("out_tok_per_s", output_rates),
        ("total_tok_per_s", total_rates),
        ("s", times),
    ):
        result.add(OURS, workload.key, metric, median_estimate(samples), repeats)
    if busy:
        progress("Tracing steps", 0, 0)
        with LLM(
            model, tokenizer=FoldedTokenizer(), **engine_options(workload.longest, options)
        ) as llm:
            warm_up(llm)
            profile = profile_steps(llm, *workload.draw(vocabulary, repeats))
            add_step_profile(result, workload.key, profile)
    return result


def add_step_profile(result: BenchResult, key: dict[str, Any], profile: StepProfile) -> None:
    """Append the rows of profiled steps: a median for the host, one trace for the GPU."""
    host = median_estimate([seconds * 1e3 for seconds in profile.host_seconds])
    result.add(OURS, key, "host_ms_per_step", host, len(profile.host_seconds))
    for metric, figure in (
        ("gpu_ms_per_step", profile.gpu_seconds * 1e3),
        ("gpu_busy_share", profile.busy_share),
    ):
        result.add(OURS, key, metric, median_estimate([figure]), 1)


def measure_latency(
    source: Source,
    batch: Batch,
    *,
    repeats: int = 3,
    options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> BenchResult:
    """Measure the seconds from the call of ``generate`` until a batch is answered in full.

    Arguments and errors are those of :func:`measure_throughput`.
    """
    workload = batch.workload
    result, model = prepare_engine_model(source, workload.input[1], workload.output[1], progress)
    times = []
    with LLM(model, **engine_options(workload.longest, options)) as llm:
        label_weights(result, model, options)
        warm_up(llm)
        for again in range(repeats):
            progress("Answering", again, repeats)
            times.append(
                time_generate(llm, *workload.draw(ModelSizes.of(model).vocabulary, again))[0]
            )
    result.add(OURS, batch.key, "s", median_estimate(times), repeats)
    return result
