"""begin_step and end_step in Triton: one launch each, where PyTorch needs some thirty."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import CachedLauncher
from ..common.pdl import wait_for_inputs
from .reference import NO_TOKEN

BLOCK = 128  # rows per program

_NO_TOKEN = tl.constexpr(NO_TOKEN)


@triton.jit(do_not_specialize=["n_rows"])
def _begin_step_kernel(
    context_ptr,  # [n_rows]
    first_row_ptr,  # [n_rows]
    block_table_ptr,  # [n_rows, max_blocks]
    positions_ptr,  # [n_rows], written
    slots_ptr,  # [n_rows], written
    context_len_ptr,  # [n_rows], written
    n_rows,
    stride_table,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < n_rows
    context = tl.load(context_ptr + rows, mask=mask, other=0)
    live = context > 0
    entry = rows.to(tl.int64) * stride_table + context // BLOCK_SIZE
    block = tl.load(block_table_ptr + entry, mask=live, other=0).to(tl.int64)
    slot = tl.where(live, block * BLOCK_SIZE + context % BLOCK_SIZE, -1)
    first_row = tl.load(first_row_ptr + rows, mask=mask, other=0)
    tl.store(positions_ptr + rows, first_row + context, mask=mask)
    tl.store(slots_ptr + rows, slot, mask=mask)
    tl.store(context_len_ptr + rows, context + live.to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _end_step_kernel(
    sampled_ptr,  # [n_rows]
    status_ptr,  # [n_rows]
    context_len_ptr,  # [n_rows]
    stop_tokens_ptr,  # [N_STOPS]
    pad_ptr,  # scalar
    tokens_ptr,  # [n_rows], written
    host_tokens_ptr,  # [n_rows], written
    context_ptr,  # [n_rows], written
    generated_ptr,  # [n_rows], incremented
    seen_ptr,  # [n_rows, n_vocab] bytes, written at the tokens of live rows; or None
    n_rows,
    stride_seen,
    N_STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_STOPS: tl.constexpr,
):
    wait_for_inputs()
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < n_rows
    context_len = tl.load(context_len_ptr + rows, mask=mask, other=0)
    live = context_len > 0
    token = tl.load(sampled_ptr + rows, mask=live, other=0)
    pad = tl.load(pad_ptr)
    status = tl.load(status_ptr + rows, mask=live, other=0).to(tl.int64)
    stops = tl.arange(0, BLOCK_STOPS)
    stop = tl.load(stop_tokens_ptr + stops, mask=stops < N_STOPS, other=-1)
    done = tl.max((token[:, None] == stop[None, :]).to(tl.int32), 1) > 0
    for_host = tl.where(status == 0, token, _NO_TOKEN - status)
    tl.store(host_tokens_ptr + rows, tl.where(live, for_host, pad), mask=mask)
    tl.store(tokens_ptr + rows, token, mask=mask)
    tl.store(context_ptr + rows, tl.where(done, 0, context_len), mask=mask)
    generated = tl.load(generated_ptr + rows, mask=mask, other=0)
    tl.store(generated_ptr + rows, generated + 1, mask=mask)
    if seen_ptr is not None:
        one = tl.full([BLOCK], 1, tl.uint8)
        tl.store(seen_ptr + rows.to(tl.int64) * stride_seen + token, one, mask=live)


_begin, _end = (CachedLauncher(k, pdl=True) for k in (_begin_step_kernel, _end_step_kernel))


def launch_begin_step(
    context: torch.Tensor, first_row: torch.Tensor, block_table: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_rows = len(context)
    positions, slots = torch.empty_like(first_row), torch.empty_like(first_row)
    context_len = torch.empty_like(context)
    tensors = (context, first_row, block_table, positions, slots, context_len)
    stride = block_table.stride(0)
    args = (*tensors, n_rows, stride, block_size, BLOCK)
    _begin((-(-n_rows // BLOCK),), args, num_warps=4)
    return positions, slots, context_len


def launch_end_step(
    sampled: torch.Tensor,
    status: torch.Tensor,
    context_len: torch.Tensor,
    stop_tokens: torch.Tensor,
    pad: torch.Tensor,
    *,
    tokens: torch.Tensor,
    host_tokens: torch.Tensor,
    context: torch.Tensor,
    generated: torch.Tensor,
    seen: torch.Tensor | None = None,
) -> None:
    n_rows, n_stops = len(sampled), len(stop_tokens)
    seen = None if seen is None else seen.view(torch.uint8)
    tensors = (
        *(sampled, status, context_len, stop_tokens, pad),
        *(tokens, host_tokens, context, generated, seen),
    )
    stride = 0 if seen is None else seen.stride(0)
    block_stops = triton.next_power_of_2(max(n_stops, 1))
    args = (*tensors, n_rows, stride, n_stops, BLOCK, block_stops)
    _end((-(-n_rows // BLOCK),), args, num_warps=4)
