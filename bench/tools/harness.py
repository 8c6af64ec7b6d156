"""The frame of ``pytest bench``: full sizes on a GPU, small ones on the CPU, one clock for both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from llmfast.measure.timing import Failure, Impl, Timing, round_order

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CPU_ROUNDS = 3

# implementations that only a GPU has, or that take long to compile for a CPU
GPU_IMPLS = frozenset({"torch.compile", "cudnn", "flash2"})

T = TypeVar("T")


def sized(gpu: T, cpu: T) -> T:
    """Return the size to measure on a GPU, or the small one that only checks on the CPU."""
    return gpu if ON_GPU else cpu


class ReplayClock:
    """A timer for pytest-benchmark that replays times which were measured elsewhere.

    ``read`` is the timer and ``tick`` the function that is timed: each call of ``tick`` takes as
    long as the next sample says.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterator[float] = iter(())

    def load(self, seconds: tuple[float, ...]) -> None:
        """Start over with these samples, in seconds."""
        self._now = 0.0
        self._samples = iter(seconds)

    def read(self) -> float:
        """Return the time in seconds."""
        return self._now

    def tick(self) -> None:
        """Advance the time by the next sample."""
        self._now += next(self._samples)


def time_on_cpu(
    impls: Mapping[str, Impl], make_inputs: Callable[[], tuple[Any, ...]]
) -> dict[str, Timing | Failure]:
    """Time implementations side by side with the wall clock, for a few rounds."""
    inputs = make_inputs()
    found: dict[str, Timing | Failure] = {}
    for name, fn in impls.items():
        try:
            fn(*inputs)
        except Exception as error:  # a peer may raise anything; its reason is returned
            found[name] = Failure(f"{type(error).__name__}: {error}".strip().splitlines()[0])
    samples: dict[str, list[float]] = {name: [] for name in impls if name not in found}
    for index in range(CPU_ROUNDS):
        for name in round_order(list(samples), index):
            start = time.perf_counter()
            impls[name](*inputs)
            samples[name].append((time.perf_counter() - start) * 1e6)
    for name, us in samples.items():
        found[name] = Timing(tuple(us), calls=1, sets=1)
    return found
