"""One compilation of the compile gate, as plain data: a kernel, its argument types, its launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmfast_kernels.common.device import Device

# shared memory that one program may use, bytes; sm_86, sm_89 and sm_120 have the least
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
SHARED_LIMIT_EVERYWHERE = 99 * 1024


def device(target: str, *, everywhere: bool = False) -> Device:
    """Return a GPU to choose launches for, with an H100's SMs and L2.

    Args:
        target: its architecture, a key of ``SHARED_LIMIT``.
        everywhere: its shared memory is the least that any GPU has.
    """
    shared_memory = SHARED_LIMIT_EVERYWHERE if everywhere else SHARED_LIMIT[target]
    return Device("", target, 132, shared_memory, 50 * 2**20)


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments and its launch; compiled once for each target.

    Attributes:
        name: unique, for example ``"norm/add_rms_norm bf16 4096"``; the record's key with the
            target after it.
        kernel: where the kernel is, ``"llmfast_kernels.norm.kernel:_rms_norm_kernel"``.
        signature: the type of each argument that is not in ``constexprs``, in any order:
            ``"*bf16"``, ``"i32"``, ``"fp32"``. A suffix ``":16"`` says that the pointer or number
            is divisible by 16, as Triton finds at a launch with aligned tensors: ``"*bf16:16"``.
            An argument that is a NamedTuple has one of its type here, whose members are such types,
            or constants as Triton makes them: None for an absent tensor, 1 for a stride of 1.
        constexprs: the value of every ``tl.constexpr``, and None for an absent tensor.
        targets: keys of ``SHARED_LIMIT``.
        everywhere: the launch is meant for every GPU from sm_80 on, so its shared memory must fit
            the smallest of them, not only the target's own.
        options: further compile options, for example ``{"maxnreg": 128}``.
    """

    name: str
    kernel: str
    signature: dict[str, str | tuple[Any, ...]]
    constexprs: dict[str, object]
    num_warps: int
    targets: tuple[str, ...]
    num_stages: int = 3
    everywhere: bool = True
    options: dict[str, object] = field(default_factory=dict)
