"""CUDA graphs of steps: which steps have one, capturing them, and choosing one for a step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch

from ..errors import UserError
from .inputs import GraphKey, SamplingOps, StepShape

logger = logging.getLogger("llmfast")

MIXED_TOKENS = 512  # steps with prompts up to this size run as graphs, however full they are
MAX_PROMPTS = 16  # in such a step: each may leave an attention program of every head idle
LARGEST_TOKENS = 16384  # the largest full step to capture: while prompts wait, steps are full
MIN_FILL = 15 / 16  # share of a full step's tokens above which padding costs less than launching
FEW_ROWS = 32  # a second bucket of mixed steps: it saves small ones the logits of all rows

_WARM_UP = 2  # runs before a capture: kernels compile, libraries create their handles


# ------------------------------------------------------------------------------------- buckets


def row_bucket(rows: int) -> int:
    """Return the rows of the graph that ``rows`` rows run in: 1, 2, 4, 8, 16, multiples of 32."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 32) * 32


def row_buckets(most: int) -> list[int]:
    """Return the buckets that steps of up to ``most`` rows need; the last is ``most`` itself."""
    return sorted({min(row_bucket(rows), most) for rows in range(1, most + 1)})


def mixed_buckets(max_rows: int, max_tokens: int) -> list[tuple[int, int]]:
    """Return (tokens, rows) of the graphs for steps with prompts.

    From 128 tokens on a step is bound by compute, so that padding costs what tokens cost.
    """
    most = min(max_tokens, MIXED_TOKENS)
    tokens = {n for n in (32, 64, *range(128, most, 64)) if n < most} | {most}
    return sorted(
        {(n, min(n, rows)) for n in tokens if n > 1 for rows in (min(FEW_ROWS, max_rows), max_rows)}
    )


def decode_shape(rows: int, width: int, groups: int = 1) -> StepShape:
    """Return the shape of a step in which each row has one token."""
    return StepShape(rows, rows, width, rows, groups=groups)


