"""Device facts that launches depend on, queried once per GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, eq=False)  # compared by identity, so that caches of launches are quick
class Device:
    """A GPU, as far as the choice of a launch depends on it."""

    name: str  # as torch.cuda.get_device_name reports it; "" in the interpreter
    arch: str  # "sm_90", or "gfx942" under ROCm
    sm_count: int
    shared_memory: int  # bytes that one program may use at most
    l2_bytes: int
    interpreted: bool = False  # Triton's interpreter, which runs neither Gluon nor inline PTX

    @property
    def is_hopper(self) -> bool:
        """True if Gluon kernels for Hopper's tensor cores (WGMMA, TMA) run on this GPU."""
        return self.arch == "sm_90" and not self.interpreted


# launches of Triton's interpreter on a CPU are chosen as on an H100, without a table for its name
INTERPRETER = Device(
    "", "sm_90", sm_count=132, shared_memory=227 * 1024, l2_bytes=50 * 2**20, interpreted=True
)


def device_of(tensor: torch.Tensor) -> Device:
    """Return the device of a tensor; :data:`INTERPRETER` for a tensor on the CPU."""
    return device_at(tensor.get_device()) if tensor.is_cuda else INTERPRETER


@cache
def device_at(index: int) -> Device:
    """Query the GPU with CUDA's (or HIP's) ``index``."""
    from triton.runtime import driver  # a CPU machine may lack Triton

    limits = driver.active.utils.get_device_properties(index)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:  # torch reports (9, 0) for gfx90a: the capability does not tell
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Device(
        name=properties.name,
        arch=arch,
        sm_count=limits["multiprocessor_count"],
        shared_memory=limits["max_shared_mem"],
        l2_bytes=properties.L2_cache_size,
    )
