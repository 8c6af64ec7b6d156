"""LLM on tiny models in float64: a request yields what it yields alone, whatever runs beside it."""

import functools
import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmfast
from engines import check_empty, executor_of, model_of
from fake_graphs import use_fake_graphs
from generating import tokenizer as byte_tokenizer
from llmfast import LLM, SamplingParams
from llmfast.engine import build, model_runner
from llmfast.engine.model_runner import ModelRunner
from llmfast.engine.outputs import OutputProcessor
from llmfast.errors import UserError
from llmfast.runner.executor import Executor
from llmfast.runner.warmup import compile_steps
from llmfast_kernels.sampling.reference import sample_tokens_reference
from tiny_models import make, tokens

pytestmark = pytest.mark.usefixtures("how")
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def engine(kind="Llama", model=None, **kwargs):
    kwargs = {"num_blocks": 40, "block_size": 16, "max_num_seqs": 16, **kwargs}
    llm = LLM(model_of(kind) if model is None else model, **kwargs)
    cache = executor_of(llm).cache
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)  # so that what is read without having been written shows
    return llm


def ids(*lengths):
    """Return prompts that differ from their first token on."""
    return [[3 + i, *tokens(1, n)[0, 1:].tolist()] for i, n in enumerate(lengths)]


def answers(output):
    return [(c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs]


def greedy_of(model, prompt, new_tokens):
    output = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


# --------------------------------------------------------------------- what it is judged by


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3", "Granite", "Olmo2", "GPTNeoX"])
def test_greedy_is_what_transformers_generates(kind):
    prompts = ids(1, 5, 17, 40, 33)
    with engine(kind, num_blocks=14, max_num_batched_tokens=9) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        check_empty(llm)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert answers(output) == [(greedy_of(model_of(kind), prompt, 20), "length", None)]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 1.0},
        {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.9, "repetition_penalty": 1.6},
        {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 1.1},
        {"temperature": 0.0, "repetition_penalty": 1.8, "logit_bias": {5: 3.0, 70: -float("inf")}},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_tokens_are_those_of_the_models_logits_and_the_parameters(kwargs):
    """Penalties count prompt and output apart; a draw is of the seed and the token's number."""
    prompt, seed, length = ids(19)[0], 77, 25
    with engine(max_num_batched_tokens=8) as llm:
        params = SamplingParams(seed=seed, max_tokens=length, **kwargs)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    got = output.outputs[0].token_ids
    given = {name: torch.tensor([kwargs[name]]) for name in kwargs if name != "logit_bias"}
    seen = torch.zeros(1, 101, dtype=torch.bool)
    seen[0, prompt] = True
    bias = torch.zeros(1, 101)
    for token, by in kwargs.get("logit_bias", {}).items():
        bias[0, token] = by
    for number in range(length):
        with torch.no_grad():
            logits = model_of()(torch.tensor([prompt + got[:number]])).logits[0, -1:]
        sampled = sample_tokens_reference(
            logits,
            **given,
            bias=bias,
            prompt_seen=seen,
            output_counts=torch.tensor(got[:number], dtype=torch.int64)
            .bincount(minlength=101)[None]
            .int(),
            seeds=torch.tensor([seed]),
            positions=torch.tensor([number]),
        )
        assert got[number] == int(sampled.tokens)


# ------------------------------------------------------------------- alone and in any company

LONG = tokens(1, 60)[0].tolist()
PROMPTS = [LONG[:n] for n in (1, 15, 16, 17, 33, 48, 60)] + [[9, *LONG[:20]], [*LONG[:32], 5, 6]]
PARAMS = [
    GREEDY,
    SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.3, logprobs=2),
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(seed=-5, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, max_tokens=24),
    SamplingParams(seed=2, n=3, max_tokens=10, presence_penalty=0.5, frequency_penalty=0.7),
    SamplingParams(temperature=0, max_tokens=25, min_tokens=9, stop_token_ids=list(range(3, 40))),
    SamplingParams(seed=3, max_tokens=1, n=2, logit_bias={7: 4.0, 8: -float("inf")}, logprobs=0),
]


