"""What runs in the next step: by priority, then first come, first served, within a budget.

A sequence is a list of tokens, of which the first ``computed`` have their keys and values in the
cache. A step computes some more of them: one for a sequence that decodes, a chunk of a prompt, or
all that a preemption threw away. When a step has computed the last, a token can be sampled. So
prefill, chunks, decoding and recomputation are one thing. No torch.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass, field

from ..errors import UserError
from .block_manager import BlockManager
from .chunking import ChunkSizer
from .request import Sequence, SequenceStatus

_TILE = 256  # tokens: a step of others leaves multiprocessors waiting for a few
_LEAST = 4  # no chunk is a smaller part of what there is room for: each step reads all weights


@dataclass
class SchedulerOutput:
    """One step."""

    # tokens to compute of each sequence
    num_scheduled_tokens: dict[Sequence, int] = field(default_factory=dict)
    # blocks to copy before the step: (source, target)
    block_copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """Decodes run first, then prompts that have begun, then those that wait.

    A waiting sequence is admitted when the cache has room for all its tokens and one more block
    for each running sequence. When a sequence that decodes finds no block, the last in order gives
    up its blocks and waits again; the first never does, so work always gets done. The order is that
    of priorities, lower ones first, then of arrival. Nobody is preempted for one that waits.

    Without chunks it is the other way round: while a prompt can run, steps hold whole prompts and
    nothing else, and decodes wait.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunked: bool = True,
        chunk_sizer: ChunkSizer | None = None,
    ) -> None:
        """
        Args:
            max_num_seqs: sequences that run at the same time at most.
            max_num_batched_tokens: tokens of a step at most. A prompt goes on by as many as take
                as long as its first would; then, if it does not end, the step holds whole tiles of
                256 where that leaves out an eighth at most.
            chunked: prompts may be split, and run beside decodes. Otherwise one that is longer
                than max_num_batched_tokens has a step of its own.
            chunk_sizer: how much longer tokens with a context take; None: no longer.
        """
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.chunked = chunked
        self.chunk_sizer = ChunkSizer() if chunk_sizer is None else chunk_sizer
        self.running: list[Sequence] = []  # in order
        # a heap; those that finished are skipped
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._arrivals = 0
        # digests of prompt blocks that a running sequence will have computed before long
        self._computing: dict[bytes, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            UserError: it may get longer than the whole cache.
        """
        wanted = self.blocks.blocks_for(sequence.limit - 1)  # the last token is never computed
        if wanted > self.blocks.num_blocks:
            size = self.blocks.block_size
            raise UserError(
                f"the request may reach {sequence.limit} tokens, which take {wanted} blocks of "
                f"{size}; the cache has {self.blocks.num_blocks}: lower max_tokens, or give the "
                "cache more memory"
            )
        sequence.arrival = self._arrivals
        self._arrivals += 1
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def schedule(self) -> SchedulerOutput:
        """Choose the next step. The caller starts it and calls :meth:`begin` for each sequence.

        When the step has run it calls :meth:`confirm`; it may schedule the next one before. The
        plan is empty only if nothing is left to do, or all that runs waits for its last token.
        """
        plan = SchedulerOutput()
        budget = self.max_num_batched_tokens
        if not self.chunked:
            self._admit(plan, self._continue(plan, budget))
            if plan.num_scheduled_tokens:
                return plan
        budget, preempted = self._decode(plan, budget)
        if self.chunked:
            budget = self._continue(plan, budget)
            if not preempted:
                self._admit(plan, budget)
        return plan

    def _decode(self, plan: SchedulerOutput, budget: int) -> tuple[int, bool]:
        """Plan those that decode; what is left of the budget, and whether one was preempted."""
        preempted = False
        for sequence in list(self.running):
            if not budget:
                break
            total = sequence.total
            if total - sequence.computed != 1 or sequence.status != SequenceStatus.RUNNING:
                continue
            if total >= sequence.limit:  # its last token, which is never computed
                continue
            while sequence.status == SequenceStatus.RUNNING and not self._grow(sequence):
                self.preempt(self.running[-1])  # not before this one, so not in the plan yet
                preempted = True
            if sequence.status == SequenceStatus.RUNNING:
                plan.num_scheduled_tokens[sequence] = 1
                budget -= 1
        return budget, preempted

    def _continue(self, plan: SchedulerOutput, budget: int) -> int:
        """Plan prompts that have begun; what is left of the budget."""
        for sequence in self.running:
            if sequence.remaining > 1 and self._fits(sequence.remaining, plan, budget):
                budget = self._plan(sequence, plan, budget)
        return budget

    def _fits(self, count: int, plan: SchedulerOutput, budget: int) -> bool:
        """Whether so many tokens of a prompt, or a chunk of them, may be in the step."""
        return budget > 0 if self.chunked else count <= budget or not plan.num_scheduled_tokens

    def _plan(self, sequence: Sequence, plan: SchedulerOutput, budget: int) -> int:
        """Plan a prompt, or a chunk of it; what is left of the budget."""
        known, remaining = sequence.computed, sequence.remaining
        if not self.chunked:
            plan.num_scheduled_tokens[sequence] = remaining
            return max(budget - remaining, 0)
        most = max(self.chunk_sizer.equal_cost_tokens(budget, 0, known), budget // _LEAST, 1)
        if remaining <= most:
            plan.num_scheduled_tokens[sequence] = remaining
            return max(budget - self.chunk_sizer.equal_cost_tokens(remaining, known, 0), 0)
        if known:
            total = self.max_num_batched_tokens - budget + most
            rest = total % _TILE
            most -= rest if 8 * rest <= total and rest < most else 0
        plan.num_scheduled_tokens[sequence] = most
        return 0

    def begin(self, sequence: Sequence, count: int) -> None:
        """A step that computes ``count`` more of its tokens is on its way."""
        sequence.computed += count

    def confirm(self, sequence: Sequence, computed: int) -> None:
        """The keys and values of its first ``computed`` tokens are in the cache, and all known."""
        size = self.blocks.block_size
        first, end = sequence.confirmed // size, computed // size
        sequence.confirmed = computed
        if first == end or not self.blocks.caching:
            return
        self.blocks.extend_digests(sequence.digests, sequence.tokens)
        for i in range(first, end):
            digest = sequence.digests[i]
            own = sequence.tokens[i * size : (i + 1) * size]
            self.blocks.register(sequence.blocks[i], digest, own)
            if self._computing.get(digest) is sequence:
                del self._computing[digest]

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits, in its old place, and is computed again."""
        self._stop(sequence, forget=False)
        sequence.status = SequenceStatus.WAITING
        sequence.preemptions += 1
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Let a sequence go, wherever it is.

        Args:
            forget: its blocks must not be found as a prefix: they may hold NaN.
        """
        if sequence.status == SequenceStatus.RUNNING:
            self._stop(sequence, forget=forget)
        sequence.status = SequenceStatus.FINISHED
        while self._waiting and self._waiting[0][1].status == SequenceStatus.FINISHED:
            heapq.heappop(self._waiting)

    def _stop(self, sequence: Sequence, *, forget: bool) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks, forget=forget)
        sequence.blocks = []
        sequence.computed = sequence.confirmed = sequence.pending = 0
        for digest in sequence.digests:
            if self._computing.get(digest) is sequence:
                del self._computing[digest]

    def _grow(self, sequence: Sequence) -> bool:
        """Give it the block that its next token goes to, if there is one."""
        if sequence.computed < len(sequence.blocks) * self.blocks.block_size:
            return True
        if not self.blocks.num_free:
            return False
        sequence.blocks += self.blocks.allocate(1)
        return True

    # ---------------------------------------------------------------------------- admission

    def _admit(self, plan: SchedulerOutput, budget: int) -> None:
        # whose prefix is being computed: those behind may go first
        later: list[tuple[tuple[int, int], Sequence]] = []
        while self._waiting and budget and len(self.running) < self.max_num_seqs:
            if len(later) == self.max_num_seqs:  # so that a step does not look at thousands
                break
            entry = heapq.heappop(self._waiting)
            sequence = entry[1]
            if sequence.status == SequenceStatus.FINISHED:
                continue
            if self._must_wait(sequence):
                later.append(entry)
                continue
            if not self._place(sequence, plan, budget):
                later.append(entry)
                break
            sequence.status = SequenceStatus.RUNNING
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            budget = self._plan(sequence, plan, budget)
        for entry in later:
            heapq.heappush(self._waiting, entry)

    def _must_wait(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing what this one would compute too."""
        parent = sequence.parent
        if parent is not None and parent.status == SequenceStatus.RUNNING:
            return parent.computed < sequence.shared
        if not self.blocks.caching or sequence.awaits in self._computing:
            return sequence.awaits in self._computing
        self.blocks.extend_digests(sequence.digests, sequence.tokens)
        digests = self._usable_digests(sequence)
        known = len(self.blocks.match(digests, sequence.tokens))
        end = known
        while end < len(digests) and digests[end] in self._computing:
            end += 1
        sequence.awaits = digests[end - 1] if end > known else None
        return end > known

    def _place(self, sequence: Sequence, plan: SchedulerOutput, budget: int) -> bool:
        """Give it blocks for all its tokens, those of a known prefix shared; False: no room.

        Without chunks it must also fit in the step.
        """
        blocks = self.blocks
        total = blocks.blocks_for(len(sequence.tokens))
        spare = len(self.running)
        parent = sequence.parent
        if parent is not None and parent.status == SequenceStatus.RUNNING:
            full = sequence.shared // blocks.block_size
            if not self._fits(len(sequence.tokens) - sequence.shared, plan, budget):
                return False
            if blocks.num_free < total - full + spare:
                return False
            sequence.blocks, copy = blocks.fork(parent.blocks, sequence.shared)
            if copy is not None:
                plan.block_copies.append(copy)
            known = sequence.shared
        else:
            hits = blocks.match(self._usable_digests(sequence), sequence.tokens)
            known = len(hits) * blocks.block_size
            if not self._fits(len(sequence.tokens) - known, plan, budget):
                return False
            if blocks.num_free < total - len(hits) + blocks.idle_among(hits) + spare:
                return False
            blocks.share(hits)
            sequence.blocks = hits
        sequence.blocks += blocks.allocate(total - len(sequence.blocks))
        sequence.computed = sequence.confirmed = known
        if sequence.cached_tokens is None:
            sequence.cached_tokens = known
        for digest in sequence.digests[known // blocks.block_size :]:
            self._computing.setdefault(digest, sequence)
        return True

    def _usable_digests(self, sequence: Sequence) -> list[bytes]:
        """Of the blocks that may be shared: what logits are wanted of is computed anew."""
        if sequence.scores_prompt:
            return []
        return sequence.digests[: (len(sequence.tokens) - 1) // self.blocks.block_size]
