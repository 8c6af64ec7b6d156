"""Options of launches that are set around a piece of code, for measuring and for finding faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchOptions:
    """Options that :func:`launch_options` sets."""

    library_linear: bool = False


_DEFAULT = LaunchOptions()
_current: ContextVar[LaunchOptions] = ContextVar("launch_options", default=_DEFAULT)


@contextmanager
def launch_options(*, library_linear: bool = False) -> Iterator[None]:
    """Set options for the operations that this thread or task calls within the context.

    A CUDA graph keeps the options that it was captured with.

    Args:
        library_linear: dense and gated linear layers run cuBLAS (or rocBLAS), and activation
            kernels after it, whatever the tables say.
    """
    token = _current.set(LaunchOptions(library_linear=library_linear))
    try:
        yield
    finally:
        _current.reset(token)


def current_options() -> LaunchOptions:
    """Return the options that are set."""
    return _current.get()
