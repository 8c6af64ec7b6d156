"""What the kernels of layers with four-bit weights have in common."""

from __future__ import annotations

import triton
import triton.language as tl

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
def store(sums, bias_ptr, residual_ptr, y_ptr, rows, at, mask):
    """Round the sums, with the bias, to y's dtype; then add the residual."""
    dtype = y_ptr.dtype.element_ty
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + rows).to(tl.float32)
    y = sums.to(dtype).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(dtype), mask=mask)


@triton.jit
def add_and_store(
    sums,  # [BLOCK_N, BLOCK_M], of this program's columns
    partial_ptr,  # float32 [SPLITS, area], written; or None: SPLITS is 1
    ticket_ptr,  # the tile's, 0 before and after; or None
    area,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    at,
    mask,
    SPLITS: tl.constexpr,
):
    """Store a tile; the last of the SPLITS programs of it adds them up, in the order of columns."""
    if SPLITS == 1:
        store(sums, bias_ptr, residual_ptr, y_ptr, rows, at, mask)
    else:
        tl.store(partial_ptr + tl.program_id(1) * area + at, sums, mask=mask)
        tl.debug_barrier()  # all of it is stored before the ticket is drawn
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == SPLITS - 1:
            sums = tl.zeros(sums.shape, tl.float32)
            for split in range(SPLITS):
                part_ptrs = partial_ptr + split * area + at
                sums += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
            store(sums, bias_ptr, residual_ptr, y_ptr, rows, at, mask)
            tl.store(ticket_ptr, 0)
