"""The files of measured figures: their schema, reading, checking and merging.

One file holds one suite on one GPU, `bench/results/<gpu>/<suite>.json`:

    {"schema": 1, "runs": [{"id": ..., "env": {...}, "rows": [{"case": ..., "impl": ..., ...}]}]}

A run holds the figures of one process, or of several processes combined. Ratios and shares of a
ceiling are taken only within one run. So each run has a row with its own copy bandwidth, of the
case `op=copy`, which stays with its run as long as the run has another row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from .suites import SUITES, UNITS

SCHEMA = 1
CEILING_CASE = "op=copy"  # allowed in every suite, with metric gb_per_s


@dataclass(frozen=True)
class Row:
    """One figure with its 95% interval, the median of ``repeats`` samples."""

    case: str
    impl: str
    metric: str
    unit: str
    value: float
    low: float
    high: float
    repeats: int

    @property
    def key(self) -> tuple[str, str, str]:
        """The key of the row: a newer row with the same key replaces it."""
        return self.case, self.impl, self.metric


@dataclass(frozen=True)
class Env:
    """The environment of a run. Facts that cannot be determined are "unknown" or "none"."""

    gpu: str
    driver: str
    torch: str
    triton: str
    transformers: str
    llmfast: str
    commit: str
    date: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Run:
    """Rows that were measured together."""

    id: str
    env: Env
    rows: tuple[Row, ...]


_KEY = re.compile(r"[a-z][a-z0-9_]*")
_VALUE = re.compile(r"[^\s=]+")
_IMPL = re.compile(r"[a-z0-9][a-z0-9._-]*")


def parse_case(case: str) -> dict[str, str]:
    """Parse `key=value key=value` into pairs, in this order.

    Raises:
        UserError: not pairs with single spaces between them, or a key given twice.
    """
    pairs: dict[str, str] = {}
    for part in case.split(" "):
        key, sign, value = part.partition("=")
        if not (sign and _KEY.fullmatch(key) and _VALUE.fullmatch(value)):
            raise UserError(
                f"case: wanted key=value pairs with single spaces between them, "
                f"keys in lower case; got {part!r} in {case!r}"
            )
        if key in pairs:
            raise UserError(f"case: key {key!r} is there twice in {case!r}")
        pairs[key] = value
    return pairs


def format_case(pairs: Mapping[str, object]) -> str:
    """Format pairs as a case, in their order: the inverse of :func:`parse_case`."""
    case = " ".join(f"{key}={value}" for key, value in pairs.items())
    parse_case(case)
    return case


def validate(data: object, *, suite: str, name: str = "results") -> None:
    """Check the contents of a results file against the schema and its suite's metrics.

    Raises:
        UserError: the first error, as "name: run, row: field wanted, got".
    """
    if suite not in SUITES:
        raise UserError(f"{name}: suite must be one of {', '.join(SUITES)}; got {suite!r}")
    data = _object(data, {"schema", "runs"}, name)
    if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
        raise UserError(f"{name}: schema must be {SCHEMA}, got {data['schema']!r}")
    if not isinstance(data["runs"], list):
        raise UserError(f"{name}: runs must be a list, got {type(data['runs']).__name__}")
    ids: set[str] = set()
    seen: set[tuple[str, str, str]] = set()
    for i, run in enumerate(data["runs"]):
        where = f"{name}: runs[{i}]"
        run = _object(run, {f.name for f in fields(Run)}, where)
        _text(run["id"], f"{where}.id")
        if run["id"] in ids:
            raise UserError(f"{where}.id: {run['id']!r} is there twice")
        ids.add(run["id"])
        where = f"{name}: run {run['id']}"
        _validate_env(run["env"], f"{where}: env")
        if not isinstance(run["rows"], list) or not run["rows"]:
            raise UserError(
                f"{where}: rows must be a list of at least one row, got {run['rows']!r}"
            )
        ceilings: set[tuple[str, str, str]] = set()
        for j, row in enumerate(run["rows"]):
            _validate_row(row, suite, f"{where}: rows[{j}]")
            key = (row["case"], row["impl"], row["metric"])
            # each run has its own ceiling, so only a second one in the same run is a duplicate
            known = ceilings if row["case"] == CEILING_CASE else seen
            if key in known:
                raise UserError(f"{where}: rows[{j}]: {' / '.join(key)} is there twice")
            known.add(key)


def _validate_env(env: object, where: str) -> None:
    names = {f.name for f in fields(Env)}
    env = _object(env, names, where)
    for field in sorted(names):
        _text(env[field], f"{where}.{field}")
    try:
        datetime.fromisoformat(env["date"])
    except ValueError:
        raise UserError(f"{where}.date must be an ISO 8601 date, got {env['date']!r}") from None


def _validate_row(row: object, suite: str, where: str) -> None:
    row = _object(row, {f.name for f in fields(Row)}, where)
    for field in ("case", "impl", "metric", "unit"):
        _text(row[field], f"{where}.{field}")
    try:
        parse_case(row["case"])
    except UserError as error:
        raise UserError(f"{where}.case: {error}") from None
    if not _IMPL.fullmatch(row["impl"]):
        raise UserError(
            f"{where}.impl must be lower-case letters, digits, '.', '_' and '-'; "
            f"got {row['impl']!r}"
        )
    metrics = ("gb_per_s",) if row["case"] == CEILING_CASE else SUITES[suite].metrics
    if row["metric"] not in metrics:
        raise UserError(
            f"{where}.metric must be one of {', '.join(metrics)} in suite {suite}; "
            f"got {row['metric']!r}"
        )
    if row["unit"] != UNITS[row["metric"]]:
        raise UserError(
            f"{where}.unit must be {UNITS[row['metric']]!r} for {row['metric']}, "
            f"got {row['unit']!r}"
        )
    for field in ("value", "low", "high"):
        number = row[field]
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise UserError(f"{where}.{field} must be a number, got {number!r}")
        if not math.isfinite(number):
            raise UserError(f"{where}.{field} must be finite, got {number!r}")
    if not row["low"] <= row["value"] <= row["high"]:
        raise UserError(
            f"{where}: wanted low <= value <= high, got {row['low']}, {row['value']}, {row['high']}"
        )
    repeats = row["repeats"]
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise UserError(f"{where}.repeats must be an integer of at least 1, got {repeats!r}")


def _object(value: object, wanted: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object, got {type(value).__name__}")
    for missing in sorted(wanted - value.keys()):
        raise UserError(f"{where} lacks the field {missing!r}")
    for extra in sorted(value.keys() - wanted):
        raise UserError(f"{where} has the unknown field {extra!r}; known: {sorted(wanted)}")
    return value


def _text(value: object, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} must be text that is not empty, got {value!r}")


def to_data(runs: tuple[Run, ...]) -> dict[str, Any]:
    """Return runs as the JSON data of a results file."""
    return {
        "schema": SCHEMA,
        "runs": [asdict(run) | {"rows": [*map(asdict, run.rows)]} for run in runs],
    }


def read(path: Path, *, suite: str | None = None) -> tuple[Run, ...]:
    """Read a results file and check it. The suite is the file's stem unless given.

    Raises:
        UserError: the file cannot be read, is not JSON or breaks the schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    validate(data, suite=suite or path.stem, name=str(path))
    return tuple(
        Run(run["id"], Env(**run["env"]), tuple(Row(**row) for row in run["rows"]))
        for run in data["runs"]
    )


