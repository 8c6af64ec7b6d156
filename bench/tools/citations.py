"""Figures in pages that cite a row of the results, filled and checked.

A citation is a pair of HTML comments around the figure, which readers of the page do not see:

    <!-- row h100/decode shape=llama-3.1-8b weights=bf16 kv=bf16 batch=1 prompt=512 llmfast
    tok_per_s -->190.7<!-- /row -->

The words, on one line or several, are a results file below bench/results without its suffix, the
row's case in any order, its implementation and its metric, and perhaps a format of Python's
``format``. The metric may end with

- ``.low`` or ``.high``: an end of the 95% interval;
- ``.of_copy``: a rate in GB/s as a share of the copy bandwidth of the same run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmfast.errors import UserError
from llmfast.measure.results import CEILING_CASE, Row, Run, parse_case, read

_CITATION = re.compile(r"(<!--\s*row\s([^>]*?)\s*-->)(.*?)(<!--\s*/row\s*-->)", re.DOTALL)
_MARK = re.compile(r"<!--\s*(?:/?row)\b")
_FIELDS = ("low", "high", "of_copy")


@dataclass(frozen=True)
class Citation:
    """The row that a figure cites, and how the figure is written."""

    file: str  # below the results folder, without its suffix: h100/decode
    case: frozenset[tuple[str, str]]
    impl: str
    metric: str
    field: str  # "value", "low", "high" or "of_copy"
    form: str | None  # of format(); None: four digits, or a percentage for a share

    @classmethod
    def parse(cls, text: str) -> Citation:
        """Parse the words of a citation.

        Raises:
            UserError: there are too few or too many words, or the case is malformed.
        """
        file, *words = text.split() or [""]
        pairs = [word for word in words if "=" in word]
        others = [word for word in words if "=" not in word]
        if not pairs or not 2 <= len(others) <= 3:
            raise UserError(
                "a citation is FILE key=value... IMPL METRIC [FORMAT], for example "
                f"`h100/norm tokens=1 op=rms_norm llmfast us ,.1f`; got `{text}`"
            )
        if "|" in text:  # it would split the cell of a table
            raise UserError(f"a citation must not contain '|', got `{text}`")
        impl, metric, form = (*others, None)[:3]
        name, _, field = str(metric).rpartition(".")
        if field not in _FIELDS:
            name, field = str(metric), "value"
        case = frozenset(parse_case(" ".join(pairs)).items())
        return cls(file, case, str(impl), name, field, form)


class Results:
    """The rows of a results folder, read when they are first cited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, _File] = {}

    def figure(self, citation: Citation) -> str:
        """Return the figure as it is to be shown.

        Raises:
            UserError: there is no such file or row, or the format does not fit.
        """
        file = self._file(citation.file)
        row, run = file.find(citation)
        if citation.field == "of_copy":
            value = row.value / _copy(run, citation).value
        else:
            value = getattr(row, citation.field)
        share = row.unit == "1" and citation.metric.endswith("_share")
        form = citation.form or _usual_form(value, share=share or citation.field == "of_copy")
        try:
            return format(value, form)
        except ValueError:
            raise UserError(f"{form!r} is no format of a number") from None

    def _file(self, name: str) -> _File:
        if name not in self._files:
            self._files[name] = _File(read(self.folder / f"{name}.json"))
        return self._files[name]


@dataclass
class _File:
    runs: tuple[Run, ...]

    @cached_property
    def _rows(self) -> dict[tuple[frozenset[tuple[str, str]], str, str], tuple[Row, Run]]:
        return {
            (frozenset(parse_case(row.case).items()), row.impl, row.metric): (row, run)
            for run in self.runs
            for row in run.rows
        }

    def find(self, citation: Citation) -> tuple[Row, Run]:
        key = (citation.case, citation.impl, citation.metric)
        if key not in self._rows:
            near = [case for case, *other in self._rows if other == [*key[1:]]]
            near.sort(key=lambda case: len(case ^ citation.case))
            hint = f"; the nearest is `{_text(near[0])}`" if near else ""
            raise UserError(
                f"{citation.file} has no row of {citation.impl}, {citation.metric}, "
                f"`{_text(citation.case)}`{hint}"
            )
        return self._rows[key]


def _text(case: frozenset[tuple[str, str]]) -> str:
    return " ".join(sorted("=".join(pair) for pair in case))


def _copy(run: Run, citation: Citation) -> Row:
    if citation.metric == "gb_per_s":
        for row in run.rows:
            if row.case == CEILING_CASE:
                return row
    raise UserError(f"{citation.metric}.of_copy: it needs gb_per_s and a run with a copy's row")


def _usual_form(value: float, *, share: bool) -> str:
    if share:
        return ".0%"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f",.{max(0, 4 - whole)}f" if whole else ".4g"


# ------------------------------------------------------------------------------- pages


def pages_of(root: Path) -> Iterator[Path]:
    """Yield the pages of a checkout that may cite rows: *.md in its root and below docs."""
    yield from sorted(root.glob("*.md"))
    yield from sorted((root / "docs").rglob("*.md"))


def fill(page: str, results: Results, name: str) -> tuple[str, list[str]]:
    """Fill all citations of a page.

    Returns:
        The page with every figure as its row has it, and a line for each figure that differed:
        ``name:line: shows 14,259, the row has 15,673``.

    Raises:
        UserError: a citation without a row, one that is malformed, or a comment without its pair.
    """
    stale: list[str] = []

    def replace(match: re.Match[str]) -> str:
        begin, words, shown, end = match.groups()
        where = f"{name}:{page.count(chr(10), 0, match.start()) + 1}"
        try:
            figure = results.figure(Citation.parse(words))
        except UserError as mistake:
            raise UserError(f"{where}: {mistake}") from None
        if shown != figure:
            stale.append(f"{where}: shows {shown!r}, the row has {figure!r}")
        return begin + figure + end

    filled = _CITATION.sub(replace, page)
    rest = _CITATION.sub("", page)
    if lost := _MARK.search(rest):
        raise UserError(f"{name}: a comment `{lost.group()}` without its pair, or with '>' inside")
    return filled, stale
