"""The ring of shared memory stages between a producer warp and two consumer warpgroups.

A stage has two barriers: ``full``, on which its bytes arrive, and ``empty``, on which both
warpgroups arrive when they have read it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def new_barriers(STAGES: gl.constexpr):
    """Allocate and initialize the barriers ``full`` and ``empty`` of all stages."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    return full, empty


@gluon.jit
def stage_of(step, STAGES: gl.constexpr):
    """Return the stage of a step, and the phase of its barriers."""
    return step % STAGES, step // STAGES & 1
