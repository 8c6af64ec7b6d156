"""Programmatic dependent launch (PDL): a kernel starts while the one before it still runs.

Between two kernels of a stream a GPU waits until the first has ended, then starts the second. From
Hopper on the second may be resident earlier, up to the point where it needs the first one's output.
This saves a microsecond or two per kernel. Every kernel of a decoding step begins with
:func:`wait_for_inputs`: before it, nothing is read into registers and nothing is written.

On other GPUs and in Triton's interpreter all of this does nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq


@triton.constexpr_function
def has_pdl():
    """Return True if the kernel that is being compiled may be launched with PDL."""
    return not knobs.runtime.interpret and cuda_capability_geq(9, 0)


@triton.jit
def wait_for_inputs(TRIGGER_DEPENDENTS: tl.constexpr = True):
    """Wait until all earlier kernels have ended, then trigger the launch of the next one.

    Triggering first would make a whole chain of kernels resident at once, which is slower. Without
    TRIGGER_DEPENDENTS the next kernel starts when this one ends.
    """
    if has_pdl():
        gdc_wait()
        if TRIGGER_DEPENDENTS:
            gdc_launch_dependents()


@triton.jit
def prefetch_rows(row_ptrs, k, COLS: tl.constexpr):
    """Prefetch the first COLS columns of 16-bit rows of length k into the L2.

    This may precede :func:`wait_for_inputs`: a stale line is not read, as L2 is coherent.
    """
    LINE: tl.constexpr = 64  # elements of a cache line of 128 bytes
    if has_pdl() and COLS > 0:
        cols = tl.arange(0, COLS // LINE)[None, :] * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [(row_ptrs + tl.minimum(cols, k - 1)).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def pdl_options() -> dict[str, bool]:
    """Return the compile options of a kernel that waits for its inputs, on the current device."""
    if knobs.runtime.interpret or torch.version.hip or not torch.cuda.is_available():
        return {}
    return {"launch_pdl": True} if torch.cuda.get_device_capability()[0] >= 9 else {}
