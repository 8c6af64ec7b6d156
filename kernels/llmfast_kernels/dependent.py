"""Programmatic dependent launch: a kernel starts while the one before it still runs.

Between two kernels of a stream a GPU waits until the first has ended, then starts the second: a
microsecond or two in which little is read. From Hopper on the second may be resident before that,
up to the point where it needs what the first has written. Every kernel of a decoding step begins
with :func:`wait_for_inputs`; before it nothing is read into registers and nothing written.

On other GPUs, and in Triton's interpreter, all of this is nothing.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

WANTED = os.environ.get("LLMFAST_DEPENDENT_LAUNCH", "1") != "0"


@triton.constexpr_function
def is_dependent():
    """Whether the kernel that is being compiled may be launched so."""
    return not knobs.runtime.interpret and cuda_capability_geq(9, 0)


@triton.jit
def wait_for_inputs(LET_COME: tl.constexpr = True):
    """Wait until all that was launched before has ended; then let the next kernel come.

    The other way round a whole chain of kernels becomes resident at once, which is slower. Without
    LET_COME the next one comes when this one has ended.
    """
    if is_dependent():
        gdc_wait()
        if LET_COME:
            gdc_launch_dependents()


@triton.jit
def prefetch_rows(row_ptrs, k, COLS: tl.constexpr):
    """Ask for the first COLS of 16-bit rows of length k to be brought to the L2.

    It may come before :func:`wait_for_inputs`: what another kernel still writes is not missed.
    """
    LINE: tl.constexpr = 64  # elements of a cache line of 128 bytes
    if is_dependent() and COLS > 0:
        cols = tl.arange(0, COLS // LINE)[None, :] * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [(row_ptrs + tl.minimum(cols, k - 1)).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def launch_options() -> dict[str, bool]:
    """Options for launching, on the current device, a kernel that waits for its inputs."""
    absent = knobs.runtime.interpret or torch.version.hip or not torch.cuda.is_available()
    if absent or not WANTED:
        return {}
    return {"launch_pdl": True} if torch.cuda.get_device_capability()[0] >= 9 else {}
