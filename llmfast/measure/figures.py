"""The result of one benchmark: its rows, and the types that all benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .results import Row, format_case
from .stats import Estimate
from .suites import UNITS

OURS, PEER = "llmfast", "transformers"  # names of implementations in a results file

Progress = Callable[[str, int, int], None]  # the current step, steps done, steps in total


def no_progress(what: str, done: int, total: int) -> None:
    """Report no progress."""


def make_row(case: str, impl: str, metric: str, estimate: Estimate, repeats: int) -> Row:
    """Make a row with the metric's unit."""
    unit = UNITS[metric]
    return Row(case, impl, metric, unit, estimate.value, estimate.low, estimate.high, repeats)


@dataclass
class BenchResult:
    """The figures of one benchmark of one model."""

    model: dict[str, str]  # the pairs of a case that name the model, its weights and its cache
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # cases that could not be measured, and why
    bandwidth: Estimate | None = None  # of a device-to-device copy, in GB/s
    packed: str | None = None  # label of the quantized weights, if only llmfast ran with them

    def case(self, impl: str, key: dict[str, Any]) -> str:
        """Return the case of a row: the model's pairs, then those of ``key``."""
        packed = {} if self.packed is None or impl != OURS else {"weights": self.packed}
        return format_case(self.model | packed | key)

    def add(
        self, impl: str, key: dict[str, Any], metric: str, figure: Estimate, repeats: int
    ) -> None:
        """Append one row."""
        self.rows.append(make_row(self.case(impl, key), impl, metric, figure, repeats))
