"""A step as the model runs it: flat tokens of several sequences, and the cache they go to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .inputs import GraphKey, StepInputs, StepShape, StepTensors, views


@dataclass
class Step(StepTensors):
    """The tensors of a step, which change between replays of a graph, and its fixed sizes."""

    max_query_len: int = 1  # tokens of a row at most
    max_context_len: int | None = None  # about the longest context, for the number of programs
    max_prompts: int | None = None  # rows with several tokens; None: one kernel takes all rows

    def attend(
        self,
        paged_attention: Callable[..., Any],
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        group: int,
        **options: Any,
    ) -> torch.Tensor:
        """Attend from the step's queries ``[T, Hq, D]`` to a layer's cache, by an operation.

        Args:
            group: the layer's cache group.
        """
        out: torch.Tensor = paged_attention(
            q,
            keys,
            values,
            query_start=self.query_start,
            context_len=self.context_len,
            block_table=self.block_tables[group],
            max_query_len=self.max_query_len,
            max_context_len=self.max_context_len,
            max_prompts=self.max_prompts,
            **options,
        )
        return out


def step_of(
    tensors: StepTensors,
    shape: StepShape,
    *,
    max_context_len: int | None = None,
    **changed: Any,
) -> Step:
    """Return the step of some fields, a few of them ``changed``."""
    return Step(
        **(vars(tensors) | changed),
        max_query_len=shape.max_query_len,
        max_context_len=max_context_len,
        max_prompts=shape.max_prompts,
    )


@dataclass
class Chunk:
    """Consecutive tokens of one sequence."""

    token_ids: Sequence[int]
    start: int  # tokens of the sequence that are in the cache already
    blocks: Sequence[int]  # blocks of the cache, in the sequence's order
    first_row: int = 0  # first row of the rotary tables for the sequence


def make_step(
    chunks: Sequence[Chunk], block_size: int, max_blocks: int, device: torch.device | str
) -> Step:
    """Return the step of some chunks, for checks and tests: no executor, one block table."""
    counts = np.array([len(chunk.token_ids) for chunk in chunks], np.int64)
    table = np.zeros((len(chunks), max_blocks), np.int64)
    for row, chunk in enumerate(chunks):
        table[row, : len(chunk.blocks)] = chunk.blocks
    tokens = int(counts.sum())
    shape = StepShape(tokens, len(chunks), max_blocks, 0, max_query_len=int(counts.max()))
    inputs = StepInputs(GraphKey(shape, None))
    inputs.place(
        np.array([chunk.start for chunk in chunks], np.int64),
        counts,
        [table],
        block_size=block_size,
        first_position=np.array([chunk.first_row for chunk in chunks], np.int64),
    )
    inputs.arrays["token_ids"][:] = [token for chunk in chunks for token in chunk.token_ids]
    return step_of(views(inputs.buffer.to(device), shape), shape)
