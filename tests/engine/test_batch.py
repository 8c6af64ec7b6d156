"""The inputs of a step as the builder writes them, against the same written number by number."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.engine.batch import BatchBuilder
from llmfast.engine.request import Answer, Sequence
from llmfast.engine.sampling_params import SamplingParams
from llmfast.engine.scheduler_output import SchedulerOutput
from llmfast.runner.inputs import GraphKey, SamplingOps, StepInputs, StepShape, views

ROWS, WIDTH, BLOCK, FIRST_ROW = 5, 6, 4, 100


def write(shape, counts, answers, previous, scored, copies):
    """All that a step must hold, from the definition of each number."""
    rows_of_logits = ("logit_tokens", "seeds", "draws", "top_k")
    found = {
        "token_ids": np.zeros(shape.tokens, int),
        "source_row": np.full(shape.tokens, -1),
        "positions": np.zeros(shape.tokens, int),
        "slots": np.full(shape.tokens, -1),
        "query_start": np.zeros(shape.rows + 1, int),
        "context_len": np.zeros(shape.rows, int),
        "block_table": np.zeros((shape.rows, shape.width), int),
        **{name: np.zeros(shape.logit_rows, int) for name in rows_of_logits},
        **{n: np.zeros(shape.logit_rows, np.float32) for n in ("temperature", "top_p", "min_p")},
        "block_copies": np.array(copies, int).reshape(-1, 2),
    }
    at, starts, ends = 0, {}, {}
    for row, (sequence, count) in enumerate(counts.items()):
        found["block_table"][row, : len(sequence.blocks)] = sequence.blocks
        found["context_len"][row] = sequence.computed + count
        starts[sequence] = at
        for place in range(sequence.computed, sequence.computed + count):
            if place < len(sequence.tokens):
                found["token_ids"][at] = sequence.tokens[place]
            else:
                found["source_row"][at] = previous[sequence]
            found["positions"][at] = FIRST_ROW + place
            found["slots"][at] = sequence.blocks[place // BLOCK] * BLOCK + place % BLOCK
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
        new_step, rows=ROWS, width=WIDTH, block_size=BLOCK, first_position=FIRST_ROW
    )
    alive = []
    for _ in range(draw(st.integers(1, 6))):
        kept = [answer for answer in alive if draw(st.integers(0, 3))]
        for answer in kept:  # blocks are appended, or others in another list
            sequence = answer.sequence
            if draw(st.booleans()):
                sequence.blocks = draw(st.lists(st.integers(0, 50), max_size=WIDTH))
            sequence.computed += draw(st.integers(0, 2))
        for seed in range(draw(st.integers(0 if kept else 1, ROWS - len(kept)))):
            tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))
            sequence = Sequence(tokens, len(tokens), 30)
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
            missing = -(-stop // BLOCK) - len(sequence.blocks)
            sequence.blocks += range(60, 60 + max(0, missing))
        answers = [answer for answer in alive if draw(st.booleans())]
        total, longest = sum(counts.values()), max(len(s.blocks) for s in counts)
        scored = {s: draw(st.integers(0, n)) for s, n in counts.items() if draw(st.booleans())}
        copies = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3))
        num_logits = len(answers) + sum(scored.values())
        shape = StepShape(
            total + draw(st.integers(0, 3)),
            len(counts) + draw(st.integers(0, 2)),
            longest + draw(st.integers(0, max(0, WIDTH - longest))),
            num_logits + draw(st.integers(0, 2)),
        )
        plan = SchedulerOutput(counts, copies)
        inputs = builder.build(plan, answers, previous, scored, SamplingOps())
        for name, expected in write(shape, counts, answers, previous, scored, copies).items():
            found = getattr(views(inputs.buffer, inputs.shape), name).numpy()
            assert np.array_equal(found, expected.astype(found.dtype)), name
        assert (asked["num_tokens"], asked["num_rows"]) == (total, len(counts))
        assert asked["num_logits"] == num_logits and asked["num_sampled"] == len(answers)
        assert asked["max_query_len"] == max(counts.values())
        assert asked["num_prompts"] == sum(n > 1 for n in counts.values())
        assert asked["max_context_len"] == max(s.computed + n for s, n in counts.items())


def exact(**sizes):
    shape = StepShape(sizes["num_tokens"], sizes["num_rows"], WIDTH, sizes["num_logits"])
    return StepInputs(GraphKey(shape, sizes["sampling"]))


def test_parameters_are_looked_up_once_for_the_same_answers():
    looks = []

    class Params:
        """Sampling parameters that count how often they are read."""

        def __getattr__(self, name):
            looks.append(name)
            return getattr(PARAMS[1], name)

    builder = BatchBuilder(exact, rows=2, width=WIDTH, block_size=BLOCK, first_position=0)
    sequence = Sequence([1, 2, 3], 3, 30, blocks=[0])
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
    sequence = Sequence([1, 2, 3], 3, 30, blocks=[7, 8, 9])
    plan = SchedulerOutput({sequence: 3})
    builder.build(plan, [], {}, {}, None)
    sequence.blocks[:] = [5]
    inputs = builder.build(plan, [], {}, {}, None)
    assert inputs.arrays["block_table"][0].tolist() == [5, *[0] * (WIDTH - 1)]
