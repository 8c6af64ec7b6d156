"""CUDA graphs of steps in which every sequence decodes, one for each bucket of rows."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch

from ..errors import UserError
from ..runner.graphs import StepGraph, capture, new_pool
from .inputs import Size

logger = logging.getLogger("llmfast")


def buckets(most: int) -> list[int]:
    """Numbers of rows that have graphs: powers of 2, from 32 on multiples of 32, and ``most``."""
    small = [1, 2, 4, 8, 16]
    return sorted({n for n in (*small, *range(32, most, 32)) if n < most} | {most})


class Graph:
    """A captured step, and how its inputs lie."""

    def __init__(self, size: Size, step: StepGraph) -> None:
        self.size = size
        self.replay = step.replay


class DecodeGraphs:
    """One for each bucket; they share memory, since one runs at a time."""

    def __init__(
        self,
        decode: Callable[[Size], None],
        make_idle: Callable[[Size], None],
        device: torch.device,
        max_rows: int,
        width: int,
    ) -> None:
        """Capture all of them.

        Args:
            decode: the step, for its size.
            make_idle: lets the step's buffers say that every row is idle, since a capture runs the
                step first.
            max_rows: sequences of a step.
            width: blocks of a row of the table.

        Raises:
            UserError: the GPU has no memory left for them.
        """
        started = time.perf_counter()
        pool = new_pool()
        self._graphs: dict[int, Graph] = {}
        for rows in reversed(buckets(max_rows)):  # the largest makes the memory for the others
            size = Size(rows, rows, width)
            make_idle(size)
            try:
                step = capture(partial(decode, size), device, pool)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"LLM: no memory is left for a CUDA graph of {rows} sequences; lower "
                    "gpu_memory_utilization, or use enforce_eager=True"
                ) from error
            except RuntimeError as error:
                line = (str(error).splitlines() or [""])[0]
                logger.warning("llmfast: steps run without CUDA graphs, since one raised: %s", line)
                break
            self._graphs[rows] = Graph(size, step)
        self._buckets = sorted(self._graphs)
        seconds = time.perf_counter() - started
        logger.info("llmfast: captured %d CUDA graphs in %.1f s", len(self._graphs), seconds)

    def get(self, rows: int) -> Graph | None:
        """The graph for ``rows`` rows; None where there is none."""
        place = bisect_left(self._buckets, rows)
        return self._graphs[self._buckets[place]] if place < len(self._buckets) else None
