"""``llmfast bench serve``: requests that arrive over time, and two scenarios of a policy each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .bench_serving import (
    Commit,
    Json,
    MaxSeqs,
    Model,
    Request,
    Results,
    Seed,
    Shape,
    Temperature,
    check_workload,
    run_bench,
)

if TYPE_CHECKING:
    from ..measure.decode import Measured, Progress
    from ..measure.shapes import Source

_DEFAULTS: dict[str, dict[str, Any]] = {  # of each scenario: the options that it has
    "rates": {
        "rates": "1,2,4,8",
        "requests": 128,
        "input": "100-1024",
        "output": "100-1024",
        "repeats": 1,
    },
    "prefix": {"requests": 64, "prefix": 2048, "input": "64", "output": "16", "repeats": 3},
    "long-prompts": {
        "requests": 8,
        "long": 8192,
        "every": 2.0,
        "running": 32,
        "input": "512",
        "output": "4096",
        "repeats": 1,
    },
}
_CHUNKED_BUDGET = 2048  # tokens of a step


def _default(name: str) -> str:
    found = {scenario: options[name] for scenario, options in _DEFAULTS.items() if name in options}
    return ", ".join(f"{scenario} {value}" for scenario, value in found.items())


def serve_command(
    shape: Shape = None,
    model: Model = None,
    scenario: Annotated[
        str,
        typer.Option(
            metavar="rates|prefix|long-prompts",
            help="Requests at random times at each of --rates; at once, with a common prefix, "
            "with the prefix cache and without; or long prompts beside running answers, in "
            "chunks and prefill-first.",
        ),
    ] = "rates",
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,...",
            help="Requests a second on average; inf: all at once.",
            show_default=_default("rates"),
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            help="How many requests at each rate, with the prefix, or with long prompts.",
            show_default=_default("requests"),
        ),
    ] = None,
    input_tokens: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="N|LOW-HIGH",
            help="Tokens of a prompt; after the prefix; of the running ones.",
            show_default=_default("input"),
        ),
    ] = None,
    output_tokens: Annotated[
        str | None,
        typer.Option(
            "--output",
            metavar="N|LOW-HIGH",
            help="Tokens of an answer; of the running ones at most.",
            show_default=_default("output"),
        ),
    ] = None,
    prefix: Annotated[
        int | None,
        typer.Option(help="Tokens of the common prefix.", show_default=_default("prefix")),
    ] = None,
    long: Annotated[
        int | None,
        typer.Option(help="Tokens of a long prompt.", show_default=_default("long")),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(help="Seconds between long prompts.", show_default=_default("every")),
    ] = None,
    running: Annotated[
        int | None,
        typer.Option(help="Requests that run when they arrive.", show_default=_default("running")),
    ] = None,
    temperature: Temperature = 0.6,
    seed: Seed = 0,
    repeats: Annotated[
        int | None,
        typer.Option(
            help="Runs, each with prompts of its own; the median counts.",
            show_default=_default("repeats"),
        ),
    ] = None,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            help="As of LLM; of long-prompts, with chunks.",
            show_default=f"4096, long-prompts {_CHUNKED_BUDGET}",
        ),
    ] = None,
    json_path: Json = None,
    results: Results = None,
    commit: Commit = None,
) -> None:
    """Measure requests that arrive over time, and what their readers wait.

    Arrivals are a Poisson process at each of the rates, through AsyncLLM. --scenario prefix and
    long-prompts measure the prefix cache and chunked prefill beside engines without.
    """
    own = _options(
        scenario,
        {
            "rates": rates,
            "requests": requests,
            "input": input_tokens,
            "output": output_tokens,
            "prefix": prefix,
            "long": long,
            "every": every,
            "running": running,
            "repeats": repeats,
        },
    )
    request = Request(
        "serve", shape, model, own.pop("repeats"), max_num_seqs, max_num_batched_tokens, json_path,
        results, commit,
    )  # fmt: skip
    workload = check_workload(own["requests"], own["input"], own["output"], temperature, seed)
    if scenario == "rates":
        sweep = _rates(own["rates"])
    else:
        own |= {"temperature": temperature, "seed": seed, **_single(workload)}

    def measure(source: Source, progress: Progress) -> Measured:
        from ..measure import scenarios, serving

        options = request.options
        if scenario == "rates":
            return serving.measure_serve(
                source,
                serving.Workload(**workload),
                sweep,
                repeats=request.repeats,
                options=options,
                progress=progress,
            )
        if scenario == "prefix":
            return scenarios.measure_prefix(
                source,
                scenarios.SharedPrefix(**own),
                repeats=request.repeats,
                options=options,
                progress=progress,
            )
        budget = options.pop("max_num_batched_tokens", _CHUNKED_BUDGET)
        return scenarios.measure_long_prompts(
            source,
            scenarios.LongPrompts(**own),
            budget=budget,
            repeats=request.repeats,
            options=options,
            progress=progress,
        )

    run_bench(request, measure)


def _options(scenario: str, given: dict[str, Any]) -> dict[str, Any]:
    """The scenario's options, with its defaults.

    Raises:
        UserError: no such scenario, an option that it does not have, or one outside its range.
    """
    if scenario not in _DEFAULTS:
        raise UserError(f"--scenario must be one of {', '.join(_DEFAULTS)}; got {scenario!r}")
    options = dict(_DEFAULTS[scenario])
    for name, value in given.items():
        if value is None:
            continue
        if name not in options:
            raise UserError(f"--{name} is not an option of --scenario {scenario}")
        options[name] = value
    for name in ("prefix", "long", "running"):
        if options.get(name, 1) < 1:
            raise UserError(f"--{name} must be at least 1, got {options[name]}")
    if not 0 <= options.get("every", 0) < math.inf:
        raise UserError(f"--every must be 0 or more seconds, got {options['every']}")
    return options


def _single(workload: dict[str, Any]) -> dict[str, int]:
    """Lengths of a scenario that has no ranges."""
    found = {}
    for name in ("input", "output"):
        low, high = workload[name]
        if low != high:
            raise UserError(f"--{name} must be one number in this scenario, got {low}-{high}")
        found[name] = high
    return found


def _rates(text: str) -> list[float]:
    rates: list[float] = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not rate > 0:  # nan too
            raise UserError(f"--rates must be numbers above 0 with commas between, got {text!r}")
        rates.append(rate)
    return list(dict.fromkeys(rates))
