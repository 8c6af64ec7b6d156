"""The inputs of a step as the builder writes them, against the same written number by number."""

import functools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.engine.batch import BatchBuilder
from llmfast.engine.block_manager import FREED, BlockManager
from llmfast.engine.policy import ChunkedPrefill
from llmfast.engine.request import Answer, Sequence
from llmfast.engine.sampling_params import SamplingParams
from llmfast.engine.scheduler import Scheduler
from llmfast.engine.scheduler_output import SchedulerOutput
from llmfast.runner.inputs import GraphKey, SamplingOps, StepInputs, StepShape, views

ROWS, WIDTH, BLOCK, FIRST_ROW, GROUPS = 5, 6, 4, 100, 2


def write(shape, counts, answers, previous, scored, copies):
    """All that a step must hold, from the definition of each number."""
    rows_of_logits = ("logit_tokens", "seeds", "draws", "top_k")
    found = {
        "token_ids": np.zeros(shape.tokens, int),
        "source_row": np.full(shape.tokens, -1),
        "positions": np.zeros(shape.tokens, int),
        "query_start": np.zeros(shape.rows + 1, int),
        "context_len": np.zeros(shape.rows, int),
        "slots": [np.full(shape.tokens, -1) for _ in range(GROUPS)],
        "block_tables": [np.zeros((shape.rows, shape.width), int) for _ in range(GROUPS)],
        **{name: np.zeros(shape.logit_rows, int) for name in rows_of_logits},
        **{n: np.zeros(shape.logit_rows, np.float32) for n in ("temperature", "top_p", "min_p")},
        "block_copies": np.array(copies, int).reshape(-1, 3),
    }
    at, starts, ends = 0, {}, {}
    for row, (sequence, count) in enumerate(counts.items()):
        for table, own in zip(found["block_tables"], sequence.block_tables, strict=True):
            table[row, : len(own)] = own
        found["context_len"][row] = sequence.computed + count
        starts[sequence] = at
        for place in range(sequence.computed, sequence.computed + count):
            if place < len(sequence.tokens):
                found["token_ids"][at] = sequence.tokens[place]
            else:
                found["source_row"][at] = previous[sequence]
            found["positions"][at] = FIRST_ROW + place
            for slots, own in zip(found["slots"], sequence.block_tables, strict=True):
                slots[at] = own[place // BLOCK] * BLOCK + place % BLOCK
            at += 1
        found["query_start"][row + 1] = at
        ends[sequence] = at - 1
    for row in range(len(counts), shape.rows):
        at = min(at + 1, shape.tokens)
        found["query_start"][row + 1] = at
    for row, answer in enumerate(answers):
        params = answer.params
        found["logit_tokens"][row] = ends[answer.sequence]
        found["seeds"][row] = answer.seed
        found["draws"][row] = answer.num_output + answer.sequence.pending
        found["temperature"][row] = params.temperature
        found["top_k"][row] = min(max(params.top_k, 0), 2**31 - 1)
        found["top_p"][row] = params.top_p
        found["min_p"][row] = params.min_p
    row = len(answers)
    for sequence in counts:
        for i in range(scored.get(sequence, 0)):
            found["logit_tokens"][row] = starts[sequence] + i
            row += 1
    return found


PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, top_k=-1, top_p=0.9, min_p=0.1),
    SamplingParams(top_k=2**40),
]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_buffer_holds_the_step_whatever_was_in_the_one_before(data):
    draw = data.draw
    shape, asked = None, {}

    def new_step(**sizes):
        asked.update(sizes)
        key = GraphKey(shape, sizes["sampling"])
        return StepInputs(key, num_copies=sizes["num_copies"])

    builder = BatchBuilder(
        new_step,
        rows=ROWS,
        width=WIDTH,
        block_size=BLOCK,
        first_position=FIRST_ROW,
        groups=GROUPS,
    )
    alive = []
    for _ in range(draw(st.integers(1, 6))):
        kept = [answer for answer in alive if draw(st.integers(0, 3))]
        for answer in kept:  # blocks are appended, or others in another list
            sequence = answer.sequence
            for group in range(GROUPS):
                if draw(st.booleans()):
                    other = draw(st.lists(st.integers(0, 50), max_size=WIDTH))
                    sequence.block_tables[group] = other
            sequence.computed += draw(st.integers(0, 2))
        for seed in range(draw(st.integers(0 if kept else 1, ROWS - len(kept)))):
            tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))
            sequence = Sequence(tokens, len(tokens), 30, block_tables=[[], []])
            kept.append(Answer(0, sequence, draw(st.sampled_from(PARAMS)), -seed, frozenset()))
        alive, counts, previous = kept, {}, {}
        for row, answer in enumerate(alive):
            sequence = answer.sequence
            start, known = sequence.computed, len(sequence.tokens)
            if start >= known:
                sequence.tokens += [7] * (start - known)
                previous[sequence] = row
            sequence.pending = draw(st.integers(0, 1))
            counts[sequence] = max(1, draw(st.integers(1, 6 if start + 1 < known else 1)))
            counts[sequence] = min(counts[sequence], max(known - start, 1))
            stop = start + counts[sequence]
            for group, blocks in enumerate(sequence.block_tables):
                missing = -(-stop // BLOCK) - len(blocks)
                blocks += range(60 + 10 * group, 60 + 10 * group + max(0, missing))
        answers = [answer for answer in alive if draw(st.booleans())]
        total, longest = sum(counts.values()), max(len(t) for s in counts for t in s.block_tables)
        scored = {s: draw(st.integers(0, n)) for s, n in counts.items() if draw(st.booleans())}
        copy = st.tuples(st.integers(0, GROUPS - 1), st.integers(0, 9), st.integers(0, 9))
        copies = draw(st.lists(copy, max_size=3))
        num_logits = len(answers) + sum(scored.values())
        shape = StepShape(
            total + draw(st.integers(0, 3)),
            len(counts) + draw(st.integers(0, 2)),
            longest + draw(st.integers(0, max(0, WIDTH - longest))),
            num_logits + draw(st.integers(0, 2)),
            groups=GROUPS,
        )
        plan = SchedulerOutput(counts, copies)
        inputs = builder.build(plan, answers, previous, scored, SamplingOps())
        for name, expected in write(shape, counts, answers, previous, scored, copies).items():
            found = getattr(views(inputs.buffer, inputs.shape), name)
            pairs = [(found, expected)]
            if isinstance(found, tuple):
                pairs = list(zip(found, expected, strict=True))
            for tensor, numbers in pairs:
                array = tensor.numpy()
                assert np.array_equal(array, numbers.astype(array.dtype)), name
        assert (asked["num_tokens"], asked["num_rows"]) == (total, len(counts))
        assert asked["num_logits"] == num_logits and asked["num_sampled"] == len(answers)
        assert asked["max_query_len"] == max(counts.values())
        assert asked["num_prompts"] == sum(n > 1 for n in counts.values())
        assert asked["max_context_len"] == max(s.computed + n for s, n in counts.items())


def exact(groups=1, **sizes):
    sequences, logits = sizes["num_rows"], sizes["num_logits"]
    shape = StepShape(sizes["num_tokens"], sequences, WIDTH, logits, groups=groups)
    return StepInputs(GraphKey(shape, sizes["sampling"]))


def test_parameters_are_looked_up_once_for_the_same_answers():
    looks = []

    class Params:
        """Sampling parameters that count how often they are read."""

        def __getattr__(self, name):
            looks.append(name)
            return getattr(PARAMS[1], name)

    builder = BatchBuilder(exact, rows=2, width=WIDTH, block_size=BLOCK, first_position=0)
    sequence = Sequence([1, 2, 3], 3, 30, block_tables=[[0]])
    answers = [Answer(0, sequence, Params(), 5, frozenset())]
    plan = SchedulerOutput({sequence: 3})
    builder.build(plan, answers, {}, {}, SamplingOps())
    once = len(looks)
    assert once
    builder.build(plan, list(answers), {}, {}, SamplingOps())
    assert len(looks) == once
    builder.build(plan, [], {}, {}, SamplingOps())
    builder.build(plan, answers, {}, {}, SamplingOps())
    assert len(looks) == 2 * once


def test_a_list_of_blocks_that_shrinks_is_written_again():
    builder = BatchBuilder(exact, rows=2, width=WIDTH, block_size=BLOCK, first_position=0)
    sequence = Sequence([1, 2, 3], 3, 30, block_tables=[[7, 8, 9]])
    plan = SchedulerOutput({sequence: 3})
    builder.build(plan, [], {}, {}, None)
    sequence.block_tables[0][:] = [5]
    inputs = builder.build(plan, [], {}, {}, None)
    (table,) = inputs.group_arrays["block_tables"]
    assert table[0].tolist() == [5, *[0] * (WIDTH - 1)]


def test_freed_blocks_leave_the_table_they_were_in():
    groups = [BlockManager(9, BLOCK), BlockManager(9, BLOCK, window=3)]
    scheduler = Scheduler(groups, ChunkedPrefill(99), max_num_seqs=1)
    new_step = functools.partial(exact, groups=2)
    builder = BatchBuilder(
        new_step, rows=1, width=WIDTH, block_size=BLOCK, first_position=0, groups=2
    )
    sequence = Sequence(list(range(11)), 11, 30)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    builder.build(plan, [], {}, {}, None)
    scheduler.begin(sequence, 11)
    scheduler.confirm(sequence, 11)
    sequence.tokens.append(11)
    full, windowed = sequence.block_tables
    assert len(full) == 3 and windowed[0] == FREED and groups[1].num_free == 9 - 2
    inputs = builder.build(scheduler.schedule(), [], {}, {}, None)
    tables = inputs.group_arrays["block_tables"]
    assert [table[0].tolist() for table in tables] == [
        [*blocks, *[0] * (WIDTH - 3)] for blocks in (full, windowed)
    ]
