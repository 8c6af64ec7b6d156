"""The report of a patch: each module swapped or kept, the reason, and the measured error."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One module of the model: swapped or kept, and why."""

    name: str  # dotted path in the model
    class_name: str
    operation: str | None  # the llmfast operation it now runs; None: kept unchanged
    reason: str  # why it was kept; if swapped, what it was recognised as
    error: float | None = None  # relative RMS error of our operation against the oracle
    own_error: float | None = None  # the original module's error against the oracle
    expected: bool = True  # llmfast has an operation for this kind of module

    @property
    def swapped(self) -> bool:
        return self.operation is not None


@dataclass
class Report:
    """The result of :func:`llmfast.patch`. ``print`` it for a table.

    ``fallbacks`` keeps counting while the model runs: the calls of swapped modules that ran the
    original instead, by (class name, reason).
    """

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: float = 0.0  # duration of the patch
    generate_fallback: str | None = (
        None  # why generate stays transformers' own, if it was asked for
    )

    @property
    def swapped(self) -> int:
        """The number of modules that run an llmfast operation."""
        return sum(entry.swapped for entry in self.entries)

    @property
    def kept(self) -> int:
        """The number of modules that were kept although llmfast has an operation for their kind."""
        return sum(entry.expected and not entry.swapped for entry in self.entries)

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=120, color_system=None)
        console.print(self._table())
        for (class_name, reason), count in sorted(self.fallbacks.items()):
            console.print(f"fell back: {class_name}, {count} calls: {reason}", markup=False)
        for note in self.notes:
            console.print(note, markup=False)
        return out.getvalue().rstrip("\n")

    def __rich__(self) -> Table:
        return self._table()

    def _table(self) -> Table:
        table = Table(
            title=f"llmfast: {self.swapped} modules swapped, {self.kept} kept "
            f"({self.seconds:.1f} s)",
            title_justify="left",
        )
        for header in ("module", "how many", "runs"):
            table.add_column(header)
        table.add_column("error", justify="right")
        table.add_column("original's", justify="right")
        table.add_column("why")
        for group in _groups(self.entries):
            first = group[0]
            table.add_row(
                first.class_name,
                str(len(group)),
                first.operation or "kept",
                _worst(entry.error for entry in group),
                _worst(entry.own_error for entry in group),
                first.reason,
            )
        return table


def _groups(entries: list[Entry]) -> list[list[Entry]]:
    """Group entries that read alike: swapped ones first, kinds without an operation last."""
    groups: dict[tuple[str, str | None, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.class_name, entry.operation, entry.reason), []).append(entry)
    return sorted(groups.values(), key=lambda g: (not g[0].swapped, not g[0].expected))


def _worst(errors: Iterable[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.1e}" if known else ""
