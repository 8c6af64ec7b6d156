"""Parameters that mask tokens, processors, and prompt log-probabilities, against plain loops."""

import functools
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import LONG, VOCABULARY, check_empty, engine, logits_of, text_engine
from llmfast import SamplingParams
from llmfast.engine import core
from llmfast_kernels.sampling.reference import sample_tokens_reference
from tiny_models import make

pytestmark = pytest.mark.usefixtures("how")

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPT = LONG[:19]


def run(llm, prompts, params):
    return llm.generate(prompts, params, use_tqdm=False)


def plain_tokens(mask, length, *, seed, temperature, processor=None):
    """Sample one token at a time; ``mask(ids)`` is added to the logits after the ids so far."""
    got = []
    for number in range(length):
        logits = logits_of(PROMPT + got)[-1]
        if processor is not None:
            logits = processor(list(got), logits)
        sampled = sample_tokens_reference(
            (logits + mask(got))[None],
            temperature=torch.tensor([temperature]),
            seeds=torch.tensor([seed]),
            positions=torch.tensor([number]),
        )
        got.append(int(sampled.tokens))
    return got


def nothing(ids):
    return torch.zeros(VOCABULARY)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_only_allowed_tokens_are_chosen(temperature):
    allowed = [5, 17, 40, 41, 99]

    def mask(ids):
        bias = torch.full((VOCABULARY,), -math.inf)
        bias[allowed] = 0
        bias[17] += 2.5
        return bias

    params = SamplingParams(
        temperature=temperature,
        seed=3,
        max_tokens=20,
        allowed_token_ids=allowed,
        logit_bias={17: 2.5, 30: 100.0},
    )
    with engine() as llm:
        output, _ = run(llm, [PROMPT, LONG[:3]], [params, GREEDY])
    expected = plain_tokens(mask, 20, seed=3, temperature=temperature)
    assert output.outputs[0].token_ids == expected
    assert set(expected) <= set(allowed)
    assert len(set(expected)) > 1 or temperature == 0


def test_a_bad_word_is_never_completed():
    with engine() as llm:
        (free,) = run(llm, [PROMPT], SamplingParams(temperature=0, max_tokens=20))
        a, b, c, d, *_ = free.outputs[0].token_ids
        words = [[a, b], [c], [b, d, 7]]

        def mask(ids):
            bias = nothing(ids)
            for *head, last in words:
                if ids[len(ids) - len(head) :] == head:
                    bias[last] = -math.inf
            return bias

        params = SamplingParams(temperature=0, max_tokens=20, bad_words=words)
        (output,) = run(llm, [PROMPT], params)
        got = output.outputs[0].token_ids
        assert got == plain_tokens(mask, 20, seed=0, temperature=0.0)
        assert got[0] == a and got[1] != b and c not in got
        # what ends in the prompt is not completed by the answer: the word begins in the answer
        begun = SamplingParams(temperature=0, max_tokens=20, bad_words=[[PROMPT[-1], a]])
        assert run(llm, [PROMPT], begun)[0].outputs[0].token_ids == free.outputs[0].token_ids


def test_a_bad_word_as_text():
    with text_engine() as llm:
        (free,) = run(llm, "AB", SamplingParams(seed=8, max_tokens=40))
        text = free.outputs[0].text
        word = next(text[i : i + 2] for i in range(5, 30) if "\ufffd" not in text[i : i + 2])
        (output,) = run(llm, "AB", SamplingParams(seed=8, max_tokens=40, bad_words=[word]))
        at = text.index(word)
        assert word not in output.outputs[0].text
        assert output.outputs[0].text.startswith(text[: at + 1])  # all but its last byte