def write(path: Path, runs: tuple[Run, ...], *, suite: str | None = None) -> None:
    """Check runs and write them to a temporary file first, so that the file is never partial."""
    data = to_data(runs)
    validate(data, suite=suite or path.stem, name=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def merge(path: Path, run: Run, *, suite: str | None = None) -> None:
    """Add a run to a results file, in place of the older rows with the same keys.

    An older run's ceiling stays while that run has any other row; without other rows the run is
    removed. If the file has a run of the same id, the rows are added to it. Its environment must be
    the same except for the date.

    Raises:
        UserError: the file or the run breaks the schema, or the environments differ.
    """
    suite = suite or path.stem
    older = read(path, suite=suite) if path.exists() else ()
    runs: list[Run] = []
    for old in older:
        if old.id == run.id:
            if _undated(old.env) != _undated(run.env):
                raise UserError(f"{path}: run {run.id} is there already, from another environment")
            taken = {row.key for row in run.rows}
            kept = tuple(row for row in old.rows if row.key not in taken)
            run = Run(run.id, old.env, kept + run.rows)
        else:
            runs.append(old)
    runs = [left for old in runs if (left := _without(old, run, suite)) is not None]
    write(path, (*runs, run), suite=suite)


def _undated(env: Env) -> dict[str, str]:
    return {key: value for key, value in asdict(env).items() if key != "date"}


def _without(old: Run, new: Run, suite: str) -> Run | None:
    taken = {row.key for row in new.rows}
    rows = tuple(row for row in old.rows if _is_ceiling(row, suite) or row.key not in taken)
    return Run(old.id, old.env, rows) if any(not _is_ceiling(r, suite) for r in rows) else None


def _is_ceiling(row: Row, suite: str) -> bool:
    return row.case == CEILING_CASE and suite != "ceilings"