@functools.cache
def alone(prompt, params):
    """Return the answers to a request that runs alone in an engine without a prefix cache."""
    with engine(enable_prefix_caching=False) as llm:
        parts = []
        whole = PARAMS[params]
        (output,) = llm.generate([PROMPTS[prompt]], whole, use_tqdm=False)
        for completion in output.outputs:
            logprobs = completion.logprobs
            if logprobs is not None:
                logprobs = [{t: lp.logprob for t, lp in found.items()} for found in logprobs]
            parts.append((completion.token_ids, completion.finish_reason, logprobs))
    return parts


def assert_as_alone(output, prompt, params):
    for got, (token_ids, reason, logprobs) in zip(
        output.outputs, alone(prompt, params), strict=True
    ):
        if got.finish_reason == "abort":
            assert got.token_ids == token_ids[: len(got.token_ids)]
            continue
        assert (got.token_ids, got.finish_reason) == (token_ids, reason)
        assert (got.logprobs is None) == (logprobs is None)
        for found, expected in zip(got.logprobs or (), logprobs or (), strict=True):
            # 1e-9: thousands of float64 roundings
            assert {t: lp.logprob for t, lp in found.items()} == pytest.approx(expected, abs=1e-9)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_any_mix_of_requests_yields_what_each_yields_alone(data):
    draw = data.draw
    llm = engine(
        num_blocks=draw(st.integers(6, 24), "blocks"),
        max_num_batched_tokens=draw(st.sampled_from([3, 5, 16, 50, 400]), "budget"),
        max_num_seqs=draw(st.sampled_from([1, 2, 4, 16]), "seqs"),
        enable_prefix_caching=draw(st.booleans(), "caching"),
        enable_chunked_prefill=draw(st.booleans(), "chunked"),
    )
    streams, last = {}, {}

    def advance(key):
        output = next(streams[key], None)
        if output is None:
            del streams[key]
        else:
            last[key] = output
            assert all(len(c.token_ids) <= 30 for c in output.outputs)

    with llm:
        for number in range(draw(st.integers(2, 12), "actions")):
            what = draw(st.sampled_from(["arrive", "arrive", "advance", "leave", "abort"]))
            if what == "arrive" or not streams:
                prompt = draw(st.integers(0, len(PROMPTS) - 1))
                params = draw(st.integers(0, len(PARAMS) - 1))
                key = (number, prompt, params)
                streams[key] = llm.stream(PROMPTS[prompt], PARAMS[params])
                advance(key)
                continue
            key = draw(st.sampled_from(sorted(streams)))
            if what == "advance":
                for _ in range(draw(st.integers(1, 15))):
                    if key in streams:
                        advance(key)
            elif what == "leave":
                streams.pop(key).close()
                last.pop(key)
            elif key in last:
                llm.abort(last[key].request_id)
                while key in streams:
                    advance(key)
        while streams:
            advance(min(streams))
        for (_, prompt, params), output in last.items():
            assert output.finished
            assert_as_alone(output, prompt, params)
        check_empty(llm)


@pytest.mark.parametrize(("rows", "tokens", "blocks"), [(16, 700, 60), (1, 8, 40), (3, 64, 4)])
def test_warming_up_changes_nothing(rows, tokens, blocks):
    prompts = ids(9, 20)
    with engine(max_num_seqs=rows, max_num_batched_tokens=tokens, num_blocks=blocks) as llm:
        compile_steps(executor_of(llm), tokens)
        got = [answers(output) for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
        check_empty(llm)
    with engine() as llm:
        wanted = [answers(output) for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    assert got == wanted


def test_warming_up_runs_every_sampling_of_few_rows_and_of_many(how, monkeypatch):
    """Warming up runs no graph: that would sample with every filter and compile no other kernel."""
    seen, tokens, launch = set(), [], Executor.launch

    def note(self, inputs):
        ops, shape = inputs.key.sampling, inputs.shape
        seen.add((inputs.num_sampled > 8, ops.draws, ops.filters))
        tokens.append(shape.tokens)
        return launch(self, inputs)

    with engine(max_num_seqs=32, max_num_batched_tokens=700, num_blocks=60) as llm:
        monkeypatch.setattr(Executor, "launch", note)
        compile_steps(executor_of(llm), 700)
        check_empty(llm)
    ways = [(False, False), (True, False), (True, True)]  # greedy, drawn, drawn with filters
    # up to 8 rows sampling lays out otherwise than more
    assert seen == {(large, *way) for large in (False, True) for way in ways}
    assert tokens[0] == 700 and (how is None or not how.replayed)


def test_a_cache_that_runs_out_changes_nothing():
    with engine(num_blocks=7, max_num_seqs=4) as llm:
        outputs = llm.generate([PROMPTS[i] for i in (2, 3, 1, 7)], PARAMS[3], use_tqdm=False)
        assert sum(output.metrics.preemptions for output in outputs) > 0
        for prompt, output in zip((2, 3, 1, 7), outputs, strict=True):
            assert_as_alone(output, prompt, 3)
        check_empty(llm)


def test_a_prefix_is_computed_once(monkeypatch):
    steps = []
    with engine(num_blocks=60) as llm:
        launch = llm.core.model_runner.launch

        def count(plan, *args):
            steps.append(sum(plan.num_scheduled_tokens.values()))
            return launch(plan, *args)

        monkeypatch.setattr(llm.core.model_runner, "launch", count)
        prompts = [[*LONG[:48], 5 + i] for i in range(4)]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2), False)
        assert steps[0] == 49 and sum(steps) == 49 + 3 + 4  # and one token each to follow
        assert [o.metrics.cached_tokens for o in outputs] == [0, 48, 48, 48]
        (again,) = llm.generate([LONG[:48]], PARAMS[0], use_tqdm=False)
        assert again.metrics.cached_tokens == 32  # its last block gives the logits
        assert_as_alone(again, 5, 0)


