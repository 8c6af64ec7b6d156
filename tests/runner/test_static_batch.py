"""A static batch on its own: rows, buckets, blocks and graphs."""

import functools
import gc
import random
from collections import Counter

import pytest
import torch

import llmfast
from fake_graphs import use_fake_graphs
from generating import batch, check, make_pair
from llmfast.errors import UserError
from llmfast.runner.block_model import BlockModel
from llmfast.runner.cache import BLOCK_SIZE
from llmfast.runner.executor import Executor
from llmfast.runner.generate import batch as batch_module
from llmfast.runner.generate.batch import BatchSampling, StaticBatch
from llmfast.runner.generate.override import override_of
from llmfast.runner.resident import MAX_STOP_TOKENS
from llmfast.runner.warmup import warm_up
from tiny_models import make, tokens

DRAWN = BatchSampling(temperature=1.0, top_k=50)


@functools.cache
def blocks_of(kind, device):
    return BlockModel(make(kind, device))


def make_runner(device, kind="Llama", rows=4, length=128, **kwargs):
    """With a cache of NaN, so that what is read without having been written shows."""
    runner = StaticBatch(blocks_of(kind, device), max_rows=rows, max_length=length, **kwargs)
    for tensor in (*runner.executor.cache.keys, *runner.executor.cache.values):
        tensor.fill_(torch.nan)
    return runner


def prompts(device, *lengths):
    ids = tokens(len(lengths), max(lengths), device)
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def start(runner, sequences, new_tokens, sampling=DRAWN, seeds=None, **kwargs):
    if seeds is not None:
        seeds = torch.tensor(seeds, device=runner.device)
    lengths = [len(s) for s in sequences]
    return runner.start(torch.cat(sequences), lengths, new_tokens, sampling, seeds, **kwargs)


def host_tokens(runner, handle):
    """A step's tokens as the host gets them; -1 for a row that had none to choose."""
    result = runner.collect(handle)
    if result.status is None:
        return result.tokens
    return torch.where(result.status == 0, result.tokens, -1)


def run(runner, sequences, new_tokens, sampling=DRAWN, seeds=None):
    """The tokens ``[rows, new_tokens]`` of a batch."""
    columns = [host_tokens(runner, start(runner, sequences, new_tokens, sampling, seeds))]
    for _ in range(new_tokens - 1):
        columns.append(host_tokens(runner, runner.step()))
    runner.end()
    return torch.stack(columns, dim=1)


def run_logits(runner, sequences, new_tokens):
    """The logits ``[new_tokens, rows, vocabulary]`` of a batch whose tokens the host chooses."""
    logits = [start(runner, sequences, new_tokens, None).logits.clone()]
    for _ in range(new_tokens - 1):
        runner.feed(logits[-1].argmax(-1))
        logits.append(runner.step().logits.clone())
    runner.end()
    return torch.stack(logits)


def assert_close(actual, expected):
    """Float32 sums in another order, through two blocks: some hundred roundings of the largest."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=200 * 2**-24 * scale)


# ------------------------------------------------------------------------- what changes nothing


def test_rows_of_a_batch_are_as_if_alone(device):
    """Three rows in a bucket of four; a row's draws depend on its seed alone."""
    sequences = prompts(device, 9, 70, 1)
    runner = make_runner(device)
    together = run(runner, sequences, 12, seeds=[5, 6, 7])
    for row, seed in ((2, 7), (0, 5), (1, 6)):
        alone = run(runner, sequences[row : row + 1], 12, seeds=[seed])
        assert torch.equal(alone[0], together[row])
    logits = run_logits(runner, sequences, 6)
    for row, sequence in enumerate(sequences):
        assert_close(logits[:, row], run_logits(runner, [sequence], 6)[:, 0])


def test_what_an_earlier_batch_left_changes_nothing(device):
    """Neither in the cache, nor in the row that pads a bucket."""
    sequences = prompts(device, 9, 70, 1)
    runner = make_runner(device)
    fresh = run_logits(runner, sequences, 6)
    penalised = BatchSampling(
        temperature=0.5, repetition_penalty=2.0, stop_tokens=(7, 8), top_p=0.5
    )
    run(runner, prompts(device, 30, 30, 66, 2), 20, penalised, seeds=[1, 2, 3, 4])
    assert torch.equal(run_logits(runner, sequences, 6), fresh)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_the_order_of_blocks_changes_nothing(kind, device):
    sequences = prompts(device, 70, 3, 120)
    runner = make_runner(device, kind, length=192)
    expected = run_logits(runner, sequences, 10)
    random.Random(1).shuffle(runner.executor.cache._free)
    start(runner, sequences, 10, BatchSampling())
    assert runner._blocks[0] != sorted(runner._blocks[0]) or runner._blocks[2] != [3, 4, 5]
    runner.end()
    assert torch.equal(run_logits(runner, sequences, 10), expected)


