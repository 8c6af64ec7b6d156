"""Combine the results of several processes into one run of medians.

Each folder holds the results of one process (`pytest bench --results DIR`). A combined figure is
the median over the processes, its interval spans the processes' own, its repeats are the processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from llmfast.errors import UserError
from llmfast.measure.results import Row, Run, merge, read


def combine_runs(
    runs: Sequence[Run], *, name: str = "combine", across_commits: bool = False
) -> Run:
    """Make one run of several processes' runs.

    Args:
        name: of the suite, for messages.
        across_commits: allow different commits, if they change nothing that is measured; the
            combined run then names them all.

    Raises:
        UserError: no run, environments that differ in more than the date, or a row that a process
            lacks.
    """
    if not runs:
        raise UserError(f"{name}: wanted at least one run, got none")
    first, last = runs[0], max(runs, key=lambda run: run.env.date)
    for run in runs[1:]:
        for field, value in asdict(run.env).items():
            if field == "date" or (field == "commit" and across_commits):
                continue
            if value != getattr(first.env, field):
                raise UserError(
                    f"{name}: runs {first.id} and {run.id} differ in {field}: "
                    f"{getattr(first.env, field)!r} and {value!r}; measure them alike"
                )
    by_key = [{row.key: row for row in run.rows} for run in runs]
    every = dict.fromkeys(key for rows in by_key for key in rows)
    for run, known in zip(runs, by_key, strict=True):
        for key in every:
            if key not in known:
                raise UserError(f"{name}: run {run.id} lacks {' / '.join(key)}; measure it again")
    rows = tuple(_median([known[key] for known in by_key]) for key in every)
    commits = "+".join(dict.fromkeys(run.env.commit for run in runs))
    env = replace(first.env, date=last.env.date, commit=commits)
    return Run(f"{last.id}-x{len(runs)}", env, rows)


def _median(rows: list[Row]) -> Row:
    return replace(
        rows[0],
        value=statistics.median(row.value for row in rows),
        low=min(row.low for row in rows),
        high=max(row.high for row in rows),
        repeats=len(rows),
    )


def combine_folders(
    folders: Sequence[Path], into: Path, *, across_commits: bool = False
) -> list[Path]:
    """Combine every suite that the folders hold and merge it into ``into``: all suites or none.

    Raises:
        UserError: a folder that does not exist or holds no results, a suite missing from one of
            them, a file with more than one run, or what :func:`combine_runs` refuses.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"combine: {folder} is not a folder")
    suites = sorted({path.stem for folder in folders for path in folder.glob("*.json")})
    if not suites:
        raise UserError(f"combine: no results (*.json) in {', '.join(map(str, folders))}")
    combined: list[tuple[Path, Run]] = []
    for suite in suites:
        runs = [_only_run(folder / f"{suite}.json") for folder in folders]
        combined.append(
            (into / f"{suite}.json", combine_runs(runs, name=suite, across_commits=across_commits))
        )
    for path, run in combined:
        merge(path, run)
    return [path for path, _ in combined]


def _only_run(path: Path) -> Run:
    runs = read(path)
    if len(runs) != 1:
        raise UserError(
            f"{path}: wanted the run of one process, got {len(runs)} runs; give each process "
            f"an empty folder of its own"
        )
    return runs[0]
