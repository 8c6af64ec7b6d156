"""CUDA graphs: a step captured once and replayed without the host's Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_WARM_UP = 2  # runs before a capture: kernels compile, libraries make their handles


class StepGraph:
    """A captured step."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph = graph
        self._device = device

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


def new_pool() -> Any:
    """Memory that graphs may share which never run at the same time."""
    return torch.cuda.graph_pool_handle()


@dataclass
class _Captures:
    """Where a device's steps are captured: on one stream, since libraries keep memory for each."""

    stream: torch.cuda.Stream
    kept: int = 0  # bytes


@cache
def _captures(device: torch.device) -> _Captures:
    return _Captures(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def held_memory(device: torch.device, pool: Any) -> tuple[int, int]:
    """Bytes of the graphs of a pool, and of workspace: the libraries', and what is free for reuse.

    Asked of the allocator's segments: a capture also gives memory back, so that what is reserved
    before and after says nothing of a graph.
    """
    graphs, workspace = 0, _captures(device).kept
    for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
        if segment["device"] != device.index:
            continue
        if tuple(segment["segment_pool_id"]) == tuple(pool):
            graphs += segment["total_size"]
        elif tuple(segment["segment_pool_id"]) == (0, 0):
            workspace += segment["total_size"] - segment["allocated_size"]
    return graphs, workspace


def capture(step: Callable[[], None], device: torch.device, pool: Any) -> StepGraph:
    """Capture ``step``, which must wait for nothing and read what changes from fixed buffers.

    It is run a few times first, so it must do no harm then: every row idle, for one.
    """
    with torch.cuda.device(device):
        captures = _captures(device)
        before = torch.cuda.memory_allocated(device)
        captures.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(captures.stream):
            for _ in range(_WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(captures.stream)
        captures.kept += torch.cuda.memory_allocated(device) - before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=captures.stream):
            step()
    return StepGraph(graph, device)