@pytest.mark.parametrize("limit", [1, 7, 64, 100])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_prompts_longer_than_a_step(kind, limit, device, monkeypatch):
    """Cut in the middle of a row, at its end, and through several at once."""
    sequences = prompts(device, 1, 20, 6, 70) if limit > 1 else prompts(device, 3, 2)
    runner = make_runner(device, kind, use_graphs=False)  # a replay calls nothing that counts
    expected = run_logits(runner, sequences, 4)
    steps = []
    forward = type(runner.model).__call__

    def count(self, step, *args):
        steps.append(len(step.token_ids))
        return forward(self, step, *args)

    monkeypatch.setattr(type(runner.model), "__call__", count)
    monkeypatch.setattr(batch_module, "MAX_STEP_TOKENS", limit)
    actual = run_logits(runner, sequences, 4)
    assert_close(actual, expected)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    total = sum(map(len, sequences))
    prefill = steps[:-3]
    assert sum(prefill) == total and len(prefill) == -(-total // limit)
    assert max(prefill) <= limit


# ------------------------------------------------------------------------------- stops and draws


def test_a_row_that_has_stopped_yields_pads_and_writes_nothing(device):
    sequences = prompts(device, 9, 5)
    plain = run(make_runner(device), sequences, 12, BatchSampling())
    stop = int(plain[0, 3])
    first = plain[0].tolist().index(stop)
    assert first > 0 and stop not in plain[1]
    runner = make_runner(device)
    first_step = start(runner, sequences, 12, BatchSampling(stop_tokens=(stop, 1000), pad_token=99))
    blocks = [blocks[0] for blocks in runner._blocks]
    columns = [host_tokens(runner, first_step)]
    prompt = runner.executor.cache.keys[0][blocks[0], :, :9].clone()
    for _ in range(11):
        columns.append(host_tokens(runner, runner.step()))
    runner.end()
    tokens = torch.stack(columns, dim=1)
    assert torch.equal(tokens[0, : first + 1], plain[0, : first + 1])
    assert tokens[0, first + 1 :].eq(99).all()
    assert torch.equal(tokens[1], plain[1])
    assert torch.equal(runner.executor.cache.keys[0][blocks[0], :, :9], prompt)
    written = runner.executor.cache.keys[0][blocks].isfinite().all(-1).all(1).sum(1)
    assert written.tolist() == [9 + first, 5 + 11]  # the latest token is not in the cache yet


@pytest.mark.parametrize("stops", [(0,), (5,), (0, 5, 1000), (-1, 1000)])
def test_stop_tokens_are_suppressed_at_first(stops, device):
    """Token 0 stands for unused entries: it is suppressed only if it is one of them."""
    model = make("Llama", device)
    runner = StaticBatch(BlockModel(model), max_rows=1, max_length=64)
    favourite = int(run(runner, prompts(device, 9), 1, BatchSampling())[0, 0])
    with torch.no_grad():  # token 0 is the most likely, then 5
        head = model.lm_head.weight
        head[0], head[5] = 2 * head[favourite], 1.5 * head[favourite]
    suppressed = run(
        runner, prompts(device, 9), 4, BatchSampling(stop_tokens=stops, min_new_tokens=3)
    )
    logits = run_logits(runner, prompts(device, 9), 1)[0, 0]
    assert logits.topk(2).indices.tolist() == [0, 5]
    for token in set(stops) & {0, 5}:
        logits[token] = -torch.inf
        assert not suppressed[0, :3].eq(token).any()
    assert suppressed[0, 0] == logits.argmax()


def test_too_many_stop_tokens(device):
    runner = make_runner(device)
    with pytest.raises(ValueError, match="at most 16 stop tokens"):
        start(runner, prompts(device, 9), 4, BatchSampling(stop_tokens=tuple(range(17))))
    most = BatchSampling(stop_tokens=tuple(range(MAX_STOP_TOKENS)))
    assert run(runner, prompts(device, 9), 4, most).shape == (1, 4)


def test_logits_that_are_nan_are_reported(device):
    model = make("Llama", device)
    runner = StaticBatch(BlockModel(model), max_rows=2, max_length=64)
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.nan
    sequences = [torch.tensor(ids, device=device) for ids in ([4, 5], [6, 50])]
    got = run(runner, sequences, 3, seeds=[1, 2])
    assert got[0].ge(0).all() and got[1].lt(0).all()


# -------------------------------------------------------------------------------- room and order


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (64, 64), (65, 96), (97, 128)]
)
def test_buckets(rows, bucket, device):
    assert make_runner(device, rows=rows, num_blocks=1).max_rows == bucket


