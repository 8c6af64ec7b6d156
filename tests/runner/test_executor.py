"""The executor alone: steps described in one buffer, without an engine or a call of generate."""

import functools

import numpy as np
import pytest
import torch

from fake_graphs import use_fake_graphs
from llmfast.errors import UserError
from llmfast.runner.block_model import BlockModel
from llmfast.runner.executor import Executor, Owner
from llmfast.runner.graphs import decode_shape, mixed_shape
from llmfast.runner.inputs import GraphKey, SamplingOps, StepInputs, StepShape, buffer_bytes, views
from tiny_models import make, tokens

OWNER = Owner("LLM", cache_advice="lower num_blocks", graph_advice="lower something")
GREEDY = SamplingOps()
BLOCK = 16
PROMPTS = [tokens(1, n)[0].tolist() for n in (5, 17, 33)]
SHAPES = [decode_shape(n, 4) for n in (1, 2, 4)] + [mixed_shape(64, 4, 4)]


@functools.cache
def step_model():
    return BlockModel(make("Llama").double())


def make_executor(**changes):
    options = {"num_blocks": 12, "max_rows": 4, "max_length": 64, "block_size": BLOCK}
    executor = Executor(step_model(), owner=OWNER, fixed_shapes=SHAPES, **(options | changes))
    assert executor.admit(64) == 0
    for tensor in (*executor.cache.keys, *executor.cache.values):
        tensor.fill_(torch.nan)
    return executor


def step(executor, rows, *, sampling=GREEDY, copies=(), sources=(), all_logits=False):
    """The inputs of a step.

    Args:
        rows: (tokens, how many of them are in the cache, blocks) of each.
        sources: rows of the latest step whose samples are these rows' last tokens.
        all_logits: of each token, not of each row's last.
    """
    counts = np.array([len(ids) - start for ids, start, _ in rows])
    starts = np.array([start for _, start, _ in rows])
    count = int(counts.sum()) if all_logits else len(rows)
    inputs = executor.new_step(
        num_tokens=int(counts.sum()),
        num_rows=len(rows),
        max_query_len=int(counts.max()),
        num_prompts=int((counts > 1).sum()),
        max_context_len=int((starts + counts).max()),
        num_logits=count,
        sampling=sampling,
        num_sampled=0 if sampling is None else count,
        num_copies=len(copies),
    )
    table = np.zeros((len(rows), executor.width), np.int64)
    for row, (_, _, blocks) in enumerate(rows):
        table[row, : len(blocks)] = blocks
    ends = inputs.place(starts, counts, [table], block_size=BLOCK, first_position=0)
    flat = [token for ids, start, _ in rows for token in ids[start:]]
    inputs.arrays["token_ids"][: len(flat)] = flat
    inputs.arrays["logit_tokens"][:count] = np.arange(count) if all_logits else ends - 1
    for row, source in enumerate(sources):
        inputs.arrays["source_row"][ends[row] - 1] = source
    if copies:
        inputs.arrays["block_copies"][:] = [(0, *copy) for copy in copies]
    return inputs


def logits_of(ids):
    """The logits of the model itself, of each token."""
    with torch.no_grad():
        return make("Llama").double()(torch.tensor([ids])).logits[0]


