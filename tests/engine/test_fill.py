"""What a step reads, as the filler writes it, against the same written number by number."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.engine.fill import Filler
from llmfast.engine.inputs import Size, views
from llmfast.engine.request import Answer, Sequence
from llmfast.engine.sampling_params import SamplingParams

ROWS, WIDTH, BLOCK, FIRST_ROW = 5, 6, 4, 100


def write(size, counts, answers, previous):
    """All that a step must hold, from the definition of each number."""
    found = {
        "token_ids": np.zeros(size.tokens, int),
        "source": np.full(size.tokens, -1),
        "positions": np.zeros(size.tokens, int),
        "slots": np.full(size.tokens, -1),
        "query_start": np.zeros(size.rows + 1, int),
        "context_len": np.zeros(size.rows, int),
        "block_table": np.zeros((size.rows, size.width), int),
        **{name: np.zeros(size.rows, int) for name in ("last", "seeds", "numbers", "top_k")},
        **{name: np.zeros(size.rows, np.float32) for name in ("temperature", "top_p", "min_p")},
    }
    at, ends = 0, {}
    for row, (sequence, count) in enumerate(counts.items()):
        found["block_table"][row, : len(sequence.blocks)] = sequence.blocks
        found["context_len"][row] = sequence.computed + count
        for place in range(sequence.computed, sequence.computed + count):
            if place < len(sequence.tokens):
                found["token_ids"][at] = sequence.tokens[place]
            else:
                found["source"][at] = previous[sequence]
            found["positions"][at] = FIRST_ROW + place
            found["slots"][at] = sequence.blocks[place // BLOCK] * BLOCK + place % BLOCK
            at += 1
        found["query_start"][row + 1] = at
        ends[sequence] = at - 1
    for row in range(len(counts), size.rows):
        at = min(at + 1, size.tokens)
        found["query_start"][row + 1] = at
    for row, answer in enumerate(answers):
        params = answer.params
        found["last"][row] = ends[answer.sequence]
        found["seeds"][row] = answer.seed
        found["numbers"][row] = answer.num_output + answer.sequence.pending
        found["temperature"][row] = params.temperature
        found["top_k"][row] = min(max(params.top_k, 0), 2**31 - 1)
        found["top_p"][row] = params.top_p
        found["min_p"][row] = params.min_p
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
    filler = Filler(ROWS, WIDTH, block_size=BLOCK, first_row=FIRST_ROW, pinned=False)
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
        size = Size(
            total + draw(st.integers(0, 3)),
            len(counts) + draw(st.integers(0, 2)),
            longest + draw(st.integers(0, max(0, WIDTH - longest))),
        )
        buffer = filler.fill(size, counts, answers, previous)
        for name, expected in write(size, counts, answers, previous).items():
            found = getattr(views(buffer, size), name).numpy()
            assert np.array_equal(found, expected.astype(found.dtype)), name


def test_parameters_are_looked_up_once_for_the_same_answers():
    filler = Filler(2, WIDTH, block_size=BLOCK, first_row=0, pinned=False)
    sequence = Sequence([1, 2, 3], 3, 30, blocks=[0])
    answers = [Answer(0, sequence, PARAMS[1], 5, frozenset())]
    filler.fill(Size(3, 1, 1), {sequence: 3}, answers, {})
    columns = filler._columns
    filler.fill(Size(3, 1, 1), {sequence: 3}, list(answers), {})
    assert filler._columns is columns
    filler.fill(Size(3, 1, 1), {sequence: 3}, [], {})
    assert filler._columns is not columns
