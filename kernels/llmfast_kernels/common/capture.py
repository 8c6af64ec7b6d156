"""Which capture of a CUDA graph is going on: PyTorch tells only that one is."""

from __future__ import annotations

import ctypes
import itertools
from functools import cache
from typing import Any

import torch

from .streams import current_stream

_unknown = itertools.count(-1, -1)


def stream_and_capture(device: torch.device) -> tuple[int, int | None]:
    """Return the current stream of a device, and the id of the capture that it is part of.

    The stream is 0 for a CPU. The id is None unless a CUDA graph is being captured; streams that a
    capture forks into have its id. Ids are never used twice in a process. Where the driver cannot
    tell (ROCm), each call gets an id of its own.
    """
    if device.type != "cuda":
        return 0, None
    if device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            return stream_and_capture(device)
    stream = current_stream(device)
    return stream, _capture_id(stream) if torch.cuda.is_current_stream_capturing() else None


def _capture_id(stream: int) -> int:
    query = _query()
    if query is None:
        return next(_unknown)
    status, capture = ctypes.c_int(), ctypes.c_uint64()
    error = query(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(capture), None, None, None
    )
    if error:
        raise RuntimeError(f"cuStreamGetCaptureInfo failed with error {error}")
    return capture.value


@cache
def _query() -> Any:
    """Return CUDA's function, which is the driver's, so that no CUDA toolkit is needed."""
    if torch.version.hip:
        return None
    return getattr(ctypes.CDLL("libcuda.so.1"), "cuStreamGetCaptureInfo_v2", None)
