"""State on the GPU that belongs to one stream, so that two streams never share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def current_stream(device: torch.device) -> int:
    """Return the handle of the current stream of a GPU, 0 for the CPU.

    While a CUDA graph is captured this is the stream of the capture.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class PerStream(Generic[T]):
    """One value for each device and stream, made when a stream first asks for it."""

    def __init__(self, make: Callable[[torch.device], T]) -> None:
        self._make = make
        self._values: dict[tuple[torch.device, int], T] = {}

    def of(self, device: torch.device) -> T:
        """Return the value of the device's current stream; a CPU counts as one stream."""
        key = (device, current_stream(device))
        if key not in self._values:
            self._values[key] = self._make(device)
        return self._values[key]