def assert_close(actual, expected):
    """All but the rotary tables is float64: through two blocks some dozen roundings to float32."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=50 * 2**-24 * scale)


def greedy(ids, count):
    for _ in range(count):
        ids = [*ids, int(logits_of(ids)[-1].argmax())]
    return ids


@pytest.fixture(params=[False, True], ids=["eager", "graphs"])
def executor(request, monkeypatch):
    if request.param:
        use_fake_graphs(monkeypatch)
    executor = make_executor()
    executor.capture([GraphKey(shape, GREEDY) for shape in SHAPES])
    assert executor.num_graphs == len(SHAPES) * request.param
    yield executor
    executor.close()


def test_prompts_and_decodes_in_one_step(executor):
    first, second, third = PROMPTS
    blocks = [[3], [0, 5], [7, 2, 1]]
    result = executor.collect(executor.launch(step(executor, [(first, 0, blocks[0])])))
    expected = [greedy(first, 2), greedy(second, 1), greedy(third, 1)]
    assert result.tokens.tolist() == expected[0][5:6] and result.status is None
    rows = [(expected[0][:6], 5, blocks[0]), (second, 0, blocks[1]), (third, 0, blocks[2])]
    result = executor.collect(executor.launch(step(executor, rows)))
    assert result.tokens.tolist() == [ids[-1] for ids in expected]


def test_a_token_is_taken_from_the_row_that_sampled_it(executor):
    """Rows may change their order from step to step; the host need not know the token."""
    blocks = [[0, 1], [2, 3]]
    expected = [greedy(ids, 4) for ids in PROMPTS[:2]]
    handles = [
        executor.launch(
            step(executor, [(p, 0, b) for p, b in zip(PROMPTS[:2], blocks, strict=True)])
        )
    ]
    order, sources = [1, 0], [1, 0]
    for i in range(3):
        rows = [
            ([*expected[r][: len(PROMPTS[r]) + i], 0], len(PROMPTS[r]) + i, blocks[r])
            for r in order
        ]
        handles.append(executor.launch(step(executor, rows, sources=sources)))
        order, sources = order[::-1], [1, 0]
    found = [executor.collect(handle).tokens.tolist() for handle in handles]
    assert found[0] == [ids[len(p)] for ids, p in zip(expected, PROMPTS[:2], strict=True)]
    for i, pair in enumerate(found[1:], start=1):
        mine = pair if i % 2 == 0 else pair[::-1]
        assert mine == [ids[len(p) + i] for ids, p in zip(expected, PROMPTS[:2], strict=True)]


def test_the_host_chooses(executor):
    ids = PROMPTS[1]
    handle = executor.launch(step(executor, [(ids, 0, [4, 6])], sampling=None))
    assert_close(handle.logits, logits_of(ids)[-1:])
    assert len(executor.collect(handle).tokens) == 0
    executor.feed(torch.tensor([7]))
    handle = executor.launch(step(executor, [([*ids, 0], 17, [4, 6])], sources=[0]))
    expected = int(logits_of([*ids, 7])[-1].argmax())
    assert executor.collect(handle).tokens.tolist() == [expected]


def test_several_rows_of_logits_for_a_row(executor):
    """As a step that verifies several tokens wants them: each is sampled."""
    ids = PROMPTS[1][:3]
    result = executor.collect(executor.launch(step(executor, [(ids, 0, [2])], all_logits=True)))
    assert result.tokens.tolist() == logits_of(ids).argmax(-1).tolist()


def test_blocks_are_copied_before_the_step(executor):
    first = PROMPTS[0]
    executor.collect(executor.launch(step(executor, [(first, 0, [3])])))
    rows = [([*first, 8], 5, [3]), ([*first, 9], 5, [10])]
    inputs = step(executor, rows, copies=[(3, 10)])
    assert inputs.captured == (executor.num_graphs > 0)
    result = executor.collect(executor.launch(inputs))
    expected = [int(logits_of([*first, token])[-1].argmax()) for token in (8, 9)]
    assert result.tokens.tolist() == expected


def test_a_row_without_a_token_to_choose_has_a_status(executor):
    """The second of three rows reads a block that nobody has written: NaN."""
    ids = PROMPTS[0]
    rows = [(ids, 0, [0]), ([*ids, 7], 5, [11]), (ids, 0, [1])]
    result = executor.collect(executor.launch(step(executor, rows)))
    assert [bool(status) for status in result.status] == [False, True, False]
    assert result.tokens[0] == result.tokens[2] == int(logits_of(ids)[-1].argmax())


def test_a_graph_that_ends_at_the_logits(monkeypatch):
    use_fake_graphs(monkeypatch)
    executor = make_executor()
    executor.capture([GraphKey(mixed_shape(64, 4, 4), None)])
    inputs = step(executor, [(PROMPTS[0], 0, [0]), (PROMPTS[1], 0, [1, 2])], sampling=None)
    assert inputs.captured
    found = executor.launch(inputs).logits
    expected = torch.stack([logits_of(ids)[-1] for ids in PROMPTS[:2]])
    assert_close(found, expected)
    executor.close()


def test_block_copies_move_no_other_field():
    """So a graph reads the same places whether or not blocks are copied before it."""
    shape = StepShape(5, 3, 4, 3, groups=2)
    plain, copying = (
        StepInputs(GraphKey(shape, GREEDY)),
        StepInputs(GraphKey(shape, GREEDY), num_copies=2),
    )
    assert plain.shape == shape and copying.shape.copies == 2
    whole, part = (views(inputs.buffer, inputs.shape) for inputs in (copying, plain))
    for name, field in vars(part).items():
        if name != "block_copies":
            tensors = field if isinstance(field, tuple) else (field,)
            places = [tensor.storage_offset() for tensor in tensors]
            found = getattr(whole, name)
            found = found if isinstance(found, tuple) else (found,)
            assert [tensor.storage_offset() for tensor in found] == places, name
    assert len(part.slots) == len(part.block_tables) == 2
    assert buffer_bytes(copying.shape) - buffer_bytes(shape) == 2 * 3 * 8


def test_an_idle_step_writes_nothing():
    inputs = StepInputs(GraphKey(StepShape(6, 3, 2, 3, groups=2), GREEDY))
    inputs.make_idle()
    arrays = inputs.arrays
    assert [slots.tolist() for slots in inputs.group_arrays["slots"]] == [[-1] * 6] * 2
    assert not arrays["context_len"].any()
    assert arrays["query_start"].tolist() == [0, 1, 2, 3]


def test_a_cache_that_does_not_fit():
    with pytest.raises(UserError, match=r"LLM: a cache of \d+ blocks .* lower num_blocks"):
        make_executor(num_blocks=2**40)


def test_closing_frees_the_cache_and_the_graphs(monkeypatch):
    use_fake_graphs(monkeypatch)
    executor = make_executor()
    executor.capture([GraphKey(SHAPES[0], GREEDY)])
    assert executor.num_graphs == 1 and executor.memory["cache"] > 0
    executor.close()
    assert executor.num_graphs == 0 and not executor.cache.keys
    assert executor.memory["cache"] == 0
