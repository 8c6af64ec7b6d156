"""The scheduler: sequences run by priority, then arrival, within a token budget per step.

A sequence is a list of tokens, of which the first ``computed`` have their keys and values in the
cache. A step computes some more of them: one for a sequence that decodes, a chunk of a prompt, or
all tokens after a preemption. When a step has computed the last, a token can be sampled. Prefill,
chunks, decoding and recomputation are this one rule. No torch.
"""

from __future__ import annotations

import bisect
import heapq
from collections import abc

from ..errors import UserError
from .block_manager import FREED, BlockManager, match_prefix
from .policy import SchedulingPolicy
from .request import Sequence, SequenceStatus
from .scheduler_output import SchedulerOutput


class Scheduler:
    """Chooses the sequences and tokens of each step, and gives sequences their blocks.

    A waiting sequence is admitted when the cache has room for all its tokens and one more block
    for each running sequence. When a decoding sequence finds no block, the last in order is
    preempted: it loses its blocks and waits again. The first never is, so work always gets done.
    The order is that of priorities, lower ones first, then of arrival. No sequence is preempted for
    one that waits.

    Each cache group has a block table for each sequence. A prompt's table of the first group has
    blocks for all its tokens from the beginning, those of other groups for the tokens that are
    scheduled. Blocks that a sliding window has left behind are freed when a step has run.
    """

    def __init__(
        self,
        groups: abc.Sequence[BlockManager],
        policy: SchedulingPolicy,
        *,
        max_num_seqs: int,
    ) -> None:
        """
        Args:
            groups: the blocks of each cache group, that of full attention first.
            policy: how decodes and prompts share steps.
            max_num_seqs: sequences that run at the same time, at most.
        """
        self.groups = list(groups)
        self.blocks = self.groups[0]
        self._windowed = [i for i, group in enumerate(groups) if group.window is not None]
        self.policy = policy
        self.max_num_seqs = max_num_seqs
        self.running: list[Sequence] = []  # in order
        # a heap; finished sequences are skipped
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._arrivals = 0
        # digests of prompt blocks that a running sequence will have computed before long
        self._computing: dict[bytes, Sequence] = {}

    @property
    def has_waiting(self) -> bool:
        """True if a sequence waits for admission."""
        return bool(self._waiting)

    @property
    def has_sequences(self) -> bool:
        """True if anything is kept of a sequence that runs or waits."""
        return bool(self.running or self._waiting or self._computing)

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
        """Choose the next step. The caller launches it and calls :meth:`begin` for each sequence.

        When the step has run it calls :meth:`confirm`; it may schedule the next one before. The
        step is empty only if no work is left, or all running sequences wait for their last token.
        """
        step = SchedulerOutput()
        self.policy.schedule(self, step)
        self._limit_logits(step)
        return step

    def begin(self, sequence: Sequence, count: int) -> None:
        """Note that a step was launched that computes ``count`` more tokens of a sequence."""
        sequence.computed += count

    def confirm(self, sequence: Sequence, computed: int) -> None:
        """Note that a sequence's first ``computed`` tokens are in the cache and known."""
        size = self.blocks.block_size
        first, end = sequence.confirmed // size, computed // size
        before, sequence.confirmed = sequence.confirmed, computed
        if first == end:
            return
        if self.blocks.caching:
            self._register(sequence, first, end)
        for group in self._windowed:
            self._free_behind_window(sequence, group, before)

    def preempt(self, sequence: Sequence) -> None:
        """Free a running sequence's blocks. It waits in its old place, and is recomputed."""
        self._stop(sequence, forget=False)
        sequence.status = SequenceStatus.WAITING
        sequence.preemptions += 1
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Remove a sequence, whether it runs or waits.

        Args:
            forget: its blocks must not be found as a prefix: they may hold NaN.
        """
        if sequence.status == SequenceStatus.RUNNING:
            self._stop(sequence, forget=forget)
        sequence.status = SequenceStatus.FINISHED
        while self._waiting and self._waiting[0][1].status == SequenceStatus.FINISHED:
            heapq.heappop(self._waiting)

    # -------------------------------------------------------------------------- three phases

    def schedule_decodes(self, step: SchedulerOutput, budget: int) -> tuple[int, bool]:
        """Schedule one token for each decoding sequence, preempting the last in order if needed.

        Returns:
            The remaining budget, and whether a sequence was preempted.
        """
        preempted = False
        for sequence in list(self.running):
            if not budget:
                break
            total = sequence.total
            if total - sequence.computed != 1 or sequence.status != SequenceStatus.RUNNING:
                continue
            if total >= sequence.limit:  # its last token, which is never computed
                continue
            while sequence.status == SequenceStatus.RUNNING and not self._grow(sequence, 1):
                self.preempt(self.running[-1])  # later in order, so not in the step yet
                preempted = True
            if sequence.status == SequenceStatus.RUNNING:
                step.num_scheduled_tokens[sequence] = 1
                budget -= 1
        return budget, preempted

    def schedule_chunks(self, step: SchedulerOutput, budget: int) -> int:
        """Schedule prompts that have begun. Return the remaining budget."""
        for sequence in list(self.running):
            if sequence.status != SequenceStatus.RUNNING:
                continue
            if sequence.remaining > 1 and self.policy.fits(sequence.remaining, step, budget):
                budget = self._schedule_prompt(sequence, step, budget)
        return budget

    def schedule_new(self, step: SchedulerOutput, budget: int) -> None:
        """Admit waiting sequences while the cache and the budget have room.

        A sequence whose prefix is being computed waits for it; those behind it may go first.
        """
        later: list[tuple[tuple[int, int], Sequence]] = []
        while self._waiting and budget and len(self.running) < self.max_num_seqs:
            if len(later) == self.max_num_seqs:  # so that a step does not look at thousands
                break
            entry = heapq.heappop(self._waiting)
            sequence = entry[1]
            if sequence.status == SequenceStatus.FINISHED:
                continue
            if self._awaits_prefix(sequence):
                later.append(entry)
                continue
            if not self._place(sequence, step, budget):
                later.append(entry)
                break
            sequence.status = SequenceStatus.RUNNING
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            budget = self._schedule_prompt(sequence, step, budget)
        for entry in later:
            heapq.heappush(self._waiting, entry)

    # ------------------------------------------------------------------------------- inside

    def _schedule_prompt(self, sequence: Sequence, step: SchedulerOutput, budget: int) -> int:
        """Schedule a prompt or a chunk of it. Return the remaining budget.

        The last in order are preempted while a sliding-window group has no room: seldom, since the
        first group, which has no fewer blocks, had room for the whole prompt.
        """
        chunk = self.policy.chunk(sequence.remaining, sequence.computed, budget)
        while not self._grow(sequence, chunk.tokens):
            last = self.running[-1]
            step.num_scheduled_tokens.pop(last, None)
            self.preempt(last)
            if last is sequence:
                return budget
        step.num_scheduled_tokens[sequence] = chunk.tokens
        return chunk.budget

    def _limit_logits(self, step: SchedulerOutput) -> None:
        """Shorten chunks of scored prompts so that a step has at most max_num_seqs rows of logits.

        Each sequence has one row; each further one is of a prompt token whose successor is scored.
        """
        counts = step.num_scheduled_tokens
        spare = self.max_num_seqs - len(counts)
        for sequence, count in counts.items():
            if not sequence.scores_prompt:
                continue
            assert sequence.scored is not None
            known = sequence.scored - 1 - sequence.computed  # scored before it was preempted
            if known > 0:
                counts[sequence] = min(count, known)
                continue
            count = min(count, 1 + spare)
            spare -= count - 1
            counts[sequence] = count
            last = sequence.prompt_len - 1  # has no successor in the prompt
            step.num_prompt_logits[sequence] = min(count, last - sequence.computed)

    def _stop(self, sequence: Sequence, *, forget: bool) -> None:
        self.running.remove(sequence)
        for group, blocks in zip(self.groups, sequence.block_tables, strict=True):
            group.release(blocks[group.first_needed(sequence.confirmed) :], forget=forget)
            if forget and group.window is not None:
                group.forget(sequence.digests)  # also of blocks that were freed before
        sequence.block_tables = []
        sequence.computed = sequence.confirmed = sequence.pending = 0
        for digest in sequence.digests:
            if self._computing.get(digest) is sequence:
                del self._computing[digest]

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a sequence the blocks of its next tokens. Return False if too few are free."""
        end = sequence.computed + tokens
        if end <= len(sequence.block_tables[-1]) * self.blocks.block_size:  # the shortest
            return True
        wanted = self.blocks.blocks_for(end)
        for group, blocks in zip(self.groups, sequence.block_tables, strict=True):
            missing = max(wanted - len(blocks), 0)
            if missing > group.num_free:
                return False
            blocks += group.allocate(missing)
        return True

    def _register(self, sequence: Sequence, first: int, end: int) -> None:
        """Offer blocks ``first`` to ``end`` of a sequence as a prefix."""
        size = self.blocks.block_size
        self.blocks.extend_digests(sequence.digests, sequence.tokens)
        for i in range(first, end):
            digest = sequence.digests[i]
            own = sequence.tokens[i * size : (i + 1) * size]
            for group, blocks in zip(self.groups, sequence.block_tables, strict=True):
                group.register(blocks[i], digest, own)
            if self._computing.get(digest) is sequence:
                del self._computing[digest]

    def _free_behind_window(self, sequence: Sequence, group: int, before: int) -> None:
        """Free the blocks of a group that no token still to be computed attends to.

        Tokens of launched steps do not count: they run before whatever is written to the blocks.

        Args:
            before: tokens that were confirmed when blocks were last freed.
        """
        manager, blocks = self.groups[group], sequence.block_tables[group]
        first, end = manager.first_needed(before), manager.first_needed(sequence.confirmed)
        if first < end:
            manager.release(blocks[first:end])
            sequence.block_tables[group] = [FREED] * end + blocks[end:]

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Return whether a running sequence is computing a prefix that this one lacks."""
        parent = sequence.parent
        if parent is not None and parent.status == SequenceStatus.RUNNING:
            return parent.computed < sequence.shared
        if not self.blocks.caching or sequence.awaits in self._computing:
            return sequence.awaits in self._computing
        self.blocks.extend_digests(sequence.digests, sequence.tokens)
        digests = self._reusable_digests(sequence)
        known = len(match_prefix(self.groups, digests, sequence.tokens)[0])
        end = known
        while end < len(digests) and digests[end] in self._computing:
            end += 1
        sequence.awaits = digests[end - 1] if end > known else None
        return end > known

    def _place(self, sequence: Sequence, step: SchedulerOutput, budget: int) -> bool:
        """Give a sequence its blocks, sharing those of a known prefix.

        Returns:
            False if the cache or, by the policy, the step has no room; nothing is taken then.
        """
        size, total = self.blocks.block_size, len(sequence.tokens)
        parent = self._fork_source(sequence)
        if parent is not None:
            known, tables = sequence.shared, parent.block_tables
        else:
            if self.blocks.caching:
                self.blocks.extend_digests(sequence.digests, sequence.tokens)
            tables = match_prefix(self.groups, self._reusable_digests(sequence), sequence.tokens)
            known = len(tables[0]) * size
        if not self.policy.fits(total - known, step, budget):
            return False
        scheduled = known + self.policy.chunk(total - known, known, budget).tokens
        wanted = [self.blocks.blocks_for(total)]
        wanted += [self.blocks.blocks_for(scheduled)] * (len(self.groups) - 1)
        shared = [
            blocks[group.first_needed(known) : known // size]
            for group, blocks in zip(self.groups, tables, strict=True)
        ]
        for group, blocks, count in zip(self.groups, shared, wanted, strict=True):
            taken = count - known // size + group.idle_among(blocks)
            if group.num_free < taken + len(self.running):
                return False
        sequence.block_tables = []
        for i, group in enumerate(self.groups):
            if parent is not None:
                own, copy = group.fork(tables[i], known)
                if copy is not None:
                    step.block_copies.append((i, *copy))
            else:
                own = tables[i]
                group.share(shared[i])
            sequence.block_tables.append(own + group.allocate(wanted[i] - len(own)))
        sequence.computed = sequence.confirmed = known
        if sequence.cached_tokens is None:
            sequence.cached_tokens = known
        for digest in sequence.digests[known // size :]:
            self._computing.setdefault(digest, sequence)
        return True

    def _fork_source(self, sequence: Sequence) -> Sequence | None:
        """Return the sequence with the same prompt whose blocks can be shared; None: no such."""
        parent = sequence.parent
        if parent is None or parent.status != SequenceStatus.RUNNING:
            return None
        for group in self.groups:  # one that is far ahead has freed blocks that this one needs
            if group.first_needed(parent.confirmed) > group.first_needed(sequence.shared):
                return None
        return parent

    def _reusable_digests(self, sequence: Sequence) -> list[bytes]:
        """Return the digests of the reusable prefix blocks.

        Tokens whose logits are needed are always recomputed.
        """
        if sequence.scores_prompt:
            return []
        return sequence.digests[: (len(sequence.tokens) - 1) // self.blocks.block_size]
