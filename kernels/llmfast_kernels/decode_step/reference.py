"""Before and after a step of decoding, in plain PyTorch: what the kernels must compute."""

from __future__ import annotations

import torch


def begin_step_reference(
    context: torch.Tensor, first_row: torch.Tensor, block_table: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    live = context > 0
    place = context.long()
    block = block_table.gather(1, torch.where(live, place // block_size, 0)[:, None])[:, 0].long()
    slots = torch.where(live, block * block_size + place % block_size, -1)
    return first_row + place, slots, context + live


def end_step_reference(
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
    live = context_len > 0
    chosen = torch.where(live, sampled, pad)
    done = (chosen[:, None] == stop_tokens).any(1)
    host_tokens.copy_(torch.where(live & (status != 0), -status.long(), chosen))
    tokens.copy_(chosen)
    generated += 1
    if seen is not None:
        seen.scatter_(1, chosen[:, None], True)
    context.copy_(torch.where(done, 0, context_len))
