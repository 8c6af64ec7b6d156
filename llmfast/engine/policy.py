"""Scheduling policies: the order of a step's phases, and the length of prompt chunks. No torch.

A policy decides about tokens; :mod:`.scheduler` keeps the queue and the blocks.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .chunking import ChunkSizer
from .scheduler_output import SchedulerOutput

_TILE = 256  # tokens of a GEMM tile: a step with a few more leaves SMs idle
_MIN_CHUNK_DIVISOR = 4  # no chunk is under a quarter of its room: each step reads all weights


class Chunk(NamedTuple):
    """Tokens of a prompt in a step, and the token budget that is left behind them."""

    tokens: int
    budget: int


class Phases(Protocol):
    """The phases of scheduling that a policy calls: :class:`.scheduler.Scheduler` has them."""

    def schedule_decodes(self, step: SchedulerOutput, budget: int) -> tuple[int, bool]:
        """Schedule decodes. Return the remaining budget and whether a sequence was preempted."""
        ...

    def schedule_chunks(self, step: SchedulerOutput, budget: int) -> int:
        """Schedule prompts that have begun. Return the remaining budget."""
        ...

    def schedule_new(self, step: SchedulerOutput, budget: int) -> None:
        """Admit waiting sequences while the cache and the budget have room."""
        ...


class SchedulingPolicy(Protocol):
    """The way in which prompts and decodes share steps; sequences keep their order."""

    def schedule(self, scheduler: Phases, step: SchedulerOutput) -> None:
        """Fill a step by calling the scheduler's phases in this policy's order."""
        ...

    def fits(self, tokens: int, step: SchedulerOutput, budget: int) -> bool:
        """Return whether ``tokens`` tokens of a prompt, or a chunk of them, may join the step."""
        ...

    def chunk(self, tokens: int, context: int, budget: int) -> Chunk:
        """Return how many of a prompt's remaining ``tokens`` the step computes.

        Args:
            tokens: remaining tokens of the prompt, at least 1; they fit.
            context: tokens of the prompt that are computed already.
            budget: tokens that the step has room for.
        """
        ...


class ChunkedPrefill:
    """Decodes first, then chunks of begun prompts, then new prompts (Sarathi-Serve).

    A later chunk takes as long as the first would. If the prompt goes on after it, the step holds
    whole tiles of 256 tokens, unless that leaves out more than an eighth.
    """

    def __init__(self, max_num_batched_tokens: int, chunk_sizer: ChunkSizer | None = None) -> None:
        """
        Args:
            max_num_batched_tokens: of a step.
            chunk_sizer: the cost of a token's context; None: it costs nothing.
        """
        self.max_num_batched_tokens = max_num_batched_tokens
        self.chunk_sizer = ChunkSizer() if chunk_sizer is None else chunk_sizer

    def schedule(self, scheduler: Phases, step: SchedulerOutput) -> None:
        """Decode, go on with prompts, admit. Nothing is admitted if a sequence was preempted."""
        budget, preempted = scheduler.schedule_decodes(step, self.max_num_batched_tokens)
        budget = scheduler.schedule_chunks(step, budget)
        if not preempted:
            scheduler.schedule_new(step, budget)

    def fits(self, tokens: int, step: SchedulerOutput, budget: int) -> bool:
        """Return whether there is room for a token."""
        return budget > 0

    def chunk(self, tokens: int, context: int, budget: int) -> Chunk:
        """Return all tokens if they cost no more than the budget, else a chunk that fills it."""
        sizer = self.chunk_sizer
        most = max(sizer.equal_cost_tokens(budget, 0, context), budget // _MIN_CHUNK_DIVISOR, 1)
        if tokens <= most:
            return Chunk(tokens, max(budget - sizer.equal_cost_tokens(tokens, context, 0), 0))
        if context:
            total = self.max_num_batched_tokens - budget + most
            rest = total % _TILE
            most -= rest if 8 * rest <= total and rest < most else 0
        return Chunk(most, 0)


class WholePrefill:
    """Whole prompts first: while one can run, steps hold prompts alone, and decodes wait.

    A prompt that is longer than ``max_num_batched_tokens`` has a step of its own.
    """

    def __init__(self, max_num_batched_tokens: int) -> None:
        """``max_num_batched_tokens``: of a step with several prompts."""
        self.max_num_batched_tokens = max_num_batched_tokens

    def schedule(self, scheduler: Phases, step: SchedulerOutput) -> None:
        """Go on with prompts that were preempted while decoding, admit, or else decode."""
        budget = self.max_num_batched_tokens
        scheduler.schedule_new(step, scheduler.schedule_chunks(step, budget))
        if not step.num_scheduled_tokens:
            scheduler.schedule_decodes(step, budget)

    def fits(self, tokens: int, step: SchedulerOutput, budget: int) -> bool:
        """Return whether the whole prompt fits, or the step is empty."""
        return tokens <= budget or not step.num_scheduled_tokens

    def chunk(self, tokens: int, context: int, budget: int) -> Chunk:
        """Return the whole prompt."""
        return Chunk(tokens, max(budget - tokens, 0))
