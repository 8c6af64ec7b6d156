"""Block manager and scheduler against a cache in Python that knows what each slot must hold."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from block_books import check_books
from llmfast.engine.block_manager import FREED, BlockManager, match_prefix
from llmfast.engine.chunking import ChunkSizer
from llmfast.engine.policy import ChunkedPrefill, WholePrefill
from llmfast.engine.request import Sequence, SequenceStatus
from llmfast.engine.scheduler import Scheduler
from llmfast.errors import UserError


class Cache:
    """A cache that runs steps: a slot holds the tokens up to it, as keys and values do.

    Each cache group has slots of its own; ``windows`` are those of the groups.
    """

    def __init__(
        self,
        num_blocks=8,
        block_size=4,
        seqs=4,
        budget=8,
        caching=True,
        chunked=True,
        chunk_sizer=None,
        windows=(None,),
        windowed_blocks=None,
    ):
        counts = [num_blocks, *[windowed_blocks or num_blocks] * (len(windows) - 1)]
        self.groups = [
            BlockManager(count, block_size, window=window, caching=caching)
            for window, count in zip(windows, counts, strict=True)
        ]
        self.blocks = self.groups[0]
        self.budget, self.chunked = budget, chunked
        policy = ChunkedPrefill(budget, chunk_sizer) if chunked else WholePrefill(budget)
        self.scheduler = Scheduler(self.groups, policy, max_num_seqs=seqs)
        self.slots = {}

    def add(self, prompt, max_tokens=4, parent=None, priority=0):
        limit = len(prompt) + max_tokens
        sequence = Sequence(list(prompt), len(prompt), limit, parent, priority=priority)
        self.scheduler.add(sequence)
        return sequence

    def held(self, sequence, group):
        """The blocks that a sequence has in a group; those before them are freed."""
        first = self.groups[group].first_needed(sequence.confirmed)
        table = sequence.block_tables[group]
        assert table[:first] == [FREED] * first
        return table[first:]

    def check_books(self):
        for group, manager in enumerate(self.groups):
            check_books(manager, [self.held(s, group) for s in self.scheduler.running])
            if manager.window is None:
                continue
            for s in self.scheduler.running:
                window = -(-manager.window // manager.block_size) + 3
                ahead = len(s.block_tables[group]) - s.confirmed // manager.block_size
                assert len(self.held(s, group)) <= window + ahead

    def plan(self):
        """Schedule a step, and check everything about it."""
        size, slots = self.blocks.block_size, self.slots
        waiting = [s for _, s in self.scheduler._waiting if s.status != SequenceStatus.FINISHED]
        before = list(self.scheduler.running)
        left = bool(before or waiting)
        plan = self.scheduler.schedule()
        assert bool(plan.num_scheduled_tokens) == left
        self.check_books()
        budget, chunked = self.budget, self.chunked
        prompts = {
            s
            for s in plan.num_scheduled_tokens
            if s not in before or plan.num_scheduled_tokens[s] > 1
        }
        if not chunked and prompts:
            assert prompts == set(plan.num_scheduled_tokens)
            assert all(count == s.remaining for s, count in plan.num_scheduled_tokens.items())
        if chunked or len(prompts) != 1:
            assert sum(plan.num_scheduled_tokens.values()) <= budget
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        order = [(s.priority, s.arrival) for s in self.scheduler.running]
        assert order == sorted(order)
        stayed = [s for s in before if s.status == SequenceStatus.RUNNING]
        assert before[: len(stayed)] == stayed and (stayed or not before)
        for group, source, target in plan.block_copies:
            for offset in range(size):
                slots[group, target, offset] = slots.get((group, source, offset))
        for group, blocks in enumerate(self.groups):
            self.write(plan.num_scheduled_tokens, group, blocks)
            self.read(plan.num_scheduled_tokens, group, blocks)
        return plan

    def write(self, counts, group, blocks):
        """Write a step's tokens to blocks that nobody else has."""
        size, written = blocks.block_size, {}
        for sequence, count in counts.items():
            table = sequence.block_tables[group]
            assert sequence.status == SequenceStatus.RUNNING and 1 <= count <= sequence.remaining
            assert len(table) * size >= sequence.computed + count
            for place in range(sequence.computed, sequence.computed + count):
                block = table[place // size]
                assert written.setdefault(block, sequence) is sequence
                assert blocks._users[block] == 1 and blocks._content[block] is None
                self.slots[group, block, place % size] = tuple(sequence.tokens[: place + 1])

    def read(self, counts, group, blocks):
        """Read all that a step's queries attend to."""
        size = blocks.block_size
        for sequence, count in counts.items():
            behind = 0 if blocks.window is None else sequence.computed - blocks.window + 1
            for place in range(max(behind, 0), sequence.computed + count):
                block = sequence.block_tables[group][place // size]
                found = self.slots[group, block, place % size]
                assert found == tuple(sequence.tokens[: place + 1])

    def step(self, choose=lambda sequence: 0):
        """Run a step. Return the sequences that got a token."""
        chosen = []
        plan = self.plan()
        for sequence, count in plan.num_scheduled_tokens.items():
            self.scheduler.begin(sequence, count)
            self.scheduler.confirm(sequence, sequence.computed)
            if sequence.remaining == 0:
                sequence.tokens.append(choose(sequence))
                chosen.append(sequence)
                if len(sequence.tokens) == sequence.limit:
                    self.scheduler.finish(sequence)
        return chosen

    def counts(self, *sequences):
        """Run a step. Return how many tokens of each sequence were in it."""
        before = [s.computed for s in sequences]
        self.step()
        return [s.computed - b for s, b in zip(sequences, before, strict=True)]

    def run(self, *sequences):
        for step in range(10_000):
            if all(s.status == SequenceStatus.FINISHED for s in sequences):
                return step
            self.step()
        raise AssertionError("never ends")

    def check_empty(self):
        assert not self.scheduler.has_sequences
        for blocks in self.groups:
            assert blocks.num_free == blocks.num_blocks
            check_books(blocks, [])


class Machine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        caching=st.booleans(),
        chunked=st.booleans(),
        windows=st.sampled_from([(None,), (None, 1), (None, 3), (None, 6), (4,), (None, 5, 2)]),
        tight=st.booleans(),
    )
    def start(self, windows, tight, **sizes):
        if tight and sizes["chunked"] and len(windows) > 1:
            size = sizes["block_size"]
            most = sizes["seqs"] * (-(-windows[1] // size) + 3) + 2 * -(-sizes["budget"] // size)
            sizes["windowed_blocks"] = min(most, sizes["num_blocks"])
        self.cache = Cache(windows=windows, **sizes)
        self.sequences = []

    @property
    def alive(self):
        return [s for s in self.sequences if s.status != SequenceStatus.FINISHED]

    @rule(
        data=st.data(),
        own=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        max_tokens=st.integers(1, 12),
        n=st.sampled_from([1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, -1, 3]),
    )
    def arrive(self, data, own, max_tokens, n, priority):
        prompt = own
        if self.sequences and data.draw(st.booleans()):
            tokens = data.draw(st.sampled_from(self.sequences)).tokens
            prompt = tokens[: data.draw(st.integers(0, len(tokens)))] + own
        parent = None
        for _ in range(n):
            try:
                sequence = self.cache.add(prompt, max_tokens, parent, priority)
            except UserError:
                total = len(prompt) + max_tokens - 1
                assert total > self.cache.blocks.num_blocks * self.cache.blocks.block_size
                return
            parent = parent or sequence
            self.sequences.append(sequence)

    @rule(data=st.data(), steps=st.integers(1, 8))
    def run(self, data, steps):
        bits = data.draw(st.integers(0, 2**16))
        for step in range(steps):
            self.cache.step(lambda s, step=step: (bits >> (step + s.arrival) % 16) & 1)

    @rule()
    def a_step_that_raises(self):
        for sequence in self.cache.plan().num_scheduled_tokens:
            self.cache.scheduler.preempt(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), forget=st.booleans())
    def abort(self, data, forget):
        self.cache.scheduler.finish(data.draw(st.sampled_from(self.alive)), forget=forget)

    @invariant()
    def books_agree(self):
        if hasattr(self, "cache"):
            running = self.cache.scheduler.running
            self.cache.check_books()
            assert {id(s) for s in running} == {
                id(s) for s in self.alive if s.status == SequenceStatus.RUNNING
            }
            waiting = [s for s in self.alive if s not in running]
            assert not any(s.block_tables or s.computed for s in waiting)

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.run(*self.sequences)
            self.cache.check_empty()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# ------------------------------------------------------------------------------ block manager


def test_blocks_are_allocated_and_released():
    blocks = BlockManager(4, 16)
    assert [blocks.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    first = blocks.allocate(3)
    with pytest.raises(ValueError, match="wants 2 blocks, 1 are free"):
        blocks.allocate(2)
    blocks.release(first)
    assert blocks.num_free == 4
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(first)


def fill(blocks, tokens):
    """Return registered blocks that hold ``tokens``, and their digests."""
    digests = []
    blocks.extend_digests(digests, tokens)
    got = blocks.allocate(len(digests))
    for i, digest in enumerate(digests):
        blocks.register(got[i], digest, tokens[i * blocks.block_size :][: blocks.block_size])
    return got, digests


def test_a_prefix_is_found_block_by_block():
    blocks = BlockManager(8, 2)
    held, digests = fill(blocks, [1, 2, 3, 4, 5, 6])
    blocks.release(held)
    other = []
    blocks.extend_digests(other, [1, 2, 3, 4, 7, 7, 8])
    assert len(other) == 3 and other[:2] == digests[:2]
    assert blocks.match(other, [1, 2, 3, 4, 7, 7, 8]) == held[:2]
    assert blocks.match(digests[1:], [3, 4, 5, 6]) == held[1:]  # by digest alone, so of a chain
    moved = []
    blocks.extend_digests(moved, [3, 4])
    assert blocks.match(moved, [3, 4]) == []


def test_equal_digests_of_other_tokens_are_no_hit():
    blocks = BlockManager(2, 2)
    _, digests = fill(blocks, [1, 2])
    assert blocks.match(digests, [1, 3]) == []


def test_the_least_recently_used_block_goes_first_and_tails_before_heads():
    blocks = BlockManager(4, 1)
    old, old_digests = fill(blocks, [1, 2])
    new, new_digests = fill(blocks, [3, 4])
    blocks.release(old)
    blocks.release(new)
    blocks.allocate(1)
    assert blocks.match(old_digests, [1, 2]) == old[:1]
    blocks.share(old[:1])  # used again: now the youngest
    blocks.release(old[:1])
    blocks.allocate(2)
    assert blocks.match(new_digests, [3, 4]) == []
    assert blocks.match(old_digests, [1, 2]) == old[:1]


def test_what_is_held_twice_is_found_once_and_stays_found():
    blocks = BlockManager(4, 1)
    first, digests = fill(blocks, [1])
    second, _ = fill(blocks, [1])
    assert blocks.match(digests, [1]) == first
    blocks.release(second)
    blocks.release(first)
    assert blocks.match(digests, [1]) == first
    check_books(blocks, [])


def test_forgotten_blocks_are_not_found():
    blocks = BlockManager(4, 1)
    held, digests = fill(blocks, [1, 2])
    blocks.share(held[:1])
    blocks.release(held, forget=True)
    assert blocks.match(digests, [1, 2]) == []
    check_books(blocks, [held[:1]])


def test_a_fork_shares_full_blocks_and_copies_the_last():
    blocks = BlockManager(8, 4)
    table = blocks.allocate(3)
    twin, copy = blocks.fork(table, 10)
    assert twin[:2] == table[:2] and copy == (table[2], twin[2]) and twin[2] not in table
    even, copy = blocks.fork(table, 8)
    assert even == table[:2] and copy is None
    check_books(blocks, [table, twin, even])
    blocks.allocate(blocks.num_free)
    with pytest.raises(ValueError):
        blocks.fork(table, 10)
    assert blocks._users[table[0]] == 3


# ---------------------------------------------------------------------------------- scheduler


def test_decodes_run_first_then_begun_prompts_then_new_ones():
    cache = Cache(num_blocks=20, budget=8)
    old = cache.add([1] * 3)
    assert cache.counts(old) == [3]
    long = cache.add([2] * 12)
    short = cache.add([3] * 4)
    assert cache.counts(old, long, short) == [1, 7, 0]
    assert cache.counts(old, long, short) == [1, 5, 2]
    assert cache.counts(long, short) == [1, 2]


def chunks_of(cache, tokens):
    """Return the chunks of a prompt beside a decoding sequence."""
    old = cache.add([1] * 3, max_tokens=99)
    assert cache.counts(old) == [3]
    long = cache.add([2] * tokens)
    chunks = []
    while sum(chunks) < tokens:
        decoded, chunk = cache.counts(old, long)
        assert decoded == 1
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize(
    ("budget", "chunks"),
    [
        (580, [579, 511, 560]),  # the first and the last take what the tiles leave
        (560, [559, 511, 511, 69]),
        (1000, [999, 651]),
        (900, [899, 751]),
        (500, [499, 499, 499, 153]),  # tiles would leave out too much
    ],
)
def test_a_step_holds_whole_tiles_unless_a_prompt_begins_or_ends(budget, chunks):
    assert chunks_of(Cache(num_blocks=600, budget=budget), 1650) == chunks


def test_later_chunks_are_smaller_so_that_steps_take_equally_long():
    cache = Cache(num_blocks=2100, budget=2049, chunk_sizer=ChunkSizer(16384))
    chunks = chunks_of(cache, 8192)
    assert chunks == [2048, 1791, 1535, 1535, 1283]
    start, costs = 0, []
    for chunk in chunks:
        costs.append(sum(1 + (start + i) / 16384 for i in range(chunk)))
        start += chunk
    assert max(costs) <= costs[0] and min(costs[:-1]) > 0.85 * costs[0]


def test_a_chunk_is_never_a_small_part_of_a_step():
    chunks = chunks_of(Cache(num_blocks=600, budget=101, chunk_sizer=ChunkSizer(10)), 2000)
    assert chunks[0] == 100 and min(chunks[1:-1]) == 25


def test_what_a_prompt_s_end_leaves_goes_to_the_next():
    cache = Cache(num_blocks=600, budget=100, chunk_sizer=ChunkSizer(100))
    long, short = cache.add([1] * 130), cache.add([2] * 90)
    assert cache.counts(long, short) == [100, 0]
    assert cache.counts(long, short) == [30, 49]  # 30 take as long as 51 without a context


def test_without_chunks_prompts_run_whole_and_first():
    cache = Cache(num_blocks=40, budget=8, seqs=8, chunked=False)
    old = cache.add([1] * 3)
    assert cache.counts(old) == [3]
    first, second, long, last = (cache.add([2 + i] * n) for i, n in enumerate([5, 3, 20, 2]))
    assert cache.counts(old, first, second, long, last) == [0, 5, 3, 0, 0]
    assert cache.counts(old, first, second, long, last) == [0, 0, 0, 20, 0]  # on its own
    assert cache.counts(old, first, second, long, last) == [0, 0, 0, 0, 2]
    assert cache.counts(old, first, second, long, last) == [1] * 5
    assert cache.counts(old, first, second, long, last) == [1] * 5
    cache.run(old, first, second, long, last)
    cache.check_empty()


def test_without_chunks_what_counts_is_what_the_cache_lacks():
    cache = Cache(num_blocks=40, block_size=4, budget=8, chunked=False)
    cache.run(cache.add([1] * 17))
    new, known = cache.add([2] * 5), cache.add([1] * 16 + [5, 6])
    assert list(cache.plan().num_scheduled_tokens.items()) == [(new, 5), (known, 2)]


def test_without_chunks_decodes_run_while_a_prompt_finds_no_room():
    cache = Cache(num_blocks=4, block_size=2, budget=16, caching=False, chunked=False)
    old, young = cache.add([1] * 3, max_tokens=3), cache.add([2] * 4, max_tokens=1)
    assert [cache.step() for _ in range(4)] == [[old], [old], [old], [young]]
    cache.check_empty()


def test_no_more_than_max_num_seqs_run():
    cache = Cache(num_blocks=20, seqs=2, budget=30)
    sequences = [cache.add([i] * 3, max_tokens=2) for i in range(3)]
    assert cache.counts(*sequences) == [3, 3, 0]
    cache.step()
    assert cache.counts(sequences[2]) == [3]


def test_the_youngest_is_preempted_and_computed_again():
    cache = Cache(num_blocks=4, block_size=2, budget=16, caching=False)
    old, young = cache.add([1], max_tokens=7), cache.add([2], max_tokens=5)
    while not young.preemptions:
        assert cache.counts(old) == [1]  # it is never held up
    assert (old.status, young.status, young.computed) == (
        SequenceStatus.RUNNING,
        SequenceStatus.WAITING,
        0,
    )
    cache.run(old, young)
    assert young.preemptions == 1 and old.preemptions == 0
    assert len(old.tokens) == 8 and len(young.tokens) == 6
    cache.check_empty()


def test_lower_priorities_go_first_and_within_one_the_earlier():
    cache = Cache(num_blocks=40, seqs=1, budget=30)
    late, first, second, urgent = (
        cache.add([i] * 3, max_tokens=1, priority=p) for i, p in enumerate([5, 0, 0, -2])
    )
    for sequence in (urgent, first, second, late):
        assert cache.step() == [sequence]
    cache.check_empty()


def test_a_prompt_that_has_begun_goes_before_one_that_waits_whatever_its_priority():
    cache = Cache(num_blocks=40, budget=4)
    usual = cache.add([1] * 10)
    assert cache.counts(usual) == [4]
    urgent, other = cache.add([2] * 6, priority=-1), cache.add([3] * 2)
    assert cache.counts(usual, urgent, other) == [4, 0, 0]
    assert cache.counts(usual, urgent, other) == [2, 2, 0]
    assert cache.counts(usual, urgent, other) == [1, 3, 0]
    cache.run(urgent, usual, other)
    cache.check_empty()


def test_the_lowest_priority_is_preempted_before_the_youngest():
    cache = Cache(num_blocks=6, block_size=2, budget=16, caching=False)
    low = cache.add([1], max_tokens=7, priority=1)
    old, young = cache.add([2], max_tokens=7), cache.add([3], max_tokens=7)
    while not low.preemptions:
        assert cache.counts(old, young) == [1, 1]
    assert (old.preemptions, young.preemptions) == (0, 0)
    while not young.preemptions:
        cache.step()
    assert low.status == SequenceStatus.WAITING
    cache.run(low, old, young)
    assert old.preemptions == 0 and [len(s.tokens) for s in (low, old, young)] == [8] * 3
    cache.check_empty()


def test_requests_that_share_a_prefix_being_computed_wait_for_it():
    cache = Cache(num_blocks=40, block_size=4, budget=9, seqs=8)
    prefix = list(range(16))
    first = cache.add([*prefix, 50])
    others = [cache.add([*prefix, 51 + i]) for i in range(3)]
    stranger = cache.add([90] * 5)
    assert cache.counts(first, *others, stranger) == [9, 0, 0, 0, 0]
    # the first has its last 8 tokens, the stranger goes past those that wait
    assert cache.counts(first, *others, stranger) == [8, 0, 0, 0, 1]
    plan = cache.plan()
    assert [plan.num_scheduled_tokens[s] for s in (first, *others)] == [1, 1, 1, 1]
    assert [s.cached_tokens for s in others] == [16, 16, 16]


def test_when_who_computes_the_prefix_is_gone_another_does():
    cache = Cache(num_blocks=40, block_size=4, budget=4)
    first, second = cache.add([1] * 17), cache.add([1] * 17)
    assert cache.counts(first, second) == [4, 0]
    cache.scheduler.finish(first)
    assert cache.counts(second) == [4 + 4]  # one block was found
    cache.run(second)
    cache.check_empty()


def test_a_prompt_of_whole_blocks_computes_its_last_block_for_the_logits():
    cache = Cache(num_blocks=8, block_size=4)
    first = cache.add([1] * 8, max_tokens=1)
    cache.run(first)
    again = cache.add([1] * 8, max_tokens=1)
    assert cache.counts(again) == [0]  # 4 found, 4 computed, and it is finished
    assert again.cached_tokens == 4


def test_without_caching_nothing_is_found():
    cache = Cache(num_blocks=8, block_size=4, caching=False)
    cache.run(cache.add([1] * 8))
    again = cache.add([1] * 8)
    cache.run(again)
    assert again.cached_tokens == 0
    cache.check_empty()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_answers_to_one_prompt_share_it(length, caching):
    cache = Cache(num_blocks=20, block_size=4, budget=16, caching=caching)
    first = cache.add([1] * length)
    twins = [cache.add([1] * length, parent=first) for _ in range(2)]
    if length > 1:
        assert cache.counts(first, *twins) == [length, 0, 0]
    plan = cache.plan()
    assert [plan.num_scheduled_tokens[t] for t in twins] == [1, 1]
    assert len(plan.block_copies) == (0 if (length - 1) % 4 == 0 else 2)
    full = (length - 1) // 4
    (table,) = first.block_tables
    assert all(t.block_tables[0][:full] == table[:full] for t in twins)


def test_a_waiting_request_leaves_a_block_for_each_that_runs():
    cache = Cache(num_blocks=4, block_size=2, budget=16, caching=False)
    old = cache.add([1] * 3, max_tokens=6)
    young = cache.add([2] * 3, max_tokens=1)
    assert cache.counts(old, young) == [3, 0]  # all four blocks would be taken
    young = cache.add([3], max_tokens=1)
    cache.run(old, young)
    assert young.preemptions == 0


def test_answers_whose_first_is_gone_go_on_alone():
    cache = Cache(num_blocks=20, block_size=4, budget=4, caching=False)
    first = cache.add([1] * 9)
    twin = cache.add([1] * 9, parent=first)
    cache.step()
    cache.scheduler.finish(first)
    cache.run(twin)
    assert twin.cached_tokens == 0 and len(twin.tokens) == 13
    cache.check_empty()


def test_a_request_too_large_for_the_cache():
    cache = Cache(num_blocks=3, block_size=4)
    wanted = r"may reach 14 tokens, which take 4 blocks of 4; the cache has 3: lower max_tokens"
    with pytest.raises(UserError, match=wanted):
        cache.add([1] * 8, max_tokens=6)
    fits = cache.add([1] * 8, max_tokens=5)
    cache.run(fits)
    assert len(fits.tokens) == 13
    cache.check_empty()


def test_a_scored_prompt_has_as_many_rows_of_logits_as_sequences_may_run():
    """Each chunk gives one row for each token whose successor in the prompt is scored."""
    cache = Cache(num_blocks=40, seqs=3, budget=30)
    old, tokens = cache.add([1] * 3, max_tokens=9), list(range(10, 16))
    cache.step()
    scored = Sequence(tokens, len(tokens), len(tokens) + 4, scored=1)
    cache.scheduler.add(scored)
    chunks = []
    while scored.scores_prompt:
        step = cache.plan()
        count, rows = step.num_scheduled_tokens[scored], step.num_prompt_logits[scored]
        assert step.num_scheduled_tokens[old] == 1 and old not in step.num_prompt_logits
        assert rows + len(step.num_scheduled_tokens) - 1 <= 3
        for sequence, n in step.num_scheduled_tokens.items():
            cache.scheduler.begin(sequence, n)
            cache.scheduler.confirm(sequence, sequence.computed)
        old.tokens.append(0)
        scored.scored += rows
        chunks.append((count, rows))
    assert chunks == [(2, 2), (2, 2), (2, 1)]  # the last token of the prompt has no successor
    cache.scheduler.finish(scored)
    # what was scored before a preemption is computed again without its logits
    again = Sequence(tokens, len(tokens), len(tokens) + 4, scored=4)
    cache.scheduler.add(again)
    step = cache.plan()
    assert step.num_scheduled_tokens[again] == 3 and not step.num_prompt_logits


def test_ten_thousand_waiting_requests_cost_a_step_little():
    """A step looks at few of them, even if they share a prefix."""
    cache = Cache(num_blocks=100, block_size=4, seqs=4, budget=4)
    prefix = [1] * 40
    sequences = [cache.add([*prefix, i], max_tokens=1) for i in range(10_000)]
    looks = []
    awaits_prefix = cache.scheduler._awaits_prefix
    cache.scheduler._awaits_prefix = lambda s: looks.append(s) or awaits_prefix(s)
    for _ in range(20):
        cache.step()
    assert len(looks) <= 20 * 8
    for sequence in sequences[100:]:
        cache.scheduler.finish(sequence)
    cache.run(*sequences)
    cache.check_empty()
    assert not cache.scheduler._waiting


# ------------------------------------------------------------------------------- cache groups


def test_blocks_behind_the_window_are_freed_and_no_others():
    cache = Cache(num_blocks=40, block_size=4, budget=8, windows=(None, 6), windowed_blocks=9)
    long = cache.add([1] * 30, max_tokens=60)
    most = 0
    while long.status != SequenceStatus.FINISHED:
        cache.step()
        if long.block_tables:
            full, windowed = long.block_tables
            first = max(long.confirmed // 4 * 4 - 6 + 1, 0) // 4
            assert windowed[:first] == [FREED] * first and len(set(windowed[first:])) > 1
            assert len(full) - len(windowed) in (0, *range(1, 8)) and len(set(full)) == len(full)
            most = max(most, 9 - cache.groups[1].num_free)
    assert most <= 5 and long.preemptions == 0
    cache.check_empty()


def test_a_prefix_is_found_where_every_group_still_has_what_is_read():
    cache = Cache(num_blocks=40, block_size=4, budget=99, windows=(None, 6), windowed_blocks=12)
    cache.run(cache.add(range(40), max_tokens=1))
    again = cache.add([*range(24), 99], max_tokens=1)
    cache.run(again)
    assert again.cached_tokens == 24  # its last two blocks are still cached
    # another prompt evicts the blocks that were freed first: the windowed group keeps the latest
    cache.run(cache.add(range(100, 124), max_tokens=1))
    digests = []
    cache.blocks.extend_digests(digests, list(range(40)))
    full, windowed = match_prefix(cache.groups, digests, list(range(40)))
    length = len(full)
    held = [cache.groups[1].find(d, list(range(40)), i) for i, d in enumerate(digests)]
    assert None in held and len(cache.blocks.match(digests, list(range(40)))) == 10
    needed = {n: held[max(n * 4 - 5, 0) // 4 : n] for n in range(11)}
    assert length == max(n for n, blocks in needed.items() if None not in blocks)
    first = max(length * 4 - 5, 0) // 4
    assert windowed == [FREED] * first + held[first:length]


def test_a_group_of_windows_alone_frees_blocks_too():
    cache = Cache(num_blocks=20, block_size=4, budget=8, windows=(5,))
    long = cache.add([1] * 9, max_tokens=60)
    for _ in range(50):
        cache.step()
    assert 20 - cache.blocks.num_free <= 4
    cache.run(long)
    cache.check_empty()


def test_an_answer_whose_first_one_is_far_ahead_does_not_read_what_that_one_freed():
    cache = Cache(num_blocks=40, block_size=4, seqs=1, budget=16, windows=(None, 5))
    first = cache.add([1] * 9, max_tokens=20)
    twin = cache.add([1] * 9, max_tokens=20, parent=first)
    for _ in range(15):
        cache.step()
    cache.scheduler.max_num_seqs = 2
    cache.step()
    assert twin.status == SequenceStatus.RUNNING
    cache.run(first, twin)
    cache.check_empty()


def test_forgotten_answers_leave_nothing_that_was_freed_before():
    cache = Cache(num_blocks=40, block_size=4, budget=16, windows=(None, 5))
    first = cache.add(range(30))
    cache.step()
    cache.step()
    cache.scheduler.finish(first, forget=True)
    digests = []
    cache.blocks.extend_digests(digests, list(range(30)))
    for group in cache.groups:
        assert [group.find(d, list(range(30)), i) for i, d in enumerate(digests)] == [None] * 7
    cache.check_empty()


def test_a_windowed_group_that_is_full_preempts_the_last():
    cache = Cache(
        num_blocks=40, block_size=2, budget=6, caching=False, windows=(None, 8), windowed_blocks=8
    )
    old, young = cache.add([1] * 30, max_tokens=9), cache.add([2] * 30, max_tokens=9)
    cache.run(old, young)
    assert old.preemptions == 0
    cache.check_empty()
