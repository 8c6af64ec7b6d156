"""`bench serve --scenario`: its prompts, its engines and its figures."""

import dataclasses

import pytest
import torch

from llmfast.engine.async_llm import AsyncLLM
from llmfast.engine.llm import LLM
from llmfast.engine.model_runner import ModelRunner
from llmfast.errors import UserError
from llmfast.measure import scenarios, shapes
from llmfast.measure.scenarios import LongPrompts, SharedPrefix
from llmfast.measure.shapes import Source
from llmfast.measure.suites import SUITES
from llmfast.measure.workload import Timeline

TINY = (
    "llama",
    {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
)
PREFIX = SharedPrefix(requests=4, prefix=40, input=5, output=2)
LONG = LongPrompts(requests=2, long=60, every=0.02, running=3, input=5, output=1500)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return Source("tiny")


@pytest.fixture
def engines(monkeypatch):
    """Record the options of each engine that is made, and its computed prompt tokens."""
    made = []
    launch = ModelRunner.launch

    def count(self, scheduled, *args):
        made[-1][1].append(dict(scheduled.num_scheduled_tokens))
        return launch(self, scheduled, *args)

    def watch(kind):
        init = kind.__init__

        def note(self, model, **options):
            made.append((options, []))
            init(self, model, **options)

        monkeypatch.setattr(kind, "__init__", note)

    watch(LLM)
    watch(AsyncLLM)
    monkeypatch.setattr(ModelRunner, "launch", count)
    return made


def test_prompts_share_a_prefix_that_differs_between_repeats():
    prompts, params = PREFIX.draw(50, 0)
    assert all(p[:40] == prompts[0][:40] and len(p) == 45 and max(p) < 50 for p in prompts)
    assert len({tuple(p) for p in prompts}) == 4
    assert all(p.max_tokens == 2 and p.ignore_eos for p in params) and len(params) == 4
    assert PREFIX.draw(50, 0) == (prompts, params)
    others = [PREFIX.draw(50, 1), dataclasses.replace(PREFIX, seed=1).draw(50, 0)]
    assert all(p[0][:40] != prompts[0][:40] for p, _ in others)


def test_prefix_with_the_cache_and_without(tiny, engines):
    found = scenarios.measure_prefix(tiny, PREFIX, repeats=2, options={"block_size": 16})
    case = (
        "shape=tiny weights=fp32 kv=fp32 scenario=prefix requests=4 prefix=40 in=5 out=2 "
        "prefix_cache="
    )
    assert [row.case for row in found.rows] == [case + "on", case + "off"]
    for row in found.rows:
        assert (row.metric, row.repeats) == ("ttft_mean_ms", 2) and 0 < row.low <= row.value
        assert row.metric in SUITES["serve"].metrics
    (on, computed), (off, all_computed) = engines
    assert (on["enable_prefix_caching"], off["enable_prefix_caching"]) == (True, False)
    rounds = 3  # the first is not counted
    # 32 of 40 tokens are whole blocks, which only the first prompt computes
    totals = [sum(sum(step.values()) for step in steps) for steps in (computed, all_computed)]
    assert totals == [rounds * (45 + 3 * 13 + 4), rounds * (4 * 45 + 4)]


def test_the_mean_is_of_all_first_tokens_and_the_first_round_is_not_counted(tiny, monkeypatch):
    class Output:
        def __init__(self, seconds):
            self.metrics = type("Metrics", (), {"time_to_first_token": seconds})

    rounds = iter([[9.0, 9.0], [1.0, 3.0], [4.0, 8.0], [9.0, 9.0], [10.0, 30.0], [40.0, 80.0]])
    monkeypatch.setattr(
        scenarios, "time_generate", lambda *_: (0.0, [Output(s) for s in next(rounds)])
    )
    on, off = scenarios.measure_prefix(tiny, PREFIX, repeats=2).rows
    assert (on.value, on.low, on.high) == (4000, 2000, 6000)
    assert (off.value, off.low, off.high) == (40_000, 20_000, 60_000)


def test_long_prompts_in_chunks_and_first(tiny, engines):
    found = scenarios.measure_long_prompts(tiny, LONG, budget=16, options={"num_blocks": 99})
    case = (
        "shape=tiny weights=fp32 kv=fp32 scenario=long-prompts running=3 in=5 requests=2 long=60 "
        "every=0.02 policy="
    )
    rows = {(row.case, row.metric): row.value for row in found.rows}
    cases = [case + "chunked budget=16", case + "prefill-first"]
    assert list(dict.fromkeys(row.case for row in found.rows)) == cases
    metrics = ["itl_p50_ms", "itl_p99_ms", "ttft_p50_ms", "out_tok_per_s"]
    assert list(rows) == [(c, metric) for c in cases for metric in metrics]
    assert set(metrics) < set(SUITES["serve"].metrics) and all(v > 0 for v in rows.values())
    (chunked, small), (first, whole) = engines
    assert chunked["max_num_batched_tokens"] == 16 and "enable_chunked_prefill" not in chunked
    assert first["enable_chunked_prefill"] is False and "max_num_batched_tokens" not in first
    assert max(sum(step.values()) for step in small) == 16
    assert sum(60 in step.values() for step in whole) in (2, 3)  # two may arrive at once
    assert all(set(step.values()) == {60} for step in whole if 60 in step.values())


def test_answers_that_end_too_early_are_the_users_mistake(tiny):
    early = dataclasses.replace(LONG, output=5)
    with pytest.raises(UserError, match="an answer of 5 tokens ended before the last"):
        scenarios.measure_long_prompts(tiny, early, budget=16, options={"num_blocks": 99})


def test_a_request_that_fails_ends_the_measurement(tiny):
    with pytest.raises(UserError, match="a request failed: the request may reach"):
        scenarios.measure_long_prompts(tiny, LONG, budget=16, options={"num_blocks": 2})


def test_only_gaps_beside_a_long_prompt_count():
    """Let long prompts wait from 1 to 4 and from 8 to 9, and tokens arrive at the given times."""
    running = [
        Timeline(0.0, [0.5, 2.5, 3.0, 6.0, 7.0, 10.0], [1, 2, 3, 4, 5, 7]),
        Timeline(0.0, [0.9, 1.0, 4.0, 5.0, 6.0], [1, 2, 3, 4, 5]),
    ]
    long = [Timeline(1.0, [4.0, 6.0], [1, 2]), Timeline(8.0, [9.0, 9.5], [1, 3])]
    found = scenarios.summarize(running, long)
    # gaps of the first: 2, 0.5, 3 and 3 (none waits from 6 to 7); gap of the other: 3
    assert found["itl_p50_ms"] == 3000
    assert found["itl_p99_ms"] == 3000
    assert found["ttft_p50_ms"] == 2000
    # from 1 to 9.5: four of the first (2.5, 3, 6, 7), three of the second, five of the long ones
    assert found["out_tok_per_s"] == pytest.approx((4 + 3 + 5) / 8.5)
