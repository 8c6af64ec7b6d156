"""Collect the figures of one process and keep its results files up to date."""

from __future__ import annotations

from pathlib import Path

from llmfast.errors import UserError
from llmfast.measure.environment import run_id
from llmfast.measure.figures import make_row
from llmfast.measure.results import CEILING_CASE, Env, Row, Run, merge, parse_case
from llmfast.measure.stats import Estimate
from llmfast.measure.suites import SUITES


class Recorder:
    """The rows of one process by suite, written as one run of each suite's file in ``folder``."""

    def __init__(self, folder: Path, env: Env) -> None:
        self.folder = folder
        self.env = env
        self.id = run_id(env)
        self._rows: dict[str, dict[tuple[str, str, str], Row]] = {}
        self._ceiling: Row | None = None

    def add(self, suite: str, row: Row) -> None:
        """Add a row to a suite, in place of an earlier one of the same case, impl and metric.

        Raises:
            UserError: an unknown suite, a metric that it does not have, a malformed case.
        """
        if suite not in SUITES:
            raise UserError(f"suite must be one of {', '.join(SUITES)}; got {suite!r}")
        if row.metric not in SUITES[suite].metrics:
            raise UserError(
                f"metric must be one of {', '.join(SUITES[suite].metrics)} in suite {suite}; "
                f"got {row.metric!r}"
            )
        parse_case(row.case)
        self._rows.setdefault(suite, {})[row.key] = row

    @property
    def has_ceiling(self) -> bool:
        """True once the copy bandwidth is set."""
        return self._ceiling is not None

    def set_ceiling(self, bandwidth: Estimate, repeats: int) -> None:
        """Set the copy bandwidth in GB/s, a row of every suite in this run."""
        self._ceiling = make_row(CEILING_CASE, "torch", "gb_per_s", bandwidth, repeats)

    def write(self) -> list[Path]:
        """Merge all rows so far into the files and return the files; may be called repeatedly."""
        suites = {suite: list(rows.values()) for suite, rows in self._rows.items()}
        if self._ceiling is not None:
            suites.setdefault("ceilings", [])
            for rows in suites.values():
                rows.append(self._ceiling)
        for suite, rows in suites.items():
            run = Run(self.id, self.env, tuple(rows))
            merge(self.folder / f"{suite}.json", run)
        return [self.folder / f"{suite}.json" for suite in suites]