def test_a_runner_counts_its_bytes(device):
    runner = make_runner(device, rows=2, length=100)
    assert runner.max_length == 128 and runner.executor.cache.num_blocks == 4
    cache = 4 * BLOCK_SIZE * 2 * 16 * 4 * 2 * 2  # heads, dimensions, bytes, keys and values, layers
    assert runner.executor.cache.nbytes == cache
    assert runner.executor.memory["cache"] == cache
    assert runner.executor.memory["penalties"] == 0 < runner.executor.memory["state"] < 2**14
    run(runner, prompts(device, 9), 2, BatchSampling(repetition_penalty=1.5))
    assert runner.executor.memory["penalties"] == 2 * 101


def test_a_batch_that_was_not_ended(device):
    runner = make_runner(device)
    sequences = prompts(device, 9, 5)
    expected = run(runner, sequences, 3, seeds=[1, 2])
    columns = [host_tokens(runner, start(runner, sequences, 3, seeds=[1, 2]))]
    with pytest.raises(AssertionError, match="not ended"):
        start(runner, sequences, 3, seeds=[3, 4])
    for _ in range(2):  # the one that runs is not harmed
        columns.append(host_tokens(runner, runner.step()))
    runner.end()
    assert torch.equal(torch.stack(columns, dim=1), expected)
    assert runner.executor.cache.num_free == runner.executor.cache.num_blocks


def test_a_cache_without_room(device):
    runner = make_runner(device, length=128, num_blocks=3)
    assert runner.has_room(4, 128, 3)
    assert not runner.has_room(5, 128, 3)
    assert not runner.has_room(4, 129, 3)
    assert not runner.has_room(4, 128, 4)
    expected = run(runner, prompts(device, 9), 3, BatchSampling())
    with pytest.raises(UserError, match=r"need 2 blocks of 64, 1 of 3 are free"):
        start(runner, prompts(device, 70, 70), 3)
    runner.end()
    assert runner.executor.cache.num_free == 3
    assert torch.equal(run(runner, prompts(device, 9), 3, BatchSampling()), expected)


def test_the_runner_grows_and_is_reused(device):
    model, twin = make_pair("Llama", device)
    override = override_of(model)

    def runner_of(rows, new_tokens):
        check(model, twin, **batch(device, padding=(0,) * rows), max_new_tokens=new_tokens)
        return override.batch

    first = runner_of(2, 8)
    assert runner_of(1, 8) is first and runner_of(2, 30) is first
    wider = runner_of(5, 8)
    assert wider is not first and wider.max_rows == 8
    longer = runner_of(1, 60)
    assert longer is not wider and longer.max_rows == 8 and longer.max_length >= 72
    assert longer.num_blocks == 5  # as the widest call needs; the longest needs 2
    assert runner_of(5, 8) is longer and runner_of(1, 60) is longer


# ---------------------------------------------------------------------------------------- graphs

