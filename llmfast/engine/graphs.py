"""CUDA graphs of steps in which every sequence decodes, one for each bucket of rows."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..errors import UserError
from ..runner.graphs import StepGraph, capture, new_pool
from .inputs import Size

logger = logging.getLogger("llmfast")

Key = tuple[int, bool, bool]  # rows, whether rows are drawn, whether with filters


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
    """Captured when first needed; they share memory, since one runs at a time."""

    def __init__(
        self,
        decode: Callable[[Size, bool, bool], None],
        idle: Callable[[Size], AbstractContextManager[None]],
        device: torch.device,
        max_rows: int,
        width: int,
    ) -> None:
        """
        Args:
            decode: the step, for its size, whether rows are drawn and whether with filters.
            idle: in it the step's buffers say that every row is idle; what they held of the
                step before is there again after it.
            max_rows: sequences of a step.
            width: blocks of a row of the table.
        """
        self._decode = decode
        self._idle = idle
        self._device = device
        self._width = width
        self._buckets = buckets(max_rows)
        self._pool: Any = None
        self._graphs: dict[Key, Graph | None] = {}

    def get(self, rows: int, draws: bool, filters: bool) -> Graph | None:
        """The graph for ``rows`` rows; None where the step cannot be captured.

        Raises:
            UserError: the GPU has no memory left for it.
        """
        key = (self._buckets[bisect_left(self._buckets, rows)], draws, filters)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
        return self._graphs[key]

    def _capture(self, key: Key) -> Graph | None:
        rows, draws, filters = key
        size = Size(rows, rows, self._width)
        started = time.perf_counter()
        self._pool = self._pool or new_pool()
        try:
            with self._idle(size):  # a capture runs the step first
                step = capture(lambda: self._decode(size, draws, filters), self._device, self._pool)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"LLM: no memory is left for a CUDA graph of {rows} sequences; lower "
                "gpu_memory_utilization, or use enforce_eager=True"
            ) from error
        except RuntimeError as error:
            line = (str(error).splitlines() or [""])[0]
            logger.warning("llmfast: steps run without CUDA graphs, since one raised: %s", line)
            return None
        seconds = time.perf_counter() - started
        logger.info("llmfast: captured a step of %d sequences in %.1f s", rows, seconds)
        return Graph(size, step)
