"""One step: a flat list of tokens of several sequences, and the paged cache that they go to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Step:
    """The tensors of one step; T tokens of B sequences. What changes between replays is in them."""

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T], rows of the rotary tables
    slots: torch.Tensor  # int64 [T], where in the cache; -1: nowhere
    query_start: torch.Tensor  # int32 [B + 1], where a sequence's tokens begin
    context_len: torch.Tensor  # int32 [B], tokens in the cache with this step's; 0: padding
    block_table: torch.Tensor  # int32 [B, max_blocks]
    max_query_len: int  # no sequence has more tokens in this step
    max_context_len: int | None = None  # about the longest context, for the number of programs
    max_prompts: int | None = None  # that have several tokens; None: one kernel takes all

    def attend(
        self,
        paged_attention: Callable[..., Any],
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Attention of the step's queries ``[T, Hq, D]`` over a layer's cache, by an operation."""
        out: torch.Tensor = paged_attention(
            q,
            keys,
            values,
            query_start=self.query_start,
            context_len=self.context_len,
            block_table=self.block_table,
            max_query_len=self.max_query_len,
            max_context_len=self.max_context_len,
            max_prompts=self.max_prompts,
            **options,
        )
        return out


@dataclass
class Chunk:
    """Consecutive tokens of one sequence."""

    token_ids: Sequence[int]
    start: int  # tokens of the sequence that are in the cache already
    blocks: Sequence[int]  # of the cache, in the order of the sequence
    first_row: int = 0  # of the rotary tables that the sequence uses


def make_step(
    chunks: Sequence[Chunk], block_size: int, max_blocks: int, device: torch.device | str
) -> Step:
    """Lay chunks end to end, for tests and for steps that no graph replays."""
    starts, positions, slots, context, tables = [0], [], [], [], []
    for chunk in chunks:
        places = range(chunk.start, chunk.start + len(chunk.token_ids))
        starts.append(starts[-1] + len(places))
        positions += [chunk.first_row + p for p in places]
        slots += [chunk.blocks[p // block_size] * block_size + p % block_size for p in places]
        context.append(places.stop)
        tables.append([*chunk.blocks, *[-1] * (max_blocks - len(chunk.blocks))])

    def tensor(values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Step(
        token_ids=tensor([t for c in chunks for t in c.token_ids], torch.int64),
        positions=tensor(positions, torch.int64),
        slots=tensor(slots, torch.int64),
        query_start=tensor(starts, torch.int32),
        context_len=tensor(context, torch.int32),
        block_table=tensor(tables, torch.int32),
        max_query_len=max(len(c.token_ids) for c in chunks),
    )
