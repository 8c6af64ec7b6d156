"""The runner on its own: batches, buckets, blocks and graphs."""

import functools
import gc
import random
from collections import Counter

import pytest
import torch

import llmfast
from generating import batch, check, make_pair
from llmfast.errors import UserError
from llmfast.runner import runner as runner_module
from llmfast.runner.cache import BLOCK_SIZE
from llmfast.runner.generate import takeover_of
from llmfast.runner.model import BlockModel
from llmfast.runner.runner import MAX_STOP_TOKENS, Runner, Sampling
from llmfast.runner.warmup import warm_up
from tiny_models import make, tokens

DRAWN = Sampling(temperature=1.0, top_k=50)


@functools.cache
def blocks_of(kind, device):
    return BlockModel(make(kind, device))


def make_runner(device, kind="Llama", rows=4, length=128, **kwargs):
    """With a cache of NaN, so that what is read without having been written shows."""
    runner = Runner(blocks_of(kind, device), max_rows=rows, max_length=length, **kwargs)
    for tensor in (*runner.cache.keys, *runner.cache.values):
        tensor.fill_(torch.nan)
    return runner


def prompts(device, *lengths):
    ids = tokens(len(lengths), max(lengths), device)
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def start(runner, sequences, new_tokens, sampling=DRAWN, seeds=None, **kwargs):
    if seeds is not None:
        seeds = torch.tensor(seeds, device=runner.device)
    lengths = [len(s) for s in sequences]
    runner.start(torch.cat(sequences), lengths, new_tokens, sampling, seeds, **kwargs)


def run(runner, sequences, new_tokens, sampling=DRAWN, seeds=None):
    """The tokens ``[rows, new_tokens]`` of a batch."""
    start(runner, sequences, new_tokens, sampling, seeds)
    columns = [runner.host_tokens().clone()]
    for _ in range(new_tokens - 1):
        runner.step()
        columns.append(runner.host_tokens().clone())
    runner.end()
    return torch.stack(columns, dim=1)


def run_logits(runner, sequences, new_tokens):
    """The logits ``[new_tokens, rows, vocabulary]`` of a batch whose tokens the host chooses."""
    start(runner, sequences, new_tokens, Sampling(), host_samples=True)
    logits = [runner.logits().clone()]
    for _ in range(new_tokens - 1):
        runner.feed(logits[-1].argmax(-1))
        runner.step()
        logits.append(runner.logits().clone())
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
    penalised = Sampling(temperature=0.5, repetition_penalty=2.0, stop_tokens=(7, 8), top_p=0.5)
    run(runner, prompts(device, 30, 30, 66, 2), 20, penalised, seeds=[1, 2, 3, 4])
    assert torch.equal(run_logits(runner, sequences, 6), fresh)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_the_order_of_blocks_changes_nothing(kind, device):
    sequences = prompts(device, 70, 3, 120)
    runner = make_runner(device, kind, length=192)
    expected = run_logits(runner, sequences, 10)
    random.Random(1).shuffle(runner.cache._free)
    start(runner, sequences, 10, Sampling())
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
    monkeypatch.setattr(runner_module, "PREFILL_TOKENS", limit)
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
    plain = run(make_runner(device), sequences, 12, Sampling())
    stop = int(plain[0, 3])
    first = plain[0].tolist().index(stop)
    assert first > 0 and stop not in plain[1]
    runner = make_runner(device)
    start(runner, sequences, 12, Sampling(stop_tokens=(stop, 1000), pad_token=99))
    blocks = [blocks[0] for blocks in runner._blocks]
    columns = [runner.host_tokens().clone()]
    prompt = runner.cache.keys[0][blocks[0], :, :9].clone()
    for _ in range(11):
        runner.step()
        columns.append(runner.host_tokens().clone())
    runner.end()
    tokens = torch.stack(columns, dim=1)
    assert torch.equal(tokens[0, : first + 1], plain[0, : first + 1])
    assert tokens[0, first + 1 :].eq(99).all()
    assert torch.equal(tokens[1], plain[1])
    assert torch.equal(runner.cache.keys[0][blocks[0], :, :9], prompt)
    written = runner.cache.keys[0][blocks].isfinite().all(-1).all(1).sum(1)
    assert written.tolist() == [9 + first, 5 + 11]  # the latest token is not in the cache yet