def test_many_answers_share_the_prompt_and_differ():
    params = SamplingParams(n=4, seed=11, max_tokens=8)
    with engine(enable_prefix_caching=False) as llm:
        (output,) = llm.generate([LONG[:40]], params, use_tqdm=False)
        (one,) = llm.generate([LONG[:40]], SamplingParams(seed=11, max_tokens=8), use_tqdm=False)
        check_empty(llm)
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    assert output.outputs[0].token_ids == one.outputs[0].token_ids


def test_seeds():
    def run(llm, **kwargs):
        params = SamplingParams(max_tokens=12, **kwargs)
        return llm.generate([LONG[:9]], params, use_tqdm=False)[0].outputs[0].token_ids

    with engine(seed=1) as first, engine(seed=1) as same, engine(seed=2) as other:
        a, b = run(first), run(first)
        assert a != b and [run(same), run(same)] == [a, b] and run(other) != a
        assert run(first, seed=5) == run(other, seed=5) != run(first, seed=6)


# ---------------------------------------------------------------------------- parameters


def test_logprobs_are_of_the_raw_logits():
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, logit_bias={9: 100.0})
    with engine() as llm:
        (output,) = llm.generate([LONG[:5]], params, use_tqdm=False)
    (answer,) = output.outputs
    assert answer.token_ids == [9, 9, 9]
    with torch.no_grad():
        logits = model_of()(torch.tensor([[*LONG[:5], 9, 9]])).logits[0, 4:]
    expected = logits.log_softmax(-1)
    for row, found in zip(expected, answer.logprobs, strict=True):
        assert set(found) == {9, *row.topk(2).indices.tolist()}
        for token, logprob in found.items():
            # the model's own norms and rotations are in float32
            assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-5)
            assert logprob.decoded_token is None
    assert answer.cumulative_logprob == pytest.approx(float(expected[:, 9].sum()), abs=1e-5)


def test_end_tokens_stop_and_min_tokens_mask_them():
    model = make("Llama").double()
    plain = greedy_of(model, LONG[:9], 12)
    end = plain[3]
    first = plain.index(end)
    model.generation_config.eos_token_id = [end, 2]
    with engine(model=model) as llm:

        def run(**kwargs):
            params = SamplingParams(temperature=0, max_tokens=12, **kwargs)
            return answers(llm.generate([LONG[:9]], params, use_tqdm=False)[0])[0]

        assert run() == (plain[: first + 1], "stop", None)
        assert run(ignore_eos=True) == (plain, "length", None)
        assert run(ignore_eos=True, stop_token_ids=[end]) == (plain[: first + 1], "stop", end)
        masked, _, _ = run(min_tokens=7)
        assert len(masked) >= 7 and end not in masked[:7] and masked[:first] == plain[:first]
        for least in (0, 3):
            favoured, reason, _ = run(min_tokens=least, logit_bias={end: 1000.0})
            assert len(favoured) == least + 1 and favoured.index(end) == least
            assert reason == "stop"


