"""Terminal output beside the answer: one-line errors, notes and progress bars."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..loading.load import Loaded

INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended: 128 + SIGINT
CLOSED_PIPE = 141  # 128 + SIGPIPE
SHOW_AFTER_S = 1.0
THREAD = "llmfast progress"


def error(message: str) -> None:
    """Print ``message`` to stderr as one line: the only output of a failed command."""
    print(f"llmfast: error: {' '.join(message.split())}", file=sys.stderr)


def note(message: str) -> None:
    """Print a line to stderr that the reader must know."""
    print(f"llmfast: note: {message}", file=sys.stderr)


def discard_stdout() -> None:
    """Discard the rest of stdout: its reader is gone, and Python would flush it at exit."""
    try:
        stdout = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return  # not a file: nothing will be flushed
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stdout)
    os.close(nowhere)


class Step:
    """The progress of a piece of work; call it to update. Without a total the bar only moves."""

    def __init__(self, what: str) -> None:
        self.what, self.done, self.total = what, 0, 0

    def __call__(self, what: str, done: int, total: int) -> None:
        self.what, self.done, self.total = what, done, total


def load(model: str | None, **options: Any) -> Loaded:
    """Call ``llmfast.load`` with a progress bar if stderr is a terminal.

    A model of the Hub keeps the bars of its download and of transformers, which know its size.
    """
    on_hub = model is not None and not os.path.exists(model)
    with progress(f"Loading {model or 'the embedded model'}", shown=not on_hub) as step:
        from transformers.utils import logging  # under the bar: it takes a second

        import llmfast

        quiet = logging.is_progress_bar_enabled() and not (on_hub and sys.stderr.isatty())
        if quiet:
            logging.disable_progress_bar()
        try:
            return llmfast.load(model, on_progress=step, **options)
        finally:
            if quiet:
                logging.enable_progress_bar()


@contextmanager
def quiet_log() -> Generator[None]:
    """Keep the engine from logging each failed request: the command reports failures itself."""
    logger = logging.getLogger("llmfast")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def progress(what: str, *, shown: bool = True) -> Generator[Step]:
    """Show a bar on stderr while the block runs, if it takes long and stderr is a terminal."""
    step = Step(what)
    if not shown or not sys.stderr.isatty():
        yield step
        return
    over = threading.Event()
    shower = threading.Thread(target=_show, args=(step, over), name=THREAD, daemon=True)
    shower.start()
    try:
        yield step
    finally:
        over.set()
        shower.join()


def _show(step: Step, over: threading.Event) -> None:
    if over.wait(SHOW_AFTER_S):
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # the streams belong to the thread that works
        redirect_stderr=False,
    ) as bars:
        bar = bars.add_task(step.what, total=None)
        while not over.wait(0.1):
            bars.update(bar, description=step.what, completed=step.done, total=step.total or None)
