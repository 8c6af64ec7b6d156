"""``llmfast bench throughput`` and ``latency``; what these have in common with ``serve``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import ui
from .bench_decode import check_json, check_weights, quiet_transformers, write_figures

if TYPE_CHECKING:
    from rich.table import Table

    from ..measure.decode import Measured, Progress
    from ..measure.results import Env
    from ..measure.shapes import Source

Shape = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Random weights in the shape of llama-3.1-8b, qwen3-8b, qwen3-0.6b, mistral-7b or "
        "smollm2-135m.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="DIR-OR-HUB-ID",
        help="A folder, a GGUF file or a model of the Hugging Face Hub.",
        show_default="the embedded model",
    ),
]
Requests = Annotated[int, typer.Option(help="How many requests.")]
Input = Annotated[
    str, typer.Option("--input", metavar="N|LOW-HIGH", help="Tokens of a prompt, uniform.")
]
Output = Annotated[
    str, typer.Option("--output", metavar="N|LOW-HIGH", help="Tokens of an answer, uniform.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")]
Repeats = Annotated[
    int, typer.Option(help="Runs, each with prompts of its own; the median counts.")
]
MaxSeqs = Annotated[int | None, typer.Option(help="As of LLM.", show_default="256")]
MaxTokens = Annotated[int | None, typer.Option(help="As of LLM.", show_default="4096")]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="int4-gN|int8",
        help="Round the decoder's linear layers first, as for bench decode.",
    ),
]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="Merge the figures into a results file."),
]
Results = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The same, into DIR/<suite>.json.")
]
Commit = Annotated[
    str | None,
    typer.Option(help="Commit of the sources, where the checkout has no history to ask."),
]

_TITLES = {  # of a metric in the table
    "s": "time",
    "out_tok_per_s": "output",
    "total_tok_per_s": "prompts and output",
    "req_per_s": "requests",
    "gpu_busy_share": "GPU busy",
}


@dataclass(frozen=True)
class Request:
    """What the three commands have in common. None: not given."""

    suite: str
    shape: str | None
    model: str | None
    repeats: int
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    json_path: str | None
    results: Path | None
    commit: str | None
    weights: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Of the engine."""
        given: dict[str, Any] = dict(self._counts)
        if self.weights is not None:
            rounded, _, group = self.weights.partition("-g")
            given |= {"weights": rounded, "group_size": int(group) if group else "auto"}
        return given

    @property
    def _counts(self) -> dict[str, int]:
        given = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}

    def check(self) -> None:
        """
        Raises:
            UserError: an option outside its range.
        """
        for name, value in (("repeats", self.repeats), *self._counts.items()):
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        check_weights(self.weights)
        check_json(self.json_path)


def throughput_command(
    shape: Shape = None,
    model: Model = None,
    requests: Requests = 256,
    input_tokens: Input = "100-1024",
    output_tokens: Output = "100-1024",
    temperature: Temperature = 0.6,
    seed: Seed = 0,
    repeats: Repeats = 1,
    busy: Annotated[
        bool,
        typer.Option(
            "--busy",
            help="Then trace 200 steps: the share of time in which the GPU is busy, and the time "
            "of the GPU and of the host for a step.",
        ),
    ] = False,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    weights: Weights = None,
    json_path: Json = None,
    results: Results = None,
    commit: Commit = None,
) -> None:
    """Measure many requests at once: tokens a second.

    The default requests are those that nano-vllm's bench.py draws.
    """
    request = Request(
        "throughput", shape, model, repeats, max_num_seqs, max_num_batched_tokens, json_path,
        results, commit, weights,
    )  # fmt: skip
    workload = check_workload(requests, input_tokens, output_tokens, temperature, seed)

    def measure(source: Source, progress: Progress) -> Measured:
        from ..measure.serving import Workload, measure_throughput

        return measure_throughput(
            source,
            Workload(**workload),
            repeats=repeats,
            busy=busy,
            options=request.options,
            progress=progress,
        )

    run_bench(request, measure)