@pytest.mark.parametrize("stops", [(0,), (5,), (0, 5, 1000), (-1, 1000)])
def test_stop_tokens_are_barred_at_first(stops, device):
    """Token 0 stands for unused entries: it is barred only if it is one of them."""
    model = make("Llama", device)
    runner = Runner(BlockModel(model), max_rows=1, max_length=64)
    favourite = int(run(runner, prompts(device, 9), 1, Sampling())[0, 0])
    with torch.no_grad():  # token 0 is the most likely, then 5
        head = model.lm_head.weight
        head[0], head[5] = 2 * head[favourite], 1.5 * head[favourite]
    barred = run(runner, prompts(device, 9), 4, Sampling(stop_tokens=stops, min_new_tokens=3))
    logits = run_logits(runner, prompts(device, 9), 1)[0, 0]
    assert logits.topk(2).indices.tolist() == [0, 5]
    for token in set(stops) & {0, 5}:
        logits[token] = -torch.inf
        assert not barred[0, :3].eq(token).any()
    assert barred[0, 0] == logits.argmax()


def test_too_many_stop_tokens(device):
    runner = make_runner(device)
    with pytest.raises(ValueError, match="at most 16 stop tokens"):
        start(runner, prompts(device, 9), 4, Sampling(stop_tokens=tuple(range(17))))
    most = Sampling(stop_tokens=tuple(range(MAX_STOP_TOKENS)))
    assert run(runner, prompts(device, 9), 4, most).shape == (1, 4)


def test_logits_that_are_nan_are_reported(device):
    model = make("Llama", device)
    runner = Runner(BlockModel(model), max_rows=2, max_length=64)
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
    assert runner.max_length == 128 and runner.cache.num_blocks == 4
    cache = 4 * BLOCK_SIZE * 2 * 16 * 4 * 2 * 2  # heads, dimensions, bytes, keys and values, layers
    assert runner.cache.nbytes == cache
    assert runner.memory["cache"] == cache
    assert runner.memory["penalties"] == 0 < runner.memory["state"] < 2**14
    run(runner, prompts(device, 9), 2, Sampling(repetition_penalty=1.5))
    assert runner.memory["penalties"] == 2 * 101


def test_a_batch_that_was_not_ended(device):
    runner = make_runner(device)
    sequences = prompts(device, 9, 5)
    expected = run(runner, sequences, 3, seeds=[1, 2])
    start(runner, sequences, 3, seeds=[1, 2])
    columns = [runner.host_tokens().clone()]
    with pytest.raises(AssertionError, match="not ended"):
        start(runner, sequences, 3, seeds=[3, 4])
    for _ in range(2):  # the one that runs is not harmed
        runner.step()
        columns.append(runner.host_tokens().clone())
    runner.end()
    assert torch.equal(torch.stack(columns, dim=1), expected)
    assert runner.cache.num_free == runner.cache.num_blocks


def test_a_cache_without_room(device):
    runner = make_runner(device, length=128, num_blocks=3)
    assert runner.has_room(4, 128, 3)
    assert not runner.has_room(5, 128, 3)
    assert not runner.has_room(4, 129, 3)
    assert not runner.has_room(4, 128, 4)
    expected = run(runner, prompts(device, 9), 3, Sampling())
    with pytest.raises(UserError, match=r"need 2 blocks of 64, 1 of 3 are free"):
        start(runner, prompts(device, 70, 70), 3)
    runner.end()
    assert runner.cache.num_free == 3
    assert torch.equal(run(runner, prompts(device, 9), 3, Sampling()), expected)


def test_the_runner_grows_and_is_reused(device):
    model, twin = make_pair("Llama", device)
    takeover = takeover_of(model)

    def runner_of(rows, new_tokens):
        check(model, twin, **batch(device, padding=(0,) * rows), max_new_tokens=new_tokens)
        return takeover.runner

    first = runner_of(2, 8)
    assert runner_of(1, 8) is first and runner_of(2, 30) is first
    wider = runner_of(5, 8)
    assert wider is not first and wider.max_rows == 8
    longer = runner_of(1, 60)
    assert longer is not wider and longer.max_rows == 8 and longer.max_length >= 72
    assert longer.cache.num_blocks == 5  # of the widest call; the longest wants 2
    assert runner_of(5, 8) is longer and runner_of(1, 60) is longer


