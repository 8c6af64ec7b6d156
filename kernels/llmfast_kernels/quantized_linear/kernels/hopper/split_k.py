"""Split columns: programs leave partial sums, and the last arriver adds them up in order."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .operands import barrier


@gluon.jit
def leave_partial(ptrs, sums, ticket_ptr):
    """Store partial sums, then draw a ticket; return how many programs came before."""
    gl.store(ptrs, sums)
    barrier()  # every thread has stored before the ticket is drawn
    return gl.atomic_add(ticket_ptr, 1, sem="acq_rel")


@gluon.jit
def sum_partials(first_ptr, rest_ptr, count, places, STRIDE: gl.constexpr, AHEAD: gl.constexpr):
    """Sum the partial sums at ``first_ptr``, then ``count`` more from ``rest_ptr`` on, in order.

    ``places`` are a thread's sums in a partial, each below STRIDE, which leads from one partial to
    the next. AHEAD loads (1, 2 or 4) are in flight at a time.
    """
    sums = _load(first_ptr + places, places >= 0)
    for index in range(0, count, AHEAD):
        ptrs = rest_ptr + index * STRIDE + places
        left = (count - index) * STRIDE  # a load is masked where fewer partials are left
        if AHEAD == 1:
            sums += _load(ptrs, places >= 0)
        elif AHEAD == 2:
            second = _load(ptrs + STRIDE, places < left - STRIDE)
            sums += _load(ptrs, places >= 0)
            sums += second
        else:
            second = _load(ptrs + STRIDE, places < left - STRIDE)
            third = _load(ptrs + 2 * STRIDE, places < left - 2 * STRIDE)
            fourth = _load(ptrs + 3 * STRIDE, places < left - 3 * STRIDE)
            sums += _load(ptrs, places >= 0)
            sums += second
            sums += third
            sums += fourth
    return sums


@gluon.jit
def _load(ptrs, mask):
    """Load what other programs have stored, past the L1."""
    return gl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
