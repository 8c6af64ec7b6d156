"""The frame that all ``llmfast bench`` commands share: checks, running, and writing figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import ui

if TYPE_CHECKING:
    from rich.console import Console

    from ..measure.figures import BenchResult, Progress
    from ..measure.results import Env, Run
    from ..measure.shapes import Source

    Measure = Callable[[Source, Progress], BenchResult]
    Show = Callable[[Console, BenchResult, Env], None]

_WEIGHTS = ("int4-g32", "int4-g64", "int4-g128", "int8", "int8-g32", "int8-g64", "int8-g128")


@dataclass(frozen=True)
class Output:
    """The destination of figures. None: not given."""

    json_path: str | None = None  # a file to merge into; "-": stdout
    results: Path | None = None  # a folder of results files
    commit: str | None = None  # of the sources

    def check(self) -> None:
        """Refuse a destination that cannot be written.

        Raises:
            UserError: ``--json`` names a folder, or a file in a folder that is not there.
        """
        if self.json_path in (None, "-"):
            return
        path = Path(str(self.json_path))
        if path.is_dir():
            raise UserError(f"--json: {path} is a folder")
        if not path.parent.is_dir():
            raise UserError(f"--json: there is no folder {path.parent}")

    def write(self, run: Run, suite: str) -> None:
        """Write the run where the options say: to stdout, to a file, to a folder of suites."""
        from ..measure.results import merge, to_data, validate

        if self.json_path == "-":
            data: dict[str, Any] = to_data((run,))
            validate(data, suite=suite)
            print(json.dumps(data, indent=1))
        elif self.json_path is not None:
            merge(Path(self.json_path), run, suite=suite)
            print(self.json_path, file=sys.stderr)
        if self.results is not None:
            path = self.results / f"{suite}.json"
            merge(path, run)
            print(path, file=sys.stderr)


def run_bench(
    suite: str, source: Source, output: Output, measure: Measure, show: Show
) -> BenchResult:
    """Measure, show the figures, and write those that are asked for.

    The caller has checked its options and ``output``.

    Raises:
        UserError: a bad source, or an error of ``measure``.
    """
    source.check()
    with ui.progress("Importing") as step, quiet_transformers():
        import torch

        from ..measure.environment import capture_env, run_id
        from ..measure.results import Run

        result = measure(source, step)
        env = capture_env(commit=output.commit)
    for note in result.notes:
        ui.note(f"not measured: {note}")
    if not torch.cuda.is_available():
        ui.note(
            "there is no GPU here: these are figures of PyTorch's CPU operations, with no graphs, "
            "and say nothing about llmfast's speed"
        )
    from rich.console import Console

    show(Console(stderr=output.json_path == "-"), result, env)
    output.write(Run(run_id(env), env, tuple(result.rows)), suite)
    return result


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Turn transformers' progress bars off: they would be drawn over ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------- checks


def check_weights(weights: str | None) -> None:
    """Refuse a ``--weights`` that names no form.

    Raises:
        UserError: it is neither None nor a known form.
    """
    if weights not in (None, *_WEIGHTS):
        raise UserError(f"--weights must be {', '.join(_WEIGHTS)}; got {weights!r}")


def parse_numbers(option: str, text: str) -> list[int]:
    """Parse ``"1,8,32"`` as numbers of at least 1, each once.

    Raises:
        UserError: it is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} must be numbers of at least 1 with commas between, got {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))


def parse_range(option: str, text: str) -> tuple[int, int]:
    """Parse ``N`` or ``LOW-HIGH``.

    Raises:
        UserError: it is something else.
    """
    parts = text.split("-")
    if len(parts) <= 2 and all(part.isdecimal() for part in parts):
        low, high = int(parts[0]), int(parts[-1])
        if 1 <= low <= high:
            return low, high
    raise UserError(f"{option} must be a number or LOW-HIGH, of at least 1, got {text!r}")
