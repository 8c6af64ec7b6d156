"""Requests and figures of `bench throughput`, `latency` and `serve`."""

import asyncio
import itertools
import math
import random
import statistics

import pytest
import torch

from engines import model_of, options
from llmfast import AsyncLLM, SamplingParams
from llmfast.errors import UserError
from llmfast.measure import offline, serve, shapes
from llmfast.measure.shapes import Source
from llmfast.measure.stats import percentile
from llmfast.measure.suites import SUITES
from llmfast.measure.workload import Batch, Timeline, Workload

TINY = (
    "llama",
    {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
)
SMALL = Workload(requests=6, input=(3, 20), output=(2, 9))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return Source("tiny")


def test_the_usual_requests_are_those_of_nano_vllms_benchmark():
    random.seed(0)
    expected = []
    for _ in range(256):
        length = random.randint(100, 1024)
        expected.append([random.randint(0, 10_000) for _ in range(length)])
    lengths = [random.randint(100, 1024) for _ in range(256)]
    prompts, params = Workload().draw(151_936)
    assert prompts == expected
    assert params == [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in lengths
    ]
    assert sum(lengths) == 133_966  # the total that nano-vllm's benchmark prints


def test_draws_stay_in_the_vocabulary_and_differ_from_run_to_run():
    prompts, params = SMALL.draw(50)
    assert all(3 <= len(p) <= 20 and max(p) < 50 for p in prompts) and len(prompts) == 6
    assert all(2 <= p.max_tokens <= 9 for p in params)
    assert SMALL.draw(50) == (prompts, params) != SMALL.draw(50, 1)


def test_cases_name_what_is_not_usual():
    assert Workload().key == {"requests": 256, "in": "100-1024", "out": "100-1024"}
    assert Workload(9, (5, 5), (1, 2), 0.0, 3).key == {
        "requests": 9,
        "in": "5",
        "out": "1-2",
        "temperature": 0.0,
        "seed": 3,
    }
    assert Batch(2, 16, 4).key == {"batch": 2, "in": 16, "out": 4}


def figures(found):
    return {(row.case, row.metric): row for row in found.rows}


def test_throughput_counts_tokens_over_the_wall(tiny, monkeypatch):
    walls = iter([2.0, 4.0, 5.0])
    monkeypatch.setattr(
        offline, "time_generate", lambda llm, prompts, params, own=offline.time_generate: (
            next(walls), own(llm, prompts, params)[1],
        ),
    )  # fmt: skip
    found = offline.measure_throughput(tiny, SMALL, repeats=3, options={"max_num_seqs": 3})
    rows = figures(found)
    case = "shape=tiny weights=fp32 kv=fp32 requests=6 in=3-20 out=2-9"
    drawn = [SMALL.draw(101, again) for again in range(3)]
    outs = [sum(p.max_tokens for p in params) for _, params in drawn]
    totals = [out + sum(map(len, prompts)) for out, (prompts, _) in zip(outs, drawn, strict=True)]
    for metric, tokens in (("out_tok_per_s", outs), ("total_tok_per_s", totals)):
        rates = [n / wall for n, wall in zip(tokens, (2.0, 4.0, 5.0), strict=True)]
        assert rows[case, metric].value == statistics.median(rates)
        assert rows[case, metric].repeats == 3
    assert rows[case, "s"].value == 4.0
    assert {row.metric for row in found.rows} <= set(SUITES["throughput"].metrics)


def test_latency_is_that_of_a_whole_batch(tiny):
    found = offline.measure_latency(tiny, Batch(3, 10, 5), repeats=2)
    (row,) = found.rows
    assert row.case.endswith("batch=3 in=10 out=5") and row.metric == "s"
    assert 0 < row.low <= row.value <= row.high


def test_serve_sweeps_the_rates(tiny):
    found = serve.measure_serve(tiny, SMALL, [50.0, math.inf], repeats=2)
    rows = figures(found)
    assert {case.split()[-1] for case, _ in rows} == {"rate=50", "rate=inf"}
    assert {metric for _, metric in rows} == set(SUITES["serve"].metrics) - {"ttft_mean_ms"}
    for case in {case for case, _ in rows}:
        for time in ("ttft", "itl", "e2e"):
            p50, p90, p99 = (rows[case, f"{time}_p{n}_ms"].value for n in (50, 90, 99))
            assert 0 < p50 <= p90 <= p99
        assert rows[case, "ttft_p50_ms"].value <= rows[case, "e2e_p50_ms"].value


def test_a_model_too_small_and_requests_that_fail_are_the_users_mistake(tiny):
    with pytest.raises(UserError, match="longer than the model's context of 128 tokens"):
        offline.measure_throughput(tiny, Workload(2, (100, 100), (29, 29)))
    wide = Workload(2, (60, 60), (60, 60))
    for measure in (
        offline.measure_throughput,
        lambda *a, **k: serve.measure_serve(*a, [9], **k),
    ):
        with pytest.raises(UserError, match="a request failed: the request may reach 120 tokens"):
            measure(tiny, wide, options={"num_blocks": 1})


def test_readers_are_sent_and_clocked():
    prompts, params = Workload(5, (4, 9), (3, 6)).draw(101)

    async def body():
        async with AsyncLLM(model_of(), **options()) as llm:
            return await serve.send_requests(llm, prompts, params, rate=200.0, seed=1)

    timelines = asyncio.run(body())
    sent = [line.sent_at - timelines[0].sent_at for line in timelines]
    wanted = serve.poisson_arrivals(5, 200.0, 1)
    assert all(late >= at - 1e-3 for late, at in zip(sent, wanted, strict=True))
    assert [line.tokens for line in timelines] == [p.max_tokens for p in params]
    assert all(
        line.received_at == sorted(line.received_at) and line.time_to_first_token > 0
        for line in timelines
    )


def test_arrivals_are_a_poisson_process():
    times = serve.poisson_arrivals(20_000, 4.0)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    # the mean of 20,000 exponential gaps is within 5 standard errors, each 1 / sqrt(20,000)
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=5 / 141)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.1)
    assert times[0] == 0.0 and times == serve.poisson_arrivals(20_000, 4.0)
    assert serve.poisson_arrivals(3, math.inf) == [0.0] * 3
    assert serve.poisson_arrivals(9, 1.0, seed=1) != serve.poisson_arrivals(9, 1.0, seed=2)


def test_summaries():
    lines = [
        Timeline(0.0, [1.0, 1.5, 2.5], [1, 2, 4]),
        Timeline(1.0, [4.0], [1]),
    ]
    found = serve.summarize(lines)
    assert found["req_per_s"] == 2 / 4 and found["out_tok_per_s"] == 5 / 4
    assert found["ttft_p50_ms"] == 2000 and found["e2e_p99_ms"] == pytest.approx(2995)
    assert (found["itl_p50_ms"], found["itl_p90_ms"]) == (750, pytest.approx(950))
    assert "itl_p50_ms" not in serve.summarize(lines[1:])


def test_tokens_of_a_part_of_the_time():
    line = Timeline(0.0, [1.0, 2.0, 5.0], [1, 3, 7])
    spans = [(0, 9), (1, 2), (1.5, 5), (2, 4), (5, 9), (0, 0.5)]
    assert [line.tokens_between(*span) for span in spans] == [7, 2, 6, 0, 0, 0]
    assert Timeline(0.0).tokens_between(0, 9) == 0


def test_percentiles():
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0, 0.25, 0.5, 1)] == [1, 1.5, 2, 3]
    assert percentile([7.0], 0.99) == 7
    with pytest.raises(ValueError, match="at least 1 sample"):
        percentile([], 0.5)
