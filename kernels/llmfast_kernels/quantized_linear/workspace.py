"""Scratch memory of quantized layers: a workspace for dequantized weights, and tickets.

A workspace is as large as the largest layer yet. Tickets count the programs that share a tile.
Kernels use both from one launch to the next only, so layers that run one after the other share
them, and others must not:

- each thread has its own for each stream that it launches on;
- each capture of a CUDA graph has its own for each stream, since graphs may be replayed on any
  stream. It is allocated in the graph's memory pool, which keeps the memory as long as the graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..common.capture import stream_and_capture

MAX_TICKETS = 1024


@dataclass
class _Memory:
    """The memory of one stream, or of one capture on a stream."""

    capture: int | None
    workspaces: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)
    tickets: torch.Tensor | None = None


class Scratch:
    """The scratch memory of one thread."""

    def __init__(
        self, where: Callable[[torch.device], tuple[int, int | None]] = stream_and_capture
    ) -> None:
        """``where`` returns a device's current stream, and the id of a capture that goes on."""
        self._where = where
        self._eager: dict[tuple[torch.device, int], _Memory] = {}
        self._captured: dict[tuple[torch.device, int], _Memory] = {}

    def workspace(self, device: torch.device, dtype: torch.dtype, size: int) -> torch.Tensor:
        """Return ``size`` elements, not initialized; the next call may return the same ones."""
        workspaces = self._memory(device).workspaces
        held = workspaces.get(dtype)
        if held is None or len(held) < size:
            del held
            workspaces.pop(dtype, None)  # free it before the larger one is allocated
            workspaces[dtype] = torch.empty(size, dtype=dtype, device=device)
        return workspaces[dtype][:size]

    def tickets(self, device: torch.device, count: int) -> torch.Tensor:
        """Return at least ``count`` int32 zeros, which the kernel must leave as zeros.

        Raises:
            ValueError: more than MAX_TICKETS.
        """
        if count > MAX_TICKETS:
            raise ValueError(f"quantized_linear: {count} tickets, more than {MAX_TICKETS}")
        memory = self._memory(device)
        if memory.tickets is None:  # in a capture the graph fills them at each replay
            memory.tickets = torch.zeros(MAX_TICKETS, dtype=torch.int32, device=device)
        return memory.tickets

    def workspace_bytes(self, device: torch.device | None = None) -> int:
        """Return the bytes of workspaces outside of graphs, on all devices if it is None."""
        return sum(
            tensor.nbytes
            for (where, _), memory in list(self._eager.items())
            for tensor in memory.workspaces.values()
            if device is None or where == device
        )

    def free(self) -> None:
        """Free everything. Graphs keep the memory that they were captured with."""
        self._eager.clear()
        self._captured.clear()

    def _memory(self, device: torch.device) -> _Memory:
        stream, capture = self._where(device)
        key = (device, stream)
        if capture is None:
            self._captured.pop(key, None)  # that capture has ended; its graph owns the memory
            memory = self._eager.get(key)
            if memory is None:
                memory = self._eager[key] = _Memory(None)
            return memory
        memory = self._captured.get(key)
        if memory is None or memory.capture != capture:
            # a capture needs this much again, and the stream may run nothing else any more
            self._eager.pop(key, None)
            self._captured.pop(key, None)
            memory = self._captured[key] = _Memory(capture)
        return memory


_of_thread = threading.local()
_every: weakref.WeakSet[Scratch] = weakref.WeakSet()  # a thread's goes when the thread ends


def _scratch() -> Scratch:
    try:
        scratch: Scratch = _of_thread.scratch
    except AttributeError:
        scratch = _of_thread.scratch = Scratch()
        _every.add(scratch)
    return scratch


def workspace(device: torch.device, dtype: torch.dtype, size: int) -> torch.Tensor:
    """Return this thread's :meth:`Scratch.workspace`."""
    return _scratch().workspace(device, dtype, size)


def tickets(device: torch.device, count: int) -> torch.Tensor:
    """Return this thread's :meth:`Scratch.tickets`."""
    return _scratch().tickets(device, count)


def workspace_bytes(device: torch.device | None = None) -> int:
    """Return the bytes that workspaces take on a device, on all devices if it is None.

    They are held until :func:`free_workspaces`. Workspaces in the memory pools of CUDA graphs are
    not counted.
    """
    return sum(scratch.workspace_bytes(device) for scratch in list(_every))


def free_workspaces() -> None:
    """Free the workspaces. CUDA graphs keep the memory that they were captured with."""
    for scratch in list(_every):
        scratch.free()
