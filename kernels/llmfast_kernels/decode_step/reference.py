"""The two operations around a model in a decoding step, in plain PyTorch."""

from __future__ import annotations

import torch

NO_TOKEN = -(2**32)
"""``NO_TOKEN - status`` tells the host that a row had no token to choose.

No pad token is that small, so a pad of -1 is not taken for a failure.
"""


def begin_step_reference(
    context: torch.Tensor, first_row: torch.Tensor, block_table: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    live = context > 0
    offset = context.long()
    column = torch.where(live, offset // block_size, 0)
    block = block_table.gather(1, column[:, None])[:, 0].long()
    slots = torch.where(live, block * block_size + offset % block_size, -1)
    return first_row + offset, slots, context + live


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
    token = torch.where(live, sampled, 0)
    done = (token[:, None] == stop_tokens).any(1)
    for_host = torch.where(status == 0, token, NO_TOKEN - status.long())
    host_tokens.copy_(torch.where(live, for_host, pad))
    tokens.copy_(token)
    generated += 1
    if seen is not None:
        column = token[:, None]
        seen.scatter_(1, column, seen.gather(1, column) | live[:, None])
    context.copy_(torch.where(done, 0, context_len))
