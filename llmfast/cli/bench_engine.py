"""Options and output that the benchmarks of the engine share: throughput, latency and serve."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .bench_common import Output, check_weights, parse_range, run_bench

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..measure.figures import BenchResult
    from ..measure.results import Env
    from .bench_common import Measure

_TITLES = {  # of a metric in the table
    "s": "time",
    "out_tok_per_s": "output",
    "total_tok_per_s": "prompts and output",
    "req_per_s": "requests",
    "gpu_busy_share": "GPU busy",
}


@dataclass(frozen=True)
class EngineBenchOptions:
    """The options that the three commands share. None: not given."""

    suite: str
    shape: str | None
    model: str | None
    repeats: int
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    weights: str | None = None
    output: Output = field(default_factory=Output)

    @property
    def engine_options(self) -> dict[str, Any]:
        """The given options of the engine, by name."""
        given: dict[str, Any] = dict(self._counts)
        if self.weights is not None:
            from ..measure.prepare import weight_options

            given |= weight_options(self.weights)
        return given

    @property
    def _counts(self) -> dict[str, int]:
        given = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}

    def check(self) -> None:
        """Refuse options that cannot be measured, before anything is imported or loaded.

        Raises:
            UserError: an option outside its range.
        """
        for name, value in (("repeats", self.repeats), *self._counts.items()):
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        check_weights(self.weights)
        self.output.check()


def check_workload(
    requests: int, input_tokens: str, output_tokens: str, temperature: float, seed: int
) -> dict[str, Any]:
    """Return the arguments of ``Workload``.

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


def run_engine_bench(options: EngineBenchOptions, measure: Measure) -> None:
    """Measure, show the figures, and write those that are asked for.

    Raises:
        UserError: an option outside its range, or an error of ``measure``.
    """
    options.check()
    from ..measure.shapes import Source

    source = Source(options.shape, options.model)
    run_bench(options.suite, source, options.output, measure, _show)


def _show(console: Console, result: BenchResult, env: Env) -> None:
    title, table = _table(result, env)
    console.print(title, highlight=False, markup=False)
    console.print(table)


def _table(result: BenchResult, env: Env) -> tuple[str, Table]:
    """Return a title that says what was run, and a table: a line per metric, a column per case."""
    from rich.table import Table

    from ..measure.results import CEILING_CASE, parse_case

    name, weights, _ = result.model.values()
    rows = [row for row in result.rows if row.case != CEILING_CASE]
    cases = list(dict.fromkeys(row.case for row in rows))
    keys = [{k: v for k, v in parse_case(c).items() if k not in result.model} for c in cases]
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