PLANS = {
    "greedy": BatchSampling(),
    "drawn": BatchSampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
    "all": BatchSampling(
        temperature=1.2,
        repetition_penalty=1.4,
        stop_tokens=(7, 30, 50),
        min_new_tokens=5,
        pad_token=3,
    ),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_graph_of_each_plan(plan, device, monkeypatch):
    """One for a bucket, captured while every row is idle: nothing is written then."""
    sequences, seeds = prompts(device, 9, 70, 1), [5, 6, 7]
    expected = run(make_runner(device, use_graphs=False), sequences, 9, PLANS[plan], seeds)
    made = use_fake_graphs(monkeypatch)
    runner = make_runner(device, use_graphs=True)
    start(runner, sequences, 9, PLANS[plan], seeds)
    runner.end()
    written = torch.stack(runner.executor.cache.keys).isfinite().any(-1).any(2).any(0).sum()
    assert int(written) == 9 + 70 + 1
    assert torch.equal(run(runner, sequences, 9, PLANS[plan], seeds), expected)
    run(runner, [*sequences, sequences[0]], 9, PLANS[plan], [5, 6, 7, 8])
    assert len(made.captured) == 1 and len(made.replayed) == 8 + 8
    run(runner, sequences[:1], 9, PLANS[plan], seeds[:1])
    run_logits(runner, sequences, 3)
    assert len(made.captured) == 3


def test_what_is_compiled_after_a_warm_up_is_logged(device, monkeypatch, caplog):
    names = []
    launch = Executor.launch

    def compiling(self, *args):
        names.append("some_kernel")
        return launch(self, *args)

    monkeypatch.setattr(StaticBatch, "_compiled", lambda self: Counter(names))
    runner = make_runner(device)
    expected = run(runner, prompts(device, 9), 3, BatchSampling())
    with monkeypatch.context() as patch:
        patch.setattr(Executor, "launch", compiling)
        done = warm_up(runner, (1, 3), PLANS.values())
    assert done.graphs == runner.executor.num_graphs == 2 * len(PLANS) * runner.executor.use_graphs
    assert runner.executor.cache.num_free == runner.executor.cache.num_blocks and names
    assert torch.equal(run(runner, prompts(device, 9), 3, BatchSampling()), expected)
    assert not caplog.records
    monkeypatch.setattr(Executor, "launch", compiling)
    assert torch.equal(run(runner, prompts(device, 9), 3, BatchSampling()), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "llmfast: compiled in the middle of a call: some_kernel"
    ]


def test_no_memory_for_a_graph(device, monkeypatch):
    failing = [True]

    def fail(step):
        if failing:
            step()
            raise torch.OutOfMemoryError("none left")

    use_fake_graphs(monkeypatch, fail)
    runner = make_runner(device, use_graphs=True)
    message = "generate: no memory .* a CUDA graph of 2 tokens of 2 sequences; generate fewer"
    with pytest.raises(UserError, match=message):
        start(runner, prompts(device, 9, 5), 3)
    failing.clear()
    runner.end()
    assert runner.executor.cache.num_free == runner.executor.cache.num_blocks
    assert run(runner, prompts(device, 9, 5), 3, seeds=[1, 2]).ge(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3", "Granite", "Olmo2"])
def test_graphs_equal_eager_bit_for_bit(kind, rows, device):
    sequences, seeds = prompts(device, *[9, 70, 1, 30, 64, 65, 2, 3, 8][:rows]), range(rows)

    def everything(use_graphs):
        runner = make_runner(device, kind, rows=rows, use_graphs=use_graphs)
        chosen = [run(runner, sequences, 40, plan, list(seeds)) for plan in PLANS.values()]
        logits = run_logits(runner, sequences, 40)
        assert bool(runner.executor.num_graphs) == use_graphs
        return [*chosen, logits, *runner.executor.cache.keys, *runner.executor.cache.values]

    for eager, replayed in zip(everything(False), everything(True), strict=True):
        torch.testing.assert_close(replayed, eager, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_calls_of_many_shapes_compile_nothing_new_and_leave_memory_flat(device):
    from llmfast_kernels.common.launch import compilations

    model, _ = make_pair("Llama", device)
    ways = ({}, {"do_sample": True}, {"repetition_penalty": 1.3}, {"output_scores": True})
    dice = random.Random(0)
    shapes = [
        (dice.randint(1, 9), dice.randint(1, 220), dice.randint(1, 20), dice.choice(ways))
        for _ in range(40)
    ]

    def call(rows, length, new_tokens, how):
        ids = tokens(rows, length, device)
        model.generate(ids, max_new_tokens=new_tokens, return_dict_in_generate=True, **how)

    def memory():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    call(9, 220, 20, {})  # so that the cache is as large as it will be
    samplings = (
        BatchSampling(),
        BatchSampling(temperature=1.0),
        BatchSampling(repetition_penalty=1.3),
    )
    warm_up(override_of(model).batch, range(1, 10), samplings)
    kernels = compilations()
    assert kernels
    for shape in shapes:  # the graphs whose tokens the host chooses are captured here
        call(*shape)
    allocated, reserved = memory()
    for _ in range(5):
        dice.shuffle(shapes)
        for shape in shapes:
            call(*shape)
    assert compilations() == kernels
    assert memory()[0] <= allocated
    assert memory()[1] <= reserved + 2**25  # the allocator's own fragments


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["cache", "graph"])
def test_a_full_gpu(what, device):
    """With all other memory taken, not a mocked error."""
    rows = (0,) * 256
    model, twin = make_pair("Llama", device, vocab_size=4096)
    if what == "graph":  # there is cache for all rows, but so far a graph for three
        override_of(model).batch_for(len(rows), 64, len(rows))
    inputs = batch(device)
    check(model, twin, **inputs, max_new_tokens=8)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(UserError, match="generate fewer"):
            if what == "cache":
                model.generate(**batch(device, padding=rows), max_new_tokens=2000)
            else:
                model.generate(**batch(device, padding=rows), max_new_tokens=8)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    check(model, twin, **inputs, max_new_tokens=8)
    cache = override_of(model).batch.executor.cache
    assert cache.num_free == cache.num_blocks
    llmfast.unpatch(model)
    check(model, twin, **inputs, max_new_tokens=8)