# ---------------------------------------------------------------------------------------- graphs

PLANS = {
    "greedy": Sampling(),
    "drawn": Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
    "all": Sampling(
        temperature=1.2,
        repetition_penalty=1.4,
        stop_tokens=(7, 30, 50),
        min_new_tokens=5,
        pad_token=3,
    ),
}


class Eager:
    """Stands for a captured graph where there is no GPU: what a replay runs."""

    def __init__(self, step):
        for _ in range(3):  # as a capture does
            step()
        self.replay = step


@pytest.mark.parametrize("plan", PLANS)
def test_a_graph_of_each_plan(plan, device, monkeypatch):
    """One for a bucket, captured while every row is idle: nothing is written then."""
    captured = []

    def capture(step, device, pool):
        captured.append(step)
        return Eager(step)

    sequences, seeds = prompts(device, 9, 70, 1), [5, 6, 7]
    expected = run(make_runner(device, use_graphs=False), sequences, 9, PLANS[plan], seeds)
    monkeypatch.setattr(runner_module, "capture", capture)
    monkeypatch.setattr(runner_module, "new_pool", lambda: None)
    runner = make_runner(device, use_graphs=True)
    start(runner, sequences, 9, PLANS[plan], seeds)
    runner.end()
    written = torch.stack(runner.cache.keys).isfinite().any(-1).any(2).any(0).sum()
    assert int(written) == 9 + 70 + 1
    assert torch.equal(run(runner, sequences, 9, PLANS[plan], seeds), expected)
    run(runner, [*sequences, sequences[0]], 9, PLANS[plan], [5, 6, 7, 8])
    assert len(captured) == 1
    run(runner, sequences[:1], 9, PLANS[plan], seeds[:1])
    run_logits(runner, sequences, 3)
    assert len(captured) == 3


def test_what_is_compiled_after_a_warm_up_is_logged(device, monkeypatch, caplog):
    names = []
    prefill = Runner._prefill

    def compiling(self, *args):
        names.append("some_kernel")
        return prefill(self, *args)

    monkeypatch.setattr(Runner, "_compiled", lambda self: Counter(names))
    runner = make_runner(device)
    expected = run(runner, prompts(device, 9), 3, Sampling())
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_prefill", compiling)
        done = warm_up(runner, (1, 3), PLANS.values())
    assert done.graphs == runner.num_graphs == 2 * len(PLANS) * runner.use_graphs
    assert runner.cache.num_free == runner.cache.num_blocks and names
    assert torch.equal(run(runner, prompts(device, 9), 3, Sampling()), expected)
    assert not caplog.records
    monkeypatch.setattr(Runner, "_prefill", compiling)
    assert torch.equal(run(runner, prompts(device, 9), 3, Sampling()), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "llmfast: compiled in the middle of a call: some_kernel"
    ]


def test_no_memory_for_a_graph(device, monkeypatch):
    def fail(step, device, pool):
        step()
        raise torch.OutOfMemoryError("none left")

    if device.type == "cpu":
        monkeypatch.setattr(runner_module, "new_pool", lambda: None)
    runner = make_runner(device, use_graphs=True)
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "capture", fail)
        with pytest.raises(UserError, match="a CUDA graph of 2 rows; generate fewer"):
            start(runner, prompts(device, 9, 5), 3)
    runner.end()
    assert runner.cache.num_free == runner.cache.num_blocks
    if device.type == "cpu":
        runner.use_graphs = False
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
        assert bool(runner._graphs) == use_graphs
        return [*chosen, logits, *runner.cache.keys, *runner.cache.values]

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
    samplings = (Sampling(), Sampling(temperature=1.0), Sampling(repetition_penalty=1.3))
    warm_up(takeover_of(model).runner, range(1, 10), samplings)
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
        takeover_of(model).runner_for(len(rows), 64, len(rows))
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
    cache = takeover_of(model).runner.cache
    assert cache.num_free == cache.num_blocks
    llmfast.unpatch(model)
    check(model, twin, **inputs, max_new_tokens=8)
