"""Facts about the GPU, queried from its driver. Nothing is decided by a GPU's name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

COPY_SHARE = 0.9  # of the bandwidth that a copy reaches: 3,019 of 3,350 GB/s on an H100


@dataclass(frozen=True)
class Gpu:
    """A GPU, as far as estimates depend on it."""

    name: str
    arch: str  # "sm_90", or "gfx942" under ROCm
    sm_count: int
    memory_bytes: int
    bandwidth: float | None  # bytes a second, of bus width and clock; None: the driver has neither

    def read_seconds(self, nbytes: int) -> float | None:
        """Return how long reading ``nbytes`` takes at the rate of a copy; None: not known."""
        return None if self.bandwidth is None else nbytes / (COPY_SHARE * self.bandwidth)


def gpu_of(device: torch.device) -> Gpu | None:
    """Return the facts of ``device``; None for the CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    width = getattr(found, "memory_bus_width", 0)  # bits
    clock = getattr(found, "memory_clock_rate", 0)  # kHz; two transfers a cycle
    return Gpu(
        name=found.name,
        arch=found.gcnArchName.split(":")[0]
        if torch.version.hip
        else f"sm_{found.major}{found.minor}",
        sm_count=found.multi_processor_count,
        memory_bytes=found.total_memory,
        bandwidth=2.0 * clock * 1000 * width / 8 or None,
    )
