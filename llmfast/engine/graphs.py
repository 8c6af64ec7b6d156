"""CUDA graphs of steps: those in which all decode, and small and full ones with prompts in them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from ..errors import UserError
from ..runner.graphs import StepGraph, capture, new_pool
from .inputs import Size

logger = logging.getLogger("llmfast")

MIXED_TOKENS = 512  # of a step with prompts, of any number of them
MAX_PROMPTS = 16  # of such a step: each may leave an attention program of every head idle
LARGEST_TOKENS = 16384  # of a full step, which is a graph too: prompts that wait make steps full
FULL = 15 / 16  # of its tokens, from which on padding costs less than launching
FEW_ROWS = 32  # a second bucket of mixed steps, which spares small ones the logits of all rows


def buckets(most: int) -> list[int]:
    """Numbers of rows that have graphs: powers of 2, from 32 on multiples of 32, and ``most``."""
    small = [1, 2, 4, 8, 16]
    return sorted({n for n in (*small, *range(32, most, 32)) if n < most} | {most})


def mixed_buckets(max_rows: int, max_tokens: int) -> list[tuple[int, int]]:
    """Numbers of tokens and rows of steps with prompts that have graphs.

    From 128 tokens on a step is bound by computing, so that padding costs what tokens cost.
    """
    most = min(max_tokens, MIXED_TOKENS)
    tokens = {n for n in (32, 64, *range(128, most, 64)) if n < most} | {most}
    return sorted(
        {(n, min(n, rows)) for n in tokens if n > 1 for rows in (min(FEW_ROWS, max_rows), max_rows)}
    )


class Graph:
    """A captured step, and how its inputs lie."""

    def __init__(self, size: Size, step: StepGraph) -> None:
        self.size = size
        self.replay = step.replay


class StepGraphs:
    """One for each bucket; they share memory, since one runs at a time."""

    def __init__(
        self,
        step: Callable[[Size], None],
        make_idle: Callable[[Size], None],
        device: torch.device,
        sizes: list[Size],
    ) -> None:
        """Capture all of them.

        Args:
            step: the step, for its size.
            make_idle: lets the step's buffers say that every row is idle, since a capture runs the
                step first.
            sizes: what :func:`graph_sizes` gives.

        Raises:
            UserError: the GPU has no memory left for them.
        """
        started = time.perf_counter()
        pool = new_pool()
        self._graphs: list[Graph] = []  # the smallest first
        for size in reversed(sizes):  # the largest makes the memory for the others
            make_idle(size)
            try:
                captured = capture(partial(step, size), device, pool)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"LLM: no memory is left for a CUDA graph of {size.tokens} tokens of "
                    f"{size.rows} sequences; lower gpu_memory_utilization, or use "
                    "enforce_eager=True"
                ) from error
            except RuntimeError as error:
                line = (str(error).splitlines() or [""])[0]
                logger.warning("llmfast: steps run without CUDA graphs, since one raised: %s", line)
                break
            self._graphs.insert(0, Graph(size, captured))
        seconds = time.perf_counter() - started
        logger.info("llmfast: captured %d CUDA graphs in %.1f s", len(self._graphs), seconds)

    def get(self, tokens: int, rows: int, prompts: int) -> Graph | None:
        """The smallest graph for ``tokens`` of ``rows``, of which ``prompts`` have several.

        None where there is none.
        """
        for graph in self._graphs:
            size = graph.size
            if size.prompts and size.tokens > MIXED_TOKENS and tokens < FULL * size.tokens:
                continue
            if size.tokens >= tokens and size.rows >= rows and size.prompts >= prompts:
                return graph
        return None


def graph_sizes(max_rows: int, max_tokens: int, width: int) -> list[Size]:
    """The steps that are captured, the smallest first.

    Args:
        max_rows, max_tokens: of a step, at most.
        width: blocks of a row of the table.
    """
    decodes = [Size(rows, rows, width) for rows in buckets(max_rows)]
    mixed = [
        Size(tokens, rows, width, min(MAX_PROMPTS, rows, tokens // 2))
        for tokens, rows in mixed_buckets(max_rows, max_tokens)
    ]
    full = []
    if MIXED_TOKENS < max_tokens <= LARGEST_TOKENS:
        full = [Size(max_tokens, max_rows, width, min(MAX_PROMPTS, max_rows))]
    return sorted(decodes + mixed + full, key=lambda size: (size.tokens, size.rows, size.prompts))