def mixed_shape(tokens: int, rows: int, width: int, groups: int = 1) -> StepShape:
    """Return the shape of a step with prompts in it."""
    prompts = min(MAX_PROMPTS, rows, tokens // 2)
    return StepShape(
        tokens, rows, width, rows, max_query_len=tokens, max_prompts=prompts, groups=groups
    )


def step_shapes(max_rows: int, max_tokens: int, width: int, groups: int = 1) -> list[StepShape]:
    """Return the shapes that an engine captures.

    Args:
        max_rows, max_tokens: the limits of a step.
        width: blocks per row of a block table.
        groups: cache groups.
    """
    shapes = [decode_shape(rows, width, groups) for rows in row_buckets(max_rows)]
    shapes += [
        mixed_shape(*bucket, width, groups) for bucket in mixed_buckets(max_rows, max_tokens)
    ]
    if MIXED_TOKENS < max_tokens <= LARGEST_TOKENS:
        shapes.append(mixed_shape(max_tokens, max_rows, width, groups))
    return shapes


# ------------------------------------------------------------------------------------- capture


class Replayable(Protocol):
    """A captured step."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """Captures the steps of one executor on one device."""

    def __init__(self, device: torch.device) -> None: ...

    def __call__(self, step: Callable[[], None]) -> Replayable:
        """Capture ``step``, which waits for nothing and reads what changes from fixed buffers.

        It runs a few times first, so its rows must be idle.
        """
        ...

    def held_memory(self) -> tuple[int, int]:
        """Return the bytes of the graphs, and those that libraries and the allocator keep."""
        ...


@dataclass
class _CaptureStream:
    """A device's stream for captures: one, since libraries keep memory for each stream."""

    stream: torch.cuda.Stream
    kept: int = 0  # bytes


@cache
def _capture_stream(device: torch.device) -> _CaptureStream:
    return _CaptureStream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class _CudaReplay:
    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph = graph
        self._device = device

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


class CudaCapture:
    """Captures CUDA graphs that share a memory pool, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Replayable:
        device = self._device
        with torch.cuda.device(device):
            own = _capture_stream(device)
            before = torch.cuda.memory_allocated(device)
            own.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(own.stream):
                for _ in range(_WARM_UP):
                    step()
            torch.cuda.current_stream().wait_stream(own.stream)
            own.kept += torch.cuda.memory_allocated(device) - before
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=own.stream):
                step()
        return _CudaReplay(graph, device)

    def held_memory(self) -> tuple[int, int]:
        # from the allocator's segments: a capture also frees memory, so that the reserved bytes
        # before and after do not tell the size of a graph
        graphs, workspace = 0, _capture_stream(self._device).kept
        for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
            if segment["device"] != self._device.index:
                continue
            if tuple(segment["segment_pool_id"]) == tuple(self._pool):
                graphs += segment["total_size"]
            elif tuple(segment["segment_pool_id"]) == (0, 0):
                workspace += segment["total_size"] - segment["allocated_size"]
        return graphs, workspace


CAPTURES: dict[str, type[Capture]] = {"cuda": CudaCapture}  # devices whose steps can be captured


# ------------------------------------------------------------------------------ captured steps


class StepGraphs:
    """The captured steps of an executor.

    One rule for both of its users. If memory runs out in a capture, all graphs are dropped and a
    :class:`UserError` says what to lower. If a capture raises otherwise, all graphs are dropped,
    the reason is logged once, and every step runs without a graph.
    """

    def __init__(self, device: torch.device, *, enabled: bool, owner: str, advice: str) -> None:
        """
        Args:
            enabled: False: nothing is captured.
            owner: the name that an error begins with.
            advice: what the user can do if there is no memory for a graph.
        """
        self._device = device
        self._owner, self._advice = owner, advice
        self._graphs: dict[GraphKey, Replayable] = {}  # the smallest first
        self._capture: Capture | None = CAPTURES[device.type](device) if enabled else None

    @property
    def enabled(self) -> bool:
        """True if steps are captured."""
        return self._capture is not None

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: GraphKey) -> Replayable | None:
        """Return the captured step of a key; None: it was not captured."""
        return self._graphs.get(key)

    def replay(self, key: GraphKey) -> None:
        """Run the captured step of a key."""
        self._graphs[key].replay()

    def capture(
        self,
        keys: Iterable[GraphKey],
        make_idle: Callable[[GraphKey], None],
        step: Callable[[GraphKey], None],
    ) -> None:
        """Capture the steps of ``keys`` that have no graph yet.

        Args:
            make_idle: make every row of the step idle, since a capture runs the step first.
            step: the step of a key, over fixed buffers.

        Raises:
            UserError: the GPU has no memory left for them.
        """
        started = time.perf_counter()
        new = sorted({key for key in keys if key not in self._graphs}, key=_size, reverse=True)
        for key in new:  # the largest first: its memory serves the others
            if self._capture is None:
                return
            make_idle(key)
            try:
                self._graphs[key] = self._capture(partial(step, key))
            except torch.OutOfMemoryError as error:
                self.clear()
                self._capture = type(self._capture)(self._device)  # an unused pool is of no use
                raise UserError(
                    f"{self._owner}: no memory is left for a CUDA graph of {key.shape.tokens} "
                    f"tokens of {key.shape.rows} sequences; {self._advice}"
                ) from error
            except RuntimeError as error:
                self.clear()
                self._capture = None
                line = (str(error).splitlines() or [""])[0]
                logger.warning("llmfast: steps run without CUDA graphs, since one raised: %s", line)
        if new and self._capture is not None:
            self._graphs = dict(sorted(self._graphs.items(), key=lambda item: _size(item[0])))
            seconds = time.perf_counter() - started
            logger.info("llmfast: captured %d CUDA graphs in %.1f s", len(new), seconds)

    def find(
        self,
        *,
        tokens: int,
        rows: int,
        max_query_len: int,
        prompts: int,
        sampling: SamplingOps | None,
    ) -> GraphKey | None:
        """Return the key of the smallest graph that a step fits in; None: there is none.

        Args:
            max_query_len: the most tokens of a row.
            prompts: rows with several tokens.
            sampling: None: the step must end at the logits.
        """
        for key in self._graphs:
            shape = key.shape
            if shape.tokens < tokens or shape.rows < rows or shape.max_query_len < max_query_len:
                continue
            if shape.max_prompts is not None and shape.max_prompts < prompts:
                continue
            if key.self_advancing or (key.sampling is None) != (sampling is None):
                continue
            large = shape.max_query_len > 1 and shape.tokens > MIXED_TOKENS
            if not large or tokens >= MIN_FILL * shape.tokens:
                return key
        return None

    def held_memory(self) -> tuple[int, int]:
        """Return the bytes of the graphs, and those that libraries and the allocator keep."""
        return (0, 0) if self._capture is None else self._capture.held_memory()

    def clear(self) -> None:
        self._graphs.clear()


def _size(key: GraphKey) -> tuple[int, int, int]:
    shape = key.shape
    return shape.tokens, shape.rows, shape.max_prompts or 0
