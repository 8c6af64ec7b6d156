"""Rows that advance on the device alone: the state that a self-advancing step reads and writes.

Such a step uploads nothing. It takes positions, slots and tokens from what the step before left on
the device, so at batch 1 the host only replays a graph and reads a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmfast_kernels import begin_step, end_step

from .cache import PagedCache
from .inputs import GraphKey, SamplingOps, StepTensors
from .sampling import sample_rows, stop_token_bias
from .step import Step, step_of
from .token_counts import TokenCounts

MAX_STOP_TOKENS = 16


@dataclass(frozen=True)
class RowOptions:
    """The options that all rows of a batch share."""

    first_position: int = 0  # first row of the rotary tables
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()  # MAX_STOP_TOKENS at most
    min_new_tokens: int = 0  # no stop token is chosen before
    pad_token: int = 0  # the host reads it for a row that is done


class ResidentRows:
    """The rows' state beside the fields of their step, in buffers that graphs read and write.

    A row whose ``context_len`` is 0 is idle: it attends to nothing and writes nothing.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._shape = (rows, vocabulary)
        self.first_position = torch.zeros(rows, dtype=torch.int64, device=device)
        self.generated = torch.zeros(rows, dtype=torch.int32, device=device)
        self.repetition_penalty = torch.ones(rows, dtype=torch.float32, device=device)
        self.stop_tokens = torch.full((MAX_STOP_TOKENS,), -1, device=device)
        self.min_new_tokens = torch.zeros((), dtype=torch.int32, device=device)
        self.pad = torch.zeros((), dtype=torch.int64, device=device)
        self.counts: TokenCounts | None = None  # for repetition penalties

    @property
    def nbytes(self) -> int:
        """Bytes of the state without :attr:`counts`."""
        return sum(each.nbytes for each in vars(self).values() if isinstance(each, torch.Tensor))

    def prepare(self, ops: SamplingOps | None) -> None:
        """Allocate what some parts of sampling need."""
        if ops is not None and ops.repetition_penalty and self.counts is None:
            self.counts = TokenCounts(*self._shape, self.generated.device)

    def load(self, options: RowOptions, seen: torch.Tensor) -> None:
        """Set the state of all rows for a new batch.

        Args:
            seen: places of the tokens that a repetition penalty counts, see :class:`TokenCounts`.
        """
        self.first_position.fill_(options.first_position)
        self.generated.zero_()
        self.repetition_penalty.fill_(options.repetition_penalty)
        stops = [*options.stop_tokens, *[-1] * (MAX_STOP_TOKENS - len(options.stop_tokens))]
        self.stop_tokens.copy_(torch.tensor(stops, device="cpu"))
        self.min_new_tokens.fill_(options.min_new_tokens)
        self.pad.fill_(options.pad_token)
        if self.counts is not None:
            self.counts.seen.zero_()
            self.counts.add_seen(seen)

    def next_step(
        self, key: GraphKey, tensors: StepTensors, tokens: torch.Tensor, cache: PagedCache
    ) -> Step:
        """Return the step that computes the latest token of each row; the cache has one group."""
        n = key.shape.rows
        (block_table,) = tensors.block_tables
        positions, slots, context_len = begin_step(
            tensors.context_len,
            self.first_position[:n],
            block_table,
            block_size=cache.block_size,
        )
        return step_of(
            tensors,
            key.shape,
            token_ids=tokens[:n],
            positions=positions,
            slots=(slots,),
            context_len=context_len,
        )

    def sample(
        self,
        logits: torch.Tensor,
        context_len: torch.Tensor,
        tensors: StepTensors,
        sampled: torch.Tensor,
        ops: SamplingOps,
    ) -> None:
        """Sample the next token of the first rows, and end those that reached a stop token.

        Args:
            logits: ``[n, vocabulary]``.
            context_len: int32 ``[n]``, the tokens of each row that are in the cache now.
            tensors: the rows' step; its ``context_len`` is WRITTEN.
            sampled: int64 ``[2, rows]``. WRITTEN: tokens for the next step, tokens for the host.
        """
        n, generated = len(logits), self.generated[: len(logits)]
        more: dict[str, Any] = {"positions": generated} if ops.draws else {}
        seen = None
        if ops.suppress_stop_tokens:
            early = generated < self.min_new_tokens
            more["bias"] = stop_token_bias(self.stop_tokens[None], early, logits.shape[1])
        if ops.repetition_penalty:
            assert self.counts is not None
            seen = self.counts.seen[:n]
            more |= {"repetition_penalty": self.repetition_penalty[:n], "prompt_seen": seen}
        chosen = sample_rows(logits, tensors, ops, **more)
        end_step(
            chosen.tokens,
            chosen.status,
            context_len,
            self.stop_tokens,
            self.pad,
            tokens=sampled[0, :n],
            host_tokens=sampled[1, :n],
            context=tensors.context_len[:n],
            generated=generated,
            seen=seen,
        )
