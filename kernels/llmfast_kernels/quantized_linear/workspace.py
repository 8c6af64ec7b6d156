"""Memory that linear layers with quantized weights hold between calls.

The workspace, into which weights are dequantized, is as large as the largest layer yet. A layer's
weights are there from one launch to the next, so nothing is kept of them. Tickets count the
programs of a tile.
"""

from __future__ import annotations

import torch

MAX_TICKETS = 1024

# the last one is in use; those before it were captured in a CUDA graph, whose replays write to them
_tensors: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
_captured: set[int] = set()  # addresses
_tickets: dict[torch.device, torch.Tensor] = {}


def workspace(device: torch.device, dtype: torch.dtype, size: int) -> torch.Tensor:
    """``size`` elements, not initialised: whoever asks next on this device gets the same ones."""
    held = _tensors.setdefault((device, dtype), [])
    if not held or len(held[-1]) < size:
        if held and held[-1].data_ptr() not in _captured:
            held.pop()  # before there is a new one, so that there never are two
        held.append(torch.empty(size, dtype=dtype, device=device))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.add(held[-1].data_ptr())
    return held[-1][:size]


def tickets(device: torch.device, count: int) -> torch.Tensor:
    """Return at least ``count`` int32 zeros, which the kernel must leave as zeros.

    Raises:
        ValueError: more than MAX_TICKETS.
    """
    if count > MAX_TICKETS:
        raise ValueError(f"quantized_linear: {count} tiles share columns, more than {MAX_TICKETS}")
    if device not in _tickets:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("int4_linear: run it once before a CUDA graph captures it")
        _tickets[device] = torch.zeros(MAX_TICKETS, dtype=torch.int32, device=device)
    return _tickets[device]


def workspace_bytes(device: torch.device | None = None) -> int:
    """Bytes that the workspaces of ``device`` take, of all devices if it is None.

    They are kept until :func:`free_workspaces`.
    """
    return sum(
        tensor.nbytes
        for (where, _), tensors in _tensors.items()
        for tensor in tensors
        if device is None or where == device
    )


def free_workspaces() -> None:
    """Give the workspaces back. CUDA graphs of quantized layers must not be used again."""
    _tensors.clear()
    _captured.clear()
