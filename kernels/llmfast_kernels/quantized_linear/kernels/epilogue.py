"""From a tile's sums to its outputs: bias, rounding, residual or gate, in Triton.

Where columns are split (split-K), each program of a tile leaves its partial sums in memory and
draws a ticket. The last arriver adds them up in the order of columns, so that the result does not
depend on which program that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...linear.kernel import gated, round_sums


@triton.jit
def tile_rows(pid, n, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Return the weight rows of a tile, int32 ``[BLOCK_N, 1]``, and which of them exist.

    GATED: the first half are rows of the gate, and the second half the matching rows of up.
    """
    if GATED:
        half = BLOCK_N // 2
        place = tl.arange(0, BLOCK_N)[:, None]
        unit = pid * half + place % half
        rows = tl.minimum(unit, n // 2 - 1) + tl.where(place < half, 0, n // 2)
        exists = unit < n // 2
    else:
        unit = pid * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        rows = tl.minimum(unit, n - 1)
        exists = unit < n
    return rows, exists


@triton.jit
def store_tile(
    sums,  # float32 [BLOCK_N, BLOCK_M] of the rows that tile_rows returns
    bias_ptr,
    residual_ptr,
    y_ptr,  # [n_tokens, n], or half as wide with ACT
    pid,
    rows,
    exists,
    tokens,  # [1, BLOCK_M]
    n_tokens,
    n,
    ACT: tl.constexpr,  # None, or the gate's activation
):
    """Round the sums, with the bias, to y's dtype; then add the residual, or gate; then store."""
    dtype = y_ptr.dtype.element_ty
    y = round_sums(sums, bias_ptr, rows, dtype)
    width = n
    if ACT is not None:
        HALF: tl.constexpr = sums.shape[0] // 2
        gate, up = tl.split(tl.permute(tl.reshape(y, [2, HALF, sums.shape[1]]), (1, 2, 0)))
        y = gated(gate, up, ACT, dtype)
        width = n // 2
        rows = (pid * HALF + tl.arange(0, HALF))[:, None]
        exists = rows < width
    at = tokens * width + tl.minimum(rows, width - 1)
    mask = (tokens < n_tokens) & exists
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(dtype), mask=mask)


@triton.jit
def store_split_tile(
    sums,  # the first ten arguments as of store_tile
    bias_ptr,
    residual_ptr,
    y_ptr,
    pid,
    rows,
    exists,
    tokens,
    n_tokens,
    n,
    partial_ptr,  # float32 [SPLITS, n_tokens, n], written; None if SPLITS is 1
    ticket_ptr,  # the tile's ticket, 0 before and after; None likewise
    ACT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store a tile whose columns SPLITS programs share: the last arriver sums and stores."""
    if SPLITS == 1:
        store_tile(
            sums, bias_ptr, residual_ptr, y_ptr, pid, rows, exists, tokens, n_tokens, n, ACT
        )  # fmt: skip
    else:
        area = n_tokens * n
        at = tokens * n + rows
        mask = (tokens < n_tokens) & exists
        tl.store(partial_ptr + tl.program_id(1) * area + at, sums, mask=mask)
        tl.debug_barrier()  # every thread has stored before the ticket is drawn
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == SPLITS - 1:
            sums = tl.zeros(sums.shape, tl.float32)
            for split in range(SPLITS):
                part_ptrs = partial_ptr + split * area + at
                sums += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
            store_tile(
                sums, bias_ptr, residual_ptr, y_ptr, pid, rows, exists, tokens, n_tokens, n, ACT
            )  # fmt: skip
            tl.store(ticket_ptr, 0)
