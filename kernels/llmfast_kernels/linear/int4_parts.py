"""What the kernels of layers with four-bit weights have in common."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation.kernel import activate
from .int4_layout import CHUNK, MIDDLE

CHUNK_COLUMNS = tl.constexpr(CHUNK)
PAIR_COLUMNS = tl.constexpr(CHUNK // 4)  # that one shift gives
CHUNK_WORDS = tl.constexpr(CHUNK // 8)
MIDDLE_CODE = tl.constexpr(MIDDLE)


@triton.jit
def pair_of(words, p: tl.constexpr, dtype: tl.constexpr):
    """Codes of CHUNK / 4 columns as numbers: 128 + code in bfloat16, 1024 + code in float16."""
    # constants, not arguments: with those Triton moves the weights through shared memory
    if dtype == tl.bfloat16:
        exponent = 0x43004300
    else:
        exponent = 0x64006400
    both = ((words >> (4 * p)) & 0x000F000F) | exponent
    low = both.to(tl.int16).to(dtype, bitcast=True)
    high = (both >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(low, high), [words.shape[0], PAIR_COLUMNS])


@triton.jit
def rows_of(pid, n, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """The rows of a program, int32 ``[BLOCK_N, 1]``, and which of them there are.

    GATED: half of them are of the gate, and the other half those of up that belong to them.
    """
    if GATED:
        half = BLOCK_N // 2
        place = tl.arange(0, BLOCK_N)[:, None]
        unit = pid * half + place % half
        rows = tl.minimum(unit, n // 2 - 1) + tl.where(place < half, 0, n // 2)
        there = unit < n // 2
    else:
        unit = pid * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        rows = tl.minimum(unit, n - 1)
        there = unit < n
    return rows, there


@triton.jit
def store(
    sums,  # float32 [BLOCK_N, BLOCK_M] of the rows that rows_of gives
    bias_ptr,
    residual_ptr,
    y_ptr,  # [n_tokens, n], or half as wide with ACT
    pid,
    rows,
    there,
    tokens,  # [1, BLOCK_M]
    n_tokens,
    n,
    ACT: tl.constexpr,  # None, or what the gate goes through
):
    """Round the sums, with the bias, to y's dtype; then add the residual, or gate."""
    dtype = y_ptr.dtype.element_ty
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + rows).to(tl.float32)
    y = sums.to(dtype).to(tl.float32)
    width = n
    if ACT is not None:
        HALF: tl.constexpr = sums.shape[0] // 2
        gate, up = tl.split(tl.permute(tl.reshape(y, [2, HALF, sums.shape[1]]), (1, 2, 0)))
        y = activate(gate, ACT).to(dtype).to(tl.float32) * up
        width = n // 2
        rows = (pid * HALF + tl.arange(0, HALF))[:, None]
        there = rows < width
    at = tokens * width + tl.minimum(rows, width - 1)
    mask = (tokens < n_tokens) & there
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(dtype), mask=mask)


@triton.jit
def add_and_store(
    sums,  # these as of store
    bias_ptr,
    residual_ptr,
    y_ptr,
    pid,
    rows,
    there,
    tokens,
    n_tokens,
    n,
    partial_ptr,  # float32 [SPLITS, n_tokens, n], written; or None: SPLITS is 1
    ticket_ptr,  # the tile's, 0 before and after; or None
    ACT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store a tile; the last of the SPLITS programs of it adds them up, in the order of columns."""
    if SPLITS == 1:
        store(
            sums, bias_ptr, residual_ptr, y_ptr, pid, rows, there, tokens, n_tokens, n, ACT
        )  # fmt: skip
    else:
        area = n_tokens * n
        at = tokens * n + rows
        mask = (tokens < n_tokens) & there
        tl.store(partial_ptr + tl.program_id(1) * area + at, sums, mask=mask)
        tl.debug_barrier()  # all of it is stored before the ticket is drawn
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == SPLITS - 1:
            sums = tl.zeros(sums.shape, tl.float32)
            for split in range(SPLITS):
                part_ptrs = partial_ptr + split * area + at
                sums += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
            store(
                sums, bias_ptr, residual_ptr, y_ptr, pid, rows, there, tokens, n_tokens, n, ACT
            )  # fmt: skip
            tl.store(ticket_ptr, 0)
