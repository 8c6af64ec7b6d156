"""Render docs/benchmarks.md from the results files: the same files give the same page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmfast.measure.figures import OURS
from llmfast.measure.results import CEILING_CASE, Row, Run, read
from llmfast.measure.suites import SUITES, UNITS

_TIMES = {"us", "ms", "s"}  # units in which less is better
_RATES = {"GB/s", "TFLOP/s", "tok/s", "req/s"}

HEAD = """\
# Measured figures

Made by `make bench-docs` from the files in `bench/results`; do not edit. How the figures are made \
and how to read them: [measuring.md](measuring.md).

A cell is `value [low, high]`: the median and its 95% interval. "time, llmfast / x" is our time \
over the peer's in the same run; below 1, llmfast is faster. "of copy" is the share of the copy \
bandwidth that the same run measured.
"""


def render(folder: Path) -> str:
    """Render the page from the files of ``folder`` and of the GPU folders in it.

    Raises:
        UserError: a file that breaks the schema.
    """
    parts = [HEAD]
    for gpu in ("", *sorted(path.name for path in folder.iterdir() if path.is_dir())):
        paths = {path.stem: path for path in (folder / gpu).glob("*.json")}
        for unknown in sorted(paths.keys() - SUITES.keys()):
            read(paths[unknown])  # raises, naming the suites there are
        known = [suite for suite in SUITES if suite in paths]
        if known:
            parts.append(f"## {gpu.upper() or 'On any machine'}\n")
        parts += [_suite(suite, read(paths[suite])) for suite in known]
    if len(parts) == 1:
        parts.append("No figures yet.\n")
    return "\n".join(parts)


def _suite(suite: str, runs: Iterable[Run]) -> str:
    spec = SUITES[suite]
    parts = [f"### {suite}: {spec.about}\n"]
    if spec.command:
        parts.append(f"`{spec.command}`\n")
    for run in runs:
        env = run.env
        parts.append(
            f"{env.gpu}, driver {env.driver}, torch {env.torch}, Triton {env.triton}, "
            f"transformers {env.transformers}, llmfast {env.llmfast} at {env.commit}, "
            f"{env.date}; {_repeats(run)}\n"
        )
        copy = _copy(run)
        if copy and suite != "ceilings":
            parts.append(f"Copy bandwidth in this run: {_cell(copy)} GB/s.\n")
        parts += [
            _table(run, metric, spec.metrics, copy if suite != "ceilings" else None)
            for metric in spec.metrics
            if any(row.metric == metric for row in _rows(run, suite))
        ]
    return "\n".join(parts)


def _rows(run: Run, suite: str) -> list[Row]:
    return [row for row in run.rows if row.case != CEILING_CASE or suite == "ceilings"]


def _copy(run: Run) -> Row | None:
    found = [row for row in run.rows if row.case == CEILING_CASE and row.metric == "gb_per_s"]
    return found[0] if found else None


def _repeats(run: Run) -> str:
    processes = run.id.rpartition("-x")[2]
    return f"median of {processes} processes" if processes.isdigit() else "one process"


def _table(run: Run, metric: str, metrics: tuple[str, ...], copy: Row | None) -> str:
    """Return one metric of one run: a line per case, a column per implementation, then ratios."""
    rows = {
        (row.case, row.impl): row
        for row in run.rows
        if row.metric == metric and (copy is None or row.case != CEILING_CASE)
    }
    cases = list(dict.fromkeys(case for case, _ in rows))
    impls = sorted({impl for _, impl in rows}, key=lambda impl: (impl != OURS, impl))
    peers = [impl for impl in impls if impl != OURS] if OURS in impls else []
    unit = UNITS[metric]
    share = metric == "gb_per_s" and copy is not None
    # GB/s of a case follow from its time, so the ratios of "us" say it all
    ratio = unit in _TIMES | _RATES and not (metric == "gb_per_s" and "us" in metrics)

    head = ["case", *impls]
    head += [f"{impl}, of copy" for impl in impls] if share else []
    head += [f"time, {OURS} / {peer}" for peer in peers] if ratio else []
    lines = [f"{metric}{'' if unit == '1' else f' ({unit})'}\n", _line(head)]
    lines.append(_line(["---", *["---:"] * (len(head) - 1)]))
    for case in cases:
        here = {impl: rows.get((case, impl)) for impl in impls}
        cells = [f"`{case}`", *(_cell(row) if row else "" for row in here.values())]
        if share and copy is not None:
            cells += [_share(row, copy) for row in here.values()]
        if ratio:
            cells += [_ratio(here[OURS], here[peer], unit) for peer in peers]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(row: Row) -> str:
    if row.low == row.high:
        return _number(row.value)
    return f"{_number(row.value)} [{_number(row.low)}, {_number(row.high)}]"


def _share(row: Row | None, copy: Row) -> str:
    return f"{row.value / copy.value:.1%}" if row else ""


def _ratio(ours: Row | None, peer: Row | None, unit: str) -> str:
    if ours is None or peer is None or 0 in (ours.value, peer.value):
        return ""
    ratio = ours.value / peer.value
    return f"{ratio if unit in _TIMES else 1 / ratio:.2f}"


def _number(value: float) -> str:
    """Format with four digits, without an exponent if possible."""
    if value == 0 or abs(value) < 1e-4:
        return f"{value:.3g}"
    whole = len(str(int(abs(value))))
    if abs(value) >= 1:
        return f"{value:.{max(0, 4 - whole)}f}"
    return f"{value:.4g}"
