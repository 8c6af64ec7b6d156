"""``llmfast bench throughput`` and ``llmfast bench latency``: the engine offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from . import options
from .bench_common import Output
from .bench_engine import EngineBenchOptions, check_workload, run_engine_bench

if TYPE_CHECKING:
    from ..measure.figures import BenchResult, Progress
    from ..measure.shapes import Source


def throughput_command(
    shape: options.Shape = None,
    model: options.Model = None,
    requests: options.Requests = 256,
    input_tokens: options.InputRange = "100-1024",
    output_tokens: options.OutputRange = "100-1024",
    temperature: options.WorkloadTemperature = 0.6,
    seed: options.WorkloadSeed = 0,
    repeats: options.Repeats = 1,
    busy: Annotated[
        bool,
        typer.Option(
            "--busy",
            help="Then trace 200 steps: the share of time in which the GPU is busy, and the time "
            "of the GPU and of the host for a step.",
        ),
    ] = False,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    weights: options.RoundedWeights = None,
    json_path: options.Json = None,
    results: options.Results = None,
    commit: options.Commit = None,
) -> None:
    """Measure many requests at once: tokens a second.

    The default requests are those that nano-vllm's bench.py draws.
    """
    own = EngineBenchOptions(
        "throughput", shape, model, repeats, max_num_seqs, max_num_batched_tokens, weights,
        Output(json_path, results, commit),
    )  # fmt: skip
    workload = check_workload(requests, input_tokens, output_tokens, temperature, seed)

    def measure(source: Source, progress: Progress) -> BenchResult:
        from ..measure.offline import measure_throughput
        from ..measure.workload import Workload

        return measure_throughput(
            source,
            Workload(**workload),
            repeats=repeats,
            busy=busy,
            options=own.engine_options,
            progress=progress,
        )

    run_engine_bench(own, measure)


def latency_command(
    shape: options.Shape = None,
    model: options.Model = None,
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 8,
    input_tokens: Annotated[
        int, typer.Option("--input", metavar="N", help="Tokens of each prompt.")
    ] = 512,
    output_tokens: Annotated[
        int, typer.Option("--output", metavar="N", help="Tokens of each answer.")
    ] = 128,
    repeats: options.Repeats = 3,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    weights: options.RoundedWeights = None,
    json_path: options.Json = None,
    results: options.Results = None,
    commit: options.Commit = None,
) -> None:
    """Measure one batch: seconds until it is answered in full."""
    own = EngineBenchOptions(
        "latency", shape, model, repeats, max_num_seqs, max_num_batched_tokens, weights,
        Output(json_path, results, commit),
    )  # fmt: skip
    for name, value in (("batch", batch), ("input", input_tokens), ("output", output_tokens)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")

    def measure(source: Source, progress: Progress) -> BenchResult:
        from ..measure.offline import measure_latency
        from ..measure.workload import Batch

        return measure_latency(
            source,
            Batch(batch, input_tokens, output_tokens),
            repeats=repeats,
            options=own.engine_options,
            progress=progress,
        )

    run_engine_bench(own, measure)
