"""Counts kept from step to step equal counts from scratch, whatever sequences a step has."""

import gc
import random

import pytest
import torch

from llmfast.engine.penalties import Counts
from llmfast.engine.request import Sequence

VOCABULARY = 23


def make(rng, prompt=5):
    tokens = [rng.randrange(VOCABULARY) for _ in range(prompt)]
    return Sequence(tokens, prompt, 100)


def check(counts, sequences):
    seen, counted = counts.of(sequences, VOCABULARY, torch.device("cpu"))
    assert seen.dtype == torch.bool and counted.dtype == torch.int32
    for row, sequence in enumerate(sequences):
        prompt = sequence.tokens[: sequence.prompt_len] if sequence else []
        output = sequence.output if sequence else []
        assert seen[row].nonzero()[:, 0].tolist() == sorted(set(prompt))
        assert counted[row].tolist() == [output.count(token) for token in range(VOCABULARY)]


def test_tokens_are_added_as_they_come():
    rng = random.Random(0)
    counts = Counts(3)
    first, second = make(rng), make(rng, prompt=1)
    check(counts, [first, None, second])
    for step in range(40):
        for sequence in (first, second):
            sequence.tokens.append(rng.randrange(4))
        if step % 3:  # one that is left out for a step has two new ones then
            check(counts, [second, first])


def test_a_preempted_sequence_is_counted_on():
    """Its tokens stay when its blocks go, with what it has said so far."""
    rng = random.Random(1)
    counts = Counts(1)
    sequence = make(rng)
    sequence.tokens += [3, 3, 4]
    check(counts, [sequence])
    sequence.tokens.append(3)
    check(counts, [sequence])


@pytest.mark.parametrize("rows", [4, 6])
def test_rows_are_of_those_that_were_asked_for_last(rows):
    rng = random.Random(rows)
    counts = Counts(rows)
    known = [make(rng) for _ in range(9)]
    for _ in range(300):
        if rng.random() < 0.2:
            known[rng.randrange(len(known))] = make(rng, prompt=rng.randrange(1, 9))
        chosen = rng.sample(known, rng.randrange(1, rows + 1))
        for sequence in chosen:
            if rng.random() < 0.8:
                sequence.tokens.append(rng.randrange(VOCABULARY))
        check(counts, chosen)


def test_rows_of_sequences_that_are_gone_are_free():
    rng = random.Random(2)
    counts = Counts(2)
    kept = make(rng)
    check(counts, [kept])
    for _ in range(20):
        check(counts, [kept, make(rng)])
        gc.collect()
        assert len(counts._slots) == 1 and len(counts._free) == 1