def latency_command(
    shape: Shape = None,
    model: Model = None,
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 8,
    input_tokens: Annotated[
        int, typer.Option("--input", metavar="N", help="Tokens of each prompt.")
    ] = 512,
    output_tokens: Annotated[
        int, typer.Option("--output", metavar="N", help="Tokens of each answer.")
    ] = 128,
    repeats: Repeats = 3,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    weights: Weights = None,
    json_path: Json = None,
    results: Results = None,
    commit: Commit = None,
) -> None:
    """Measure one batch: seconds until it is answered in full."""
    request = Request(
        "latency", shape, model, repeats, max_num_seqs, max_num_batched_tokens, json_path,
        results, commit, weights,
    )  # fmt: skip
    for name, value in (("batch", batch), ("input", input_tokens), ("output", output_tokens)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")

    def measure(source: Source, progress: Progress) -> Measured:
        from ..measure.serving import Batch, measure_latency

        return measure_latency(
            source,
            Batch(batch, input_tokens, output_tokens),
            repeats=repeats,
            options=request.options,
            progress=progress,
        )

    run_bench(request, measure)


def check_workload(
    requests: int, input_tokens: str, output_tokens: str, temperature: float, seed: int
) -> dict[str, Any]:
    """The arguments of ``Workload``.

    Raises:
        UserError: an option outside its range.
    """
    if requests < 1:
        raise UserError(f"--requests must be at least 1, got {requests}")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature must be 0 (greedy) or more, got {temperature}")
    return {
        "requests": requests,
        "input": parse_range("--input", input_tokens),
        "output": parse_range("--output", output_tokens),
        "temperature": temperature,
        "seed": seed,
    }


def parse_range(option: str, text: str) -> tuple[int, int]:
    """``N`` or ``LOW-HIGH``.

    Raises:
        UserError: it is something else.
    """
    parts = text.split("-")
    if len(parts) <= 2 and all(part.isdecimal() for part in parts):
        low, high = int(parts[0]), int(parts[-1])
        if 1 <= low <= high:
            return low, high
    raise UserError(f"{option} must be a number or LOW-HIGH, of at least 1, got {text!r}")


def run_bench(request: Request, measure: Callable[[Source, Progress], Measured]) -> None:
    """Measure, show the figures, and write those that are asked for.

    Raises:
        UserError: an option outside its range, or what ``measure`` raises.
    """
    request.check()
    from ..measure.shapes import Source

    source = Source(request.shape, request.model)
    source.check()
    with ui.progress("Importing") as step, quiet_transformers():
        import torch

        from ..measure.environment import capture_env

        found = measure(source, step)
        env = capture_env(commit=request.commit)
    if not torch.cuda.is_available():
        ui.note(
            "there is no GPU here: these are figures of PyTorch's CPU operations, and say nothing "
            "about llmfast's speed"
        )
    from rich.console import Console

    console = Console(stderr=request.json_path == "-")
    title, table = _table(found, env)
    console.print(title, highlight=False, markup=False)
    console.print(table)
    write_figures(found, env, request.suite, request.json_path, request.results)


def _table(found: Measured, env: Env) -> tuple[str, Table]:
    """What was run, and a line for each metric with a column for each case."""
    from rich.table import Table

    from ..measure.results import CEILING_CASE, parse_case

    name, weights, _ = found.model.values()
    rows = [row for row in found.rows if row.case != CEILING_CASE]
    cases = list(dict.fromkeys(row.case for row in rows))
    keys = [{k: v for k, v in parse_case(c).items() if k not in found.model} for c in cases]
    common = {k: v for k, v in keys[0].items() if all(key.get(k) == v for key in keys)}
    what = ", ".join(f"{k} {v}" for k, v in common.items())
    where = "the CPU" if env.gpu == "none" else env.gpu
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for key in keys:
        own = [f"{k} {v}" for k, v in key.items() if k not in common]
        table.add_column(", ".join(own), justify="right", no_wrap=True)
    figures = {(row.metric, row.case): row for row in rows}
    for metric in dict.fromkeys(row.metric for row in rows):
        cells = [figures.get((metric, case)) for case in cases]
        unit = next(row.unit for row in cells if row is not None)
        title = _TITLES.get(metric, metric.removesuffix("_ms").replace("_", " "))
        table.add_row(
            f"{title}, {unit}",
            *("" if row is None else f"{row.value:,.2f}" for row in cells),
        )
    return f"{name}, {weights}, on {where}: {what}", table