def test_processors_see_ids_and_logits_and_what_they_return_is_drawn_from():
    seen = []

    def sharpen(ids, logits):
        seen.append(list(ids))
        return logits * 1.5

    def no_repeat(ids, logits):
        logits[ids] = -math.inf  # in place: it is a copy
        return logits

    def both(ids, logits):
        return no_repeat(ids, logits * 1.5)

    params = SamplingParams(
        seed=5, max_tokens=15, logits_processors=[sharpen, no_repeat], logprobs=3
    )
    with engine(max_num_batched_tokens=7) as llm:
        output, beside = run(llm, [PROMPT, LONG[:30]], [params, GREEDY])
        (alone,) = run(llm, [LONG[:30]], GREEDY)
    (answer,) = output.outputs
    got = answer.token_ids
    assert got == plain_tokens(nothing, 15, seed=5, temperature=1.0, processor=both)
    assert len(set(got)) == 15
    assert seen == [got[:n] for n in range(15)]
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids
    raw = logits_of(PROMPT + got)[len(PROMPT) - 1 : -1].log_softmax(-1)
    for token, row, found in zip(got, raw, answer.logprobs, strict=True):
        assert set(found) == {token, *row.topk(3).indices.tolist()}
        for each, logprob in found.items():
            # the model's own norms and rotations are in float32
            assert logprob.logprob == pytest.approx(float(row[each]), abs=1e-5)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda ids, row: 1 / 0, "a logits processor failed: ZeroDivisionError"),
        (lambda ids, row: None, r"it must return a tensor of shape \(101,\), got NoneType"),
        (lambda ids, row: row[:5], r"got a tensor of shape \(5,\)"),
    ],
)
def test_a_processor_that_fails_ends_its_request_alone(result, words):
    def late(ids, row):
        return result(ids, row) if len(ids) == 4 else row

    bad = SamplingParams(temperature=0, max_tokens=12, logits_processors=[late])
    with engine() as llm:
        (free,) = run(llm, [PROMPT], GREEDY)
        before, failed, after = run(llm, [PROMPT] * 3, [GREEDY, bad, GREEDY])
        check_empty(llm)
    (answer,) = failed.outputs
    expected = free.outputs[0].token_ids
    assert (answer.finish_reason, answer.token_ids) == ("error", expected[:4])
    assert re.search(words, answer.error)
    for output in (before, after):
        assert output.outputs[0].token_ids == expected


# ---------------------------------------------------------------- log-probabilities of prompts


def assert_scores(output, prompt, most):
    expected = logits_of(prompt).log_softmax(-1)
    first, *rest = output.prompt_logprobs
    assert first is None and len(rest) == len(prompt) - 1
    for token, row, found in zip(prompt[1:], expected, rest, strict=False):
        assert set(found) == {token, *row.topk(most).indices.tolist()}
        for each, logprob in found.items():
            assert logprob.logprob == pytest.approx(float(row[each]), abs=1e-5)


@pytest.mark.parametrize("seqs", [1, 3, 64])
@pytest.mark.parametrize("budget", [5, 400])
def test_prompts_are_scored(seqs, budget):
    scored = SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=2)
    own = SamplingParams(seed=4, n=2, max_tokens=1, prompt_logprobs=0)
    prompts = [LONG[:33], LONG[:50], LONG[:48], LONG[:1], LONG[5:40]]
    params = [GREEDY, scored, own, scored, GREEDY]
    with engine(max_num_seqs=seqs, max_num_batched_tokens=max(budget, seqs)) as llm:
        plain = run(llm, prompts, [SamplingParams(temperature=0, max_tokens=9)] * 5)
        outputs = run(llm, prompts, params)  # their prefixes are cached by now
        check_empty(llm)
    for i, most in ((1, 2), (2, 0), (3, 2)):
        assert_scores(outputs[i], prompts[i], most)
    assert outputs[0].prompt_logprobs is None
    for i in (1, 3):
        assert outputs[i].outputs[0].token_ids == plain[i].outputs[0].token_ids
    assert outputs[1].metrics.cached_tokens == 0


