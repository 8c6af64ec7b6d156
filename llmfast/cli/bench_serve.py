"""``llmfast bench serve``: requests that arrive over time, and two scenarios."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import options
from .bench_common import Output
from .bench_engine import EngineBenchOptions, check_workload, run_engine_bench

if TYPE_CHECKING:
    from ..measure.figures import BenchResult, Progress
    from ..measure.shapes import Source

_DEFAULTS: dict[str, dict[str, Any]] = {  # options of each scenario
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
    """Describe the defaults of one option for the help: ``rates 128, prefix 64``."""
    found = {scenario: own[name] for scenario, own in _DEFAULTS.items() if name in own}
    return ", ".join(f"{scenario} {value}" for scenario, value in found.items())


Scenario = Annotated[
    str,
    typer.Option(
        metavar="rates|prefix|long-prompts",
        help="Requests at random times at each of --rates; at once, with a common prefix, "
        "with the prefix cache and without; or long prompts beside running answers, in "
        "chunks and prefill-first.",
    ),
]
Rates = Annotated[
    str | None,
    typer.Option(
        metavar="R,R,...",
        help="Requests a second on average; inf: all at once.",
        show_default=_default("rates"),
    ),
]
ScenarioRequests = Annotated[
    int | None,
    typer.Option(
        help="How many requests at each rate, with the prefix, or with long prompts.",
        show_default=_default("requests"),
    ),
]
ScenarioInput = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="N|LOW-HIGH",
        help="Tokens of a prompt; after the prefix; of the running ones.",
        show_default=_default("input"),
    ),
]
ScenarioOutput = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="N|LOW-HIGH",
        help="Tokens of an answer; of the running ones at most.",
        show_default=_default("output"),
    ),
]
Prefix = Annotated[
    int | None,
    typer.Option(help="Tokens of the common prefix.", show_default=_default("prefix")),
]
Long = Annotated[
    int | None,
    typer.Option(help="Tokens of a long prompt.", show_default=_default("long")),
]
Every = Annotated[
    float | None,
    typer.Option(help="Seconds between long prompts.", show_default=_default("every")),
]
Running = Annotated[
    int | None,
    typer.Option(help="Requests that run when they arrive.", show_default=_default("running")),
]
ScenarioRepeats = Annotated[
    int | None,
    typer.Option(
        help="Runs, each with prompts of its own; the median counts.",
        show_default=_default("repeats"),
    ),
]
StepBudget = Annotated[
    int | None,
    typer.Option(
        help="As for LLM; for long-prompts, of the engine with chunks.",
        show_default=f"4096, long-prompts {_CHUNKED_BUDGET}",
    ),
]


def serve_command(
    shape: options.Shape = None,
    model: options.Model = None,
    scenario: Scenario = "rates",
    rates: Rates = None,
    requests: ScenarioRequests = None,
    input_tokens: ScenarioInput = None,
    output_tokens: ScenarioOutput = None,
    prefix: Prefix = None,
    long: Long = None,
    every: Every = None,
    running: Running = None,
    temperature: options.WorkloadTemperature = 0.6,
    seed: options.WorkloadSeed = 0,
    repeats: ScenarioRepeats = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: StepBudget = None,
    json_path: options.Json = None,
    results: options.Results = None,
    commit: options.Commit = None,
) -> None:
    """Measure requests that arrive over time, and what their readers wait.

    Arrivals are a Poisson process at each of the rates, through AsyncLLM. --scenario prefix and
    long-prompts measure the prefix cache and chunked prefill beside engines without.
    """
    chosen = _scenario_options(
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
    own = EngineBenchOptions(
        "serve", shape, model, chosen.pop("repeats"), max_num_seqs, max_num_batched_tokens,
        output=Output(json_path, results, commit),
    )  # fmt: skip
    workload = check_workload(
        chosen["requests"], chosen["input"], chosen["output"], temperature, seed
    )
    if scenario == "rates":
        rates_per_s = _parse_rates(chosen["rates"])
    else:
        chosen |= {"temperature": temperature, "seed": seed, **_single_lengths(workload)}

    def measure(source: Source, progress: Progress) -> BenchResult:
        from ..measure import scenarios, serve
        from ..measure import workload as workloads

        engine = own.engine_options
        common: dict[str, Any] = {
            "repeats": own.repeats, "options": engine, "progress": progress
        }  # fmt: skip
        if scenario == "rates":
            load = workloads.Workload(**workload)
            return serve.measure_serve(source, load, rates_per_s, **common)
        if scenario == "prefix":
            return scenarios.measure_prefix(source, scenarios.SharedPrefix(**chosen), **common)
        budget = engine.pop("max_num_batched_tokens", _CHUNKED_BUDGET)
        return scenarios.measure_long_prompts(
            source, scenarios.LongPrompts(**chosen), budget=budget, **common
        )

    run_engine_bench(own, measure)


def _scenario_options(scenario: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the scenario's options: those that are given, and defaults.

    Raises:
        UserError: no such scenario, an option that it does not have, or one outside its range.
    """
    if scenario not in _DEFAULTS:
        raise UserError(f"--scenario must be one of {', '.join(_DEFAULTS)}; got {scenario!r}")
    chosen = dict(_DEFAULTS[scenario])
    for name, value in given.items():
        if value is None:
            continue
        if name not in chosen:
            raise UserError(f"--{name} is not an option of --scenario {scenario}")
        chosen[name] = value
    for name in ("prefix", "long", "running"):
        if chosen.get(name, 1) < 1:
            raise UserError(f"--{name} must be at least 1, got {chosen[name]}")
    if not 0 <= chosen.get("every", 0) < math.inf:
        raise UserError(f"--every must be 0 or more seconds, got {chosen['every']}")
    return chosen


def _single_lengths(workload: dict[str, Any]) -> dict[str, int]:
    """Return the lengths of a scenario that has no ranges.

    Raises:
        UserError: a range.
    """
    found = {}
    for name in ("input", "output"):
        low, high = workload[name]
        if low != high:
            raise UserError(f"--{name} must be one number in this scenario, got {low}-{high}")
        found[name] = high
    return found


def _parse_rates(text: str) -> list[float]:
    """Parse ``"1,2.5,inf"`` as rates above 0, each once.

    Raises:
        UserError: it is something else.
    """
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