def test_max_tokens_none_goes_as_far_as_the_model():
    params = SamplingParams(temperature=0, max_tokens=None)
    with engine(max_model_len=50) as llm:
        (output,) = llm.generate([LONG[:9]], params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 41
    with engine(num_blocks=2, max_model_len=50) as llm:
        (output,) = llm.generate([LONG[:9]], params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 24  # the last is not in the cache
        assert output.outputs[0].finish_reason == "length"
        check_empty(llm)
    with engine(num_blocks=2) as llm:
        assert llm.max_model_len == 32


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n": 0}, "n must be an integer, 1 or more; got 0"),
        ({"n": True}, "n must be an integer"),
        ({"temperature": -0.1}, "temperature must be a number, 0 or more; got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature must be a number, 0 or more; got 'hot'"),
        ({"top_p": 0}, "top_p must be a number, more than 0 and at most 1; got 0"),
        ({"top_k": -2}, "top_k must be an integer, -1 or more; got -2"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty must be a number, from -2 to 2; got 3"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number, more than 0; got 0"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop must be a text that is not empty, or a list of them"),
        ({"stop": 5}, "stop must be"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": 7}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False; got 1"),
        ({"min_tokens": 17}, r"min_tokens must be at most max_tokens \(16\); got 17"),
        ({"max_tokens": 0}, "max_tokens must be an integer, 1 or more or None; got 0"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias must be a dictionary"),
        ({"logit_bias": [1]}, "logit_bias"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_parameters(wrong, words):
    with pytest.raises(ValueError, match=f"SamplingParams: {words}"):
        SamplingParams(**wrong)


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)
    with pytest.raises(TypeError, match="swap_space"):
        LLM(model_of(), swap_space=4)
    with engine() as llm:
        with pytest.raises(TypeError, match="lora_request"):
            llm.generate([LONG], lora_request=None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be 1 or more; got 0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be 1 or more; got 0"),
        ({"num_blocks": 0}, "num_blocks must be 1 or more; got 0"),
        ({"block_size": 24}, "block_size must be 16, 32, 64, 128 or 256; got 24"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization must be more than 0"),
        ({"max_model_len": 257}, "max_model_len is 257; the model was made for 256 tokens"),
    ],
)
def test_bad_arguments_of_the_engine(wrong, words):
    with pytest.raises(ValueError, match=words):
        engine(**wrong)


# -------------------------------------------------------------------------------- faults


def failed(output):
    (answer,) = output.outputs
    assert output.finished and (answer.finish_reason, answer.token_ids) == ("error", [])
    return answer.error


def test_requests_that_cannot_be_run_fail_and_the_others_do_not():
    good = PARAMS[3]
    cases = [
        ([], good, "the prompt is empty"),
        ([5] * 64, good, "the prompt has 64 tokens and max_model_len is 64"),
        ([5, 101], good, "the prompt has the token id 101; the model's are 0 to 100"),
        ([5, -1], good, "token id -1"),
        ([5], SamplingParams(max_tokens=50), "may reach 51 tokens, which take 4 blocks of 16"),
        ([5] * 60, SamplingParams(max_tokens=None), "may reach 61 tokens, which take 4 blocks"),
        ([5], SamplingParams(stop_token_ids=[1000]), "stop_token_ids has the token id 1000"),
        ([5], SamplingParams(logit_bias={101: 1.0}), "logit_bias has the token id 101"),
        ([5], SamplingParams(logprobs=102), "logprobs is 102, more than the 101 tokens"),
        ([5], SamplingParams(stop="x"), "stop texts want a tokenizer"),
    ]
    prompts, params = [PROMPTS[3]], [good]
    for prompt, param, _ in cases:
        prompts += [prompt, PROMPTS[1]]
        params += [param, good]
    with engine(num_blocks=3, max_model_len=64) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        check_empty(llm)
        assert [o.finished for o in llm.stream([[], [5]], good)].count(True) == 2
        check_empty(llm)
    assert_as_alone(outputs[0], 3, 3)
    for (_, _, words), bad, beside in zip(cases, outputs[1::2], outputs[2::2], strict=True):
        assert words in failed(bad)
        assert_as_alone(beside, 1, 3)


@pytest.mark.parametrize("budget", [3, 400])
@pytest.mark.parametrize("n", [1, 2])
def test_logits_that_are_nan_fail_their_request_alone(budget, n):
    model = make("Llama").double()
    bad = min({*range(3, 101)} - {*LONG})
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan
    prompts = [LONG[:17], [*LONG[:40], bad, *LONG[:9]], PROMPTS[1]]
    bias = {bad: -float("inf")}
    params = [
        SamplingParams(temperature=0, max_tokens=15, logit_bias=bias),
        SamplingParams(temperature=0, max_tokens=15, logit_bias=bias, n=n),
        SamplingParams(seed=4, max_tokens=15, logit_bias=bias),
    ]
    with engine() as llm:
        expected = [answers(o) for o in llm.generate(prompts, params, use_tqdm=False)]
    with engine(model=model, max_num_batched_tokens=budget) as llm:
        for _ in range(2):  # nothing of it is found in the cache
            got = llm.generate(prompts, params, use_tqdm=False)
            check_empty(llm)
            assert [answers(got[i]) for i in (0, 2)] == [expected[0], expected[2]]
            assert [a.finish_reason for a in got[1].outputs] == ["error"] * n
            assert all("NaN" in a.error and not a.token_ids for a in got[1].outputs)
        assert got[1].metrics.cached_tokens <= 32


def test_nothing_left_to_choose():
    bias = dict.fromkeys(range(101), -float("inf"))
    with engine() as llm:
        bad, good = llm.generate(
            [LONG[:5], PROMPTS[2]], [SamplingParams(logit_bias=bias), PARAMS[3]], use_tqdm=False
        )
        assert "every token is barred" in failed(bad)
        assert_as_alone(good, 2, 3)
        check_empty(llm)


@pytest.mark.parametrize(
    ("where", "nth"),
    [((ModelRunner, "launch"), 1), ((ModelRunner, "launch"), 4), ((OutputProcessor, "append"), 3)],
)
def test_a_step_that_raises_leaves_the_engine_usable(where, nth, monkeypatch):
    with engine() as llm:
        stream = llm.stream(PROMPTS[7], PARAMS[4])
        next(stream)  # the next step copies a block for two more answers
        original, calls = getattr(*where), []

        def fail(self, *args):
            calls.append(args)
            if len(calls) == nth:
                raise RuntimeError("out of luck")
            return original(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(*where, fail)
            with pytest.raises(RuntimeError, match="out of luck"):
                llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
        assert len(llm.core.requests) == 1  # the stream's
        *_, output = stream
        assert_as_alone(output, 7, 4)
        check_empty(llm)
        (output,) = llm.generate(PROMPTS[3], PARAMS[3], use_tqdm=False)
        assert_as_alone(output, 3, 3)


def test_a_consumer_that_stops_reading():
    with engine(num_blocks=8) as llm:
        for _ in llm.stream([PROMPTS[5]] * 3, PARAMS[3]):
            break
        gc.collect()
        check_empty(llm)
        llm.stream(PROMPTS[5], PARAMS[3])  # never asked for an output
        check_empty(llm)


def test_abort():
    with engine(max_num_seqs=1) as llm:
        stream = llm.stream([PROMPTS[3], PROMPTS[4]], PARAMS[0])
        first = next(stream)
        llm.abort("no such request")
        llm.abort(str(int(first.request_id) + 1))  # that one waits
        outputs = {}
        for output in stream:
            outputs[output.request_id] = output
            if len(output.outputs[0].token_ids) == 5:
                llm.abort(output.request_id)
        running, waiting = outputs.values()
        if running.request_id != first.request_id:
            running, waiting = waiting, running
        assert running.outputs[0].token_ids == alone(3, 0)[0][0][:5]
        assert answers(waiting) == [([], "abort", None)]
        assert running.outputs[0].finish_reason == "abort"
        check_empty(llm)


# ----------------------------------------------------------------------------------- text


@functools.cache
def text_model():
    return make("Llama").double()


def text_engine(**kwargs):
    return engine(model=text_model(), tokenizer=byte_tokenizer(), **kwargs)


def test_prompts_as_texts_ids_and_dictionaries():
    tokenizer = byte_tokenizer()
    one, two = tokenizer.encode("AB"), tokenizer.encode("hey")
    with text_engine() as llm:

        def run(prompts, params=GREEDY):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [(o.prompt, o.prompt_token_ids, o.outputs[0].token_ids) for o in outputs]

        ((_, _, a), (_, _, b)) = both = run([one, two])
        assert both == [(None, one, a), (None, two, b)]
        assert run(["AB", "hey"]) == [("AB", one, a), ("hey", two, b)]
        assert run("AB") == [("AB", one, a)] and run(one) == [(None, one, a)]
        assert run(torch.tensor(one)) == [(None, one, a)]
        assert run([{"prompt": "AB"}, {"prompt_token_ids": two}]) == [
            ("AB", one, a),
            (None, two, b),
        ]
        assert run([]) == []
        (output,) = llm.generate("AB", GREEDY, use_tqdm=False)
        assert output.outputs[0].text == tokenizer.decode(a)
        short = SamplingParams(temperature=0, max_tokens=3)
        assert run(["AB", "hey"], [GREEDY, short]) == [("AB", one, a), ("hey", two, b[:3])]
        with pytest.raises(ValueError, match="as many sampling_params as prompts, 2; got 1"):
            run(["AB", "hey"], [GREEDY])
        with pytest.raises(TypeError, match="wants SamplingParams, got dict"):
            run("AB", [{"temperature": 0}])
        with pytest.raises(TypeError, match="'prompt' or 'prompt_token_ids'"):
            run([{"text": "AB"}])
        with pytest.raises(TypeError):
            run([[1.5, 2]])
        check_empty(llm)
    with engine() as llm:
        with pytest.raises(UserError, match="no tokenizer was given"):
            llm.generate("AB", use_tqdm=False)
        assert llm.generate([5], use_tqdm=False)[0].outputs[0].text == ""


def test_the_default_parameters_are_vllms(capsys):
    with text_engine() as llm:
        (output,) = llm.generate("AB")
    assert len(output.outputs[0].token_ids) == 16 and SamplingParams().temperature == 1.0
    assert "1/1" in capsys.readouterr().err


def test_chat():
    with text_engine() as llm:
        with pytest.raises(UserError, match="wants a tokenizer with a chat template"):
            llm.chat([{"role": "user", "content": "AB"}])
        llm.tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
        )
        one, two = ([{"role": "user", "content": text}] for text in ("AB", "CD"))
        outputs = llm.chat([one, two], GREEDY, use_tqdm=False)
        assert [o.prompt for o in outputs] == ["uAB", "uCD"]
        (single,) = llm.chat(one, GREEDY, use_tqdm=False)
        (plain,) = llm.generate("uAB", GREEDY, use_tqdm=False)
        assert answers(single) == answers(outputs[0]) == answers(plain)
        assert single.outputs[0].text == plain.outputs[0].text


def test_a_stream_ends_at_the_text_of_generate():
    params = SamplingParams(seed=3, n=2, max_tokens=40)
    with text_engine() as llm:
        (whole,) = llm.generate("AB", params, use_tqdm=False)
        *_, last = seen = list(llm.stream("AB", params))
    assert len(seen) >= 40
    assert [c.text for c in last.outputs] == [c.text for c in whole.outputs]
    assert answers(last) == answers(whole)
    for before, after in itertools.pairwise(seen):
        for a, b in zip(before.outputs, after.outputs, strict=True):
            assert b.text.startswith(a.text) and len(a.token_ids) <= len(b.token_ids)
    assert whole.metrics.queue_time >= 0
    assert whole.metrics.time_to_first_token <= whole.metrics.total_time


def test_stop_texts_across_tokens():
    """A token is a byte, so every longer text is across borders."""
    with text_engine() as llm:
        params = {"seed": 8, "max_tokens": 40}
        (plain,) = llm.generate("AB", SamplingParams(**params), use_tqdm=False)
        text = plain.outputs[0].text
        stop = next(text[i : i + 3] for i in range(9, 30) if "\ufffd" not in text[i : i + 3])
        at = text.index(stop)
        for stops in (stop, ["never", stop], [stop + "!", stop]):
            wanted = SamplingParams(**params, stop=stops)
            (output,) = llm.generate("AB", wanted, use_tqdm=False)
            (answer,) = output.outputs
            assert (answer.text, answer.finish_reason) == (text[:at], "stop")
            assert answer.stop_reason == stop
            assert answer.token_ids == plain.outputs[0].token_ids[: len(answer.token_ids)]
            for output in llm.stream("AB", wanted):
                assert text[:at].startswith(output.outputs[0].text)
            assert output.outputs[0].text == text[:at]
        late = SamplingParams(**params, stop=stop, min_tokens=40)
        assert llm.generate("AB", late, use_tqdm=False)[0].outputs[0].text == text
        check_empty(llm)


def test_a_stop_token_is_not_in_the_text():
    with text_engine() as llm:
        (plain,) = llm.generate("AB", GREEDY, use_tqdm=False)
        end = plain.outputs[0].token_ids[4]
        params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[end])
        (output,) = llm.generate("AB", params, use_tqdm=False)
        (answer,) = output.outputs
        assert answer.token_ids[-1] == end
        assert answer.text == byte_tokenizer().decode(answer.token_ids[:-1])
        *_, last = llm.stream("AB", params)
        assert last.outputs[0].text == answer.text


# --------------------------------------------------------------------------------- closing


def test_closing_frees_the_cache_and_leaves_the_model_as_it_was():
    model = make("Llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    config = model.config.to_dict()
    with LLM(model, num_blocks=9, max_model_len=100) as llm:
        expected = llm.generate([LONG[:9]], GREEDY, use_tqdm=False)
        stream = llm.stream([LONG[:9]], GREEDY)
        next(stream)
        cache = [
            weakref.ref(t) for t in (*executor_of(llm).cache.keys, *executor_of(llm).cache.values)
        ]
        assert all(ref() is not None for ref in cache)
    assert not [ref for ref in cache if ref() is not None]
    llm.close()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(storages)
    assert model.config.to_dict() == config and "generate" not in vars(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == modules[name].keys()
    assert list(stream)[-1].outputs[0].finish_reason == "abort"
    with pytest.raises(RuntimeError, match="it is closed"):
        llm.generate([LONG[:9]])
    with pytest.raises(RuntimeError, match="it is closed"):
        next(llm.stream([LONG[:9]]))
    assert answers(expected[0])[0][0] == greedy_of(model, LONG[:9], 20)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_closing_frees_a_loaded_model_while_the_engine_is_held(monkeypatch, weights):
    model = make("Llama")
    monkeypatch.setattr(build, "load", lambda *_, **__: (model, None))
    llm = LLM("a folder", weights=weights, group_size=32, num_blocks=9, max_model_len=100)
    held = [weakref.ref(model), weakref.ref(executor_of(llm).model)]
    stream = llm.stream([LONG[:9]], GREEDY)
    next(stream)
    model = None
    monkeypatch.undo()
    llm.close()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert not list(stream)[-1].outputs[0].token_ids[20:]


def test_callers_may_be_in_inference_mode_or_not():
    params = [GREEDY, SamplingParams(temperature=0, max_tokens=20, frequency_penalty=1.0)]
    prompts = [LONG[:9], LONG[9:30]]
    expected = None
    for made_in_it in (False, True):
        with torch.inference_mode(made_in_it):
            llm = LLM(model_of("Llama"), num_blocks=40, block_size=16, max_num_seqs=2)
        for called_in_it in (made_in_it, not made_in_it):
            with torch.inference_mode(called_in_it):
                got = llm.generate(prompts, params, use_tqdm=False)
            expected = expected or [answers(output) for output in got]
            assert [answers(output) for output in got] == expected
    assert expected[0][0][0] == greedy_of(model_of("Llama"), LONG[:9], 20)


def test_models_that_it_cannot_run():
    with pytest.raises(UserError, match="LLM: Mamba2ForCausalLM cannot be run"):
        LLM(make("Mamba2"))
    model = make("Llama")
    llmfast.patch(model, ops="all")
    with pytest.raises(UserError, match="LLM: this model is patched already"):
        LLM(model)
    with pytest.raises(ValueError, match="dtype and device are of a model that is loaded"):
        LLM(model_of(), dtype="float32")
    with pytest.raises(UserError, match="no such file"):
        LLM("/no/such/model")


def test_the_size_of_a_cache_on_the_cpu():
    with LLM(make("Llama"), max_num_seqs=3, max_model_len=100) as llm:
        assert (
            executor_of(llm).cache.num_blocks == 3 * 2 and executor_of(llm).cache.block_size == 64
        )


@pytest.mark.parametrize(("chunked", "tokens_of_a_step"), [(True, 9), (False, 40)])
def test_without_chunks_a_step_may_be_a_whole_context(chunked, tokens_of_a_step, monkeypatch):
    asked = []
    monkeypatch.setattr(
        model_runner,
        "count_blocks",
        lambda model, **sizes: asked.append(sizes["max_num_batched_tokens"]) or 8,
    )
    sizes = {"num_blocks": None, "max_model_len": 40, "max_num_batched_tokens": 9}
    with engine(**sizes, enable_chunked_prefill=chunked) as llm:
        (output,) = llm.generate([LONG[:30]], GREEDY, use_tqdm=False)
    assert asked == [tokens_of_a_step]
    assert len(output.outputs[0].token_ids) == 10


# ---------------------------------------------------------------------------- steps ahead


def sizes_of(keys):
    """Return the tokens and rows of captured steps, without prompts and with prompts."""
    decoded, mixed = [], []
    for key in keys:
        prompts = key.shape.max_query_len > 1
        (mixed if prompts else decoded).append((key.shape.tokens, key.shape.rows))
    return decoded, mixed


def test_a_step_is_started_before_the_tokens_of_the_one_before_are_known(how, monkeypatch):
    ahead, waiting, launch = how is not None, [], ModelRunner.launch

    def watch(self, plan, answers, previous, *args):
        waiting.append(previous is not None)
        return launch(self, plan, answers, previous, *args)

    def replayed():
        found = sizes_of(how.replayed) if how else ([], [])
        if how:
            how.replayed.clear()
        return found

    monkeypatch.setattr(ModelRunner, "launch", watch)
    with engine(enable_prefix_caching=False, max_num_seqs=8) as llm:
        if how:
            decoded, mixed = sizes_of(how.captured)
            assert decoded == [(8, 8), (4, 4), (2, 2), (1, 1)] and mixed == [(64, 8), (32, 8)]
        llm.generate(ids(3, 9, 7, 1), GREEDY, use_tqdm=False)
        assert any(waiting) == ahead
        decoded, mixed = replayed()
        assert set(decoded) == ({(4, 4)} if ahead else set())  # all decode together until all end
        assert mixed == ([(32, 8)] if ahead else [])
        llm.generate(ids(3, 9, 7, 20), GREEDY, use_tqdm=False)  # more prompts than a graph has
        llm.generate(ids(65, 1), GREEDY, use_tqdm=False)  # more tokens
        assert replayed()[1] == []
        waiting.clear()
        llm.generate(PROMPTS[:2], PARAMS[1], use_tqdm=False)  # its penalty wants every token
        assert not any(waiting)
        check_empty(llm)
    with engine(enable_prefix_caching=False, max_num_seqs=1) as llm:
        waiting.clear()
        llm.generate(ids(3, 9), [GREEDY, PARAMS[1]], use_tqdm=False)
    # while the second only waits, nobody waits for its penalty
    assert (waiting[:20].count(True) == 19) == ahead and not any(waiting[21:])


def test_full_steps_are_graphs_too(how):
    prompts = ids(60, 60, 33)
    with engine(max_num_seqs=4, max_num_batched_tokens=100) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        if how:
            first = how.captured[0].shape
            assert (first.tokens, first.rows) == (100, 4)  # the largest is captured first
            # 60 + 40, 20 + 33 and one decodes
            assert sizes_of(how.replayed)[1][:2] == [(100, 4), (64, 4)]
        check_empty(llm)
    for prompt, output in zip(prompts, outputs, strict=True):
        with engine() as llm:
            (wanted,) = llm.generate([prompt], GREEDY, use_tqdm=False)
        assert answers(output) == answers(wanted)


def test_a_step_that_cannot_be_captured_runs_without_a_graph(monkeypatch, caplog):
    def capture(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    use_fake_graphs(monkeypatch, capture)
    with engine() as llm:
        assert len(caplog.records) == 1 and "since one raised: operation not perm" in caplog.text
        (output,) = llm.generate([PROMPTS[4]], GREEDY, use_tqdm=False)
        assert_as_alone(output, 4, 0)


def test_eager_steps_have_no_graphs(how):
    with engine(enforce_eager=True) as llm:
        assert executor_of(llm).num_graphs == 0
        (output,) = llm.generate([PROMPTS[4]], GREEDY, use_tqdm=False)
        assert_as_alone(output, 4, 0)
    assert how is None or not how.captured