def test_prompts_are_scored_once_in_spite_of_preemptions():
    scored = SamplingParams(temperature=0, max_tokens=30, prompt_logprobs=1)
    prompts = [LONG[:20], LONG[10:30], LONG[20:40]]
    with engine(num_blocks=5, max_num_batched_tokens=11) as llm:
        outputs = run(llm, prompts, scored)
        check_empty(llm)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_scores(output, prompt, 1)
        assert len(output.outputs[0].token_ids) == 30


def test_a_prompt_is_scored_on_after_a_step_that_raised(monkeypatch):
    scored = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    with engine(max_num_batched_tokens=7) as llm:
        stream = llm.stream([LONG[:40], LONG[:3]], [scored, GREEDY])
        next(stream)
        own, calls = llm.core.model_runner.launch, []

        def fail(*args):
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("out of luck")
            return own(*args)

        monkeypatch.setattr(llm.core.model_runner, "launch", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            run(llm, [LONG[:9]], GREEDY)
        last = {output.request_id: output for output in stream}
        assert_scores(last["0"], LONG[:40], 1)
        check_empty(llm)


def test_scores_that_are_nan_fail_their_request():
    model = make("Llama").double()
    bad = min({*range(3, VOCABULARY)} - {*LONG})
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan
    scored = SamplingParams(temperature=0, n=2, prompt_logprobs=0)
    bias = SamplingParams(temperature=0, max_tokens=3, logit_bias={bad: -math.inf})
    with engine(model=model) as llm:
        failed, good = run(llm, [[*LONG[:20], bad, *LONG[:9]], LONG[:9]], [scored, bias])
        check_empty(llm)
    assert [answer.finish_reason for answer in failed.outputs] == ["error"] * 2
    assert "NaN" in failed.outputs[0].error
    assert len(good.outputs[0].token_ids) == 3


def test_pieces_are_text_where_there_is_a_tokenizer():
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with text_engine() as llm:
        (output,) = run(llm, "ABC", params)
    pieces = [next(iter(found.values())).decoded_token for found in output.prompt_logprobs[1:]]
    assert pieces == ["B", "C"]


# -------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids must be a list of at least one token id"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": 5}, "allowed_token_ids"),
        ({"bad_words": "word"}, "bad_words must be a list of texts or lists of token ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [[]]}, "bad_words"),
        ({"bad_words": [[1.5]]}, "bad_words"),
        ({"bad_words": 3}, "bad_words"),
        ({"logits_processors": [3]}, "logits_processors must be a list of functions"),
        ({"logits_processors": len}, "logits_processors"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be an integer, 0 or more or None; got -1"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_parameters(wrong, words):
    with pytest.raises(ValueError, match=f"SamplingParams: {words}"):
        SamplingParams(**wrong)


def test_requests_that_cannot_be_run_fail_alone():
    cases = [
        ({"allowed_token_ids": [5, 101]}, "allowed_token_ids has the token id 101"),
        ({"bad_words": [[5], [7, 101]]}, "bad_words has the token id 101"),
        ({"bad_words": ["text"]}, "bad_words as texts want a tokenizer"),
        ({"prompt_logprobs": 102}, "prompt_logprobs is 102, more than the 101 tokens"),
    ]
    params = [SamplingParams(**wrong) for wrong, _ in cases]
    with engine() as llm:
        *failed, good = run(llm, [PROMPT] * 5, [*params, GREEDY])
        check_empty(llm)
    for output, (_, words) in zip(failed, cases, strict=True):
        assert output.outputs[0].finish_reason == "error" and words in output.outputs[0].error
    assert len(good.outputs[0].token_ids) == 12


def test_without_them_a_step_is_not_touched(monkeypatch):
    """The code of unused features is not reached, so it costs nothing."""
    monkeypatch.setattr(core, "score", None)
    rows = []
    with engine() as llm:
        own = llm.core.model_runner.launch
        monkeypatch.setattr(
            llm.core.model_runner,
            "launch",
            lambda plan, *args: rows.append(len(args[0])) or own(plan, *args),
        )
        run(llm, [PROMPT], GREEDY)
    assert rows == [1] * 12


# ---------------------------------------------------------------------------------- priorities


def test_priorities_change_the_order_and_nothing_else():
    params = SamplingParams(seed=2, max_tokens=20)
    prompts = [LONG[:20], LONG[10:30], LONG[20:40]]
    with engine(num_blocks=5, enable_prefix_caching=False) as llm:
        usual = run(llm, prompts, params)
        turned = llm.generate(prompts, params, use_tqdm=False, priority=[2, 1, 0])
        one = list(llm.stream(prompts[0], params, priority=7))[-1]
        check_empty(llm)
    expected = [output.outputs[0].token_ids for output in usual]
    assert [output.outputs[0].token_ids for output in turned] == expected
    assert one.outputs[0].token_ids == expected[0]
    for outputs in (usual, turned[::-1]):
        assert outputs[0].metrics.preemptions == 0
        ends = [output.metrics.finished for output in outputs]
        assert ends[0] == min(ends) and ends[2] == max(ends)


def test_bad_priorities():
    with engine() as llm:
        with pytest.raises(ValueError, match="as many priorities as prompts, 1; got 2"):
            llm.generate([PROMPT], GREEDY, use_tqdm=False, priority=[1, 2])
        with pytest.raises(TypeError):
            llm.generate([PROMPT], GREEDY, use_tqdm=False, priority=0.5)
        check_empty(llm)


# ------------------------------------------------------------------------------- in any company


def halve(ids, logits):
    return logits / (2 if len(ids) % 2 else 1)


MIXED_PROMPTS = [LONG[:n] for n in (1, 16, 33, 47, 60)]
MIXED = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=1),
    SamplingParams(seed=1, n=2, max_tokens=12, prompt_logprobs=0, logprobs=1),
    SamplingParams(seed=2, max_tokens=15, allowed_token_ids=list(range(3, 60)), min_tokens=4),
    SamplingParams(seed=3, max_tokens=15, logits_processors=[halve], bad_words=[[7, 8], [9]]),
]


def shape(output):
    """Return what must not depend on other requests: tokens, and values of log-probabilities."""
    numbers = []
    for found in [*(output.prompt_logprobs or ()), *(output.outputs[0].logprobs or ())]:
        numbers += [(token, each.logprob) for token, each in sorted((found or {}).items())]
    kept = [(answer.token_ids, answer.finish_reason) for answer in output.outputs]
    return kept, [token for token, _ in numbers], [number for _, number in numbers]


@functools.cache
def alone(prompt, params):
    with engine(enable_prefix_caching=False) as llm:
        return shape(run(llm, [MIXED_PROMPTS[prompt]], MIXED[params])[0])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from([0, 0, -1, 2])),
        min_size=2,
        max_size=7,
    ),
    blocks=st.integers(6, 20),
    seqs=st.sampled_from([1, 2, 4, 16]),
    budget=st.sampled_from([3, 16, 50, 400]),
    caching=st.booleans(),
    chunked=st.booleans(),
)
def test_any_mix_yields_what_each_yields_alone(asked, blocks, seqs, budget, caching, chunked):
    prompts, params, priorities = zip(*asked, strict=True)
    with engine(
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        enable_chunked_prefill=chunked,
    ) as llm:
        outputs = llm.generate(
            [MIXED_PROMPTS[i] for i in prompts],
            [MIXED[i] for i in params],
            use_tqdm=False,
            priority=priorities,
        )
        check_empty(llm)
    for output, prompt, param in zip(outputs, prompts, params, strict=True):
        tokens, ids, numbers = shape(output)
        wanted = alone(prompt, param)
        assert (tokens, ids) == wanted[:2]
        # 1e-9: thousands of float64 roundings
        assert numbers == pytest.approx(wanted[2], abs=1e-9)
