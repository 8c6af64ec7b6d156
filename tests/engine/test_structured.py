"""Structured outputs: answers parse and fit, whatever runs beside them."""

import asyncio
import functools
import json
import re
import sys
import threading

import pytest

from block_books import check_books
from engines import LONG, check_empty, text_engine
from generating import tokenizer
from llmfast import AsyncLLM, SamplingParams, StructuredOutputsParams
from llmfast.engine.structured import Grammars
from llmfast.errors import UserError
from tiny_models import make

END = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "bb"]}, "minItems": 1, "maxItems": 3},
        "good": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "good"],
    "additionalProperties": False,
}

wants_xgrammar = pytest.mark.usefixtures("xgrammar", "how")


@pytest.fixture
def xgrammar():
    return pytest.importorskip("xgrammar")


@functools.cache
def model():
    """Return a model with end token 2; the tokenizer has neither spaces nor line ends."""
    model = make("Llama").double()
    model.generation_config.eos_token_id = END
    return model


def engine(**changes):
    return text_engine(model=model(), **changes)


def params(structure, **changes):
    given = {"max_tokens": 100, "temperature": 1.3, **changes}
    return SamplingParams(structured_outputs=structure, **given)


def run(llm, prompts, given):
    return llm.generate(prompts, given, use_tqdm=False)


def assert_fits(text):
    """Assert by hand what SCHEMA says, clause by clause."""
    data = json.loads(text)
    assert set(data) == set(SCHEMA["required"])
    assert re.fullmatch("[a-z]{1,5}", data["name"])
    assert type(data["age"]) is int and 0 <= data["age"] <= 99
    assert 1 <= len(data["tags"]) <= 3 and set(data["tags"]) <= {"a", "bb"}
    assert type(data["good"]) is bool


@wants_xgrammar
def test_answers_fit_a_json_schema_and_end_when_they_are_whole():
    with engine() as llm:
        (output,) = run(llm, "AB", params({"json": SCHEMA}, n=6, seed=1))
        assert len({answer.text for answer in output.outputs}) == 6
        for answer in output.outputs:
            assert_fits(answer.text)
            assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
            assert answer.token_ids.count(END) == 1 and answer.token_ids[-1] == END
        *_, last = llm.stream("AB", params({"json": SCHEMA}, n=6, seed=1))
        assert [a.text for a in last.outputs] == [a.text for a in output.outputs]
        # the whole answer ends it in spite of ignore_eos, and the parameters still count
        masked = dict.fromkeys(range(16, 24), -float("inf"))  # the digits from 1 to 8
        given = params({"json": SCHEMA}, seed=2, ignore_eos=True, top_k=5, logit_bias=masked)
        (output,) = run(llm, "AB", given)
        assert_fits(output.outputs[0].text)
        assert output.outputs[0].finish_reason == "stop"
        assert not set("12345678") & set(output.outputs[0].text)
        check_empty(llm)


@wants_xgrammar
@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{1,6}(x|yy)"}, "[a-c]{3}-[0-9]{1,6}(x|yy)"),
        ({"choice": ["ab", "abc", 'q"\\d']}, 'ab|abc|q"\\\\d'),
        ({"grammar": 'root ::= "(" root ")" | [0-9]'}, r"\(*[0-9]\)*"),
        ({"json_object": True}, r"\{.*"),
        (StructuredOutputsParams(regex="[xy]{9}"), "[xy]{9}"),
    ],
    ids=["regex", "choice", "grammar", "json_object", "made"],
)
def test_answers_fit_other_structures(structure, pattern):
    with engine() as llm:
        outputs = run(llm, ["AB", "C", LONG[:20]], params(structure))
        check_empty(llm)
    for output in outputs:
        (answer,) = output.outputs
        assert re.fullmatch(pattern, answer.text)
        if "grammar" in str(structure):
            assert answer.text.count("(") == answer.text.count(")")


@wants_xgrammar
def test_odd_texts_of_a_choice(xgrammar):
    odd = ["\x01\n\t\x7f", "\u00e9\u4e2d\U0001f600", "\\u0041", "'", '"', "]"]
    with engine() as llm:
        grammars = llm.core.processor.grammars
        for text in odd:
            wanted = StructuredOutputsParams(choice=[text, "another"])
            matcher = grammars.matcher(wanted)
            assert matcher._matcher.accept_string(text) and matcher.accept(END)
            assert matcher.terminated


@wants_xgrammar
def test_company_and_preemption_change_nothing():
    mixed = [
        params({"json": SCHEMA}, seed=1),
        SamplingParams(seed=2, max_tokens=40),
        params({"regex": "[a-z]{30}"}, temperature=0),
        params({"json": SCHEMA}, seed=4, n=2),
        SamplingParams(temperature=0, max_tokens=40),
    ]
    prompts = [LONG[:20], LONG[10:30], LONG[20:40], LONG[:33], LONG[5:25]]
    with engine(num_blocks=9, max_num_batched_tokens=11) as llm:
        outputs = run(llm, prompts, mixed)
        assert sum(output.metrics.preemptions for output in outputs) > 0
        check_empty(llm)
        alone = [run(llm, [p], own)[0] for p, own in zip(prompts, mixed, strict=True)]
    for output, expected in zip(outputs, alone, strict=True):
        assert [a.token_ids for a in output.outputs] == [a.token_ids for a in expected.outputs]
        assert all(a.error is None for a in output.outputs)
    for i in (0, 3):
        for answer in outputs[i].outputs:
            assert_fits(answer.text)


@wants_xgrammar
def test_a_step_that_raises_leaves_answers_where_they_were(monkeypatch):
    given = params({"json": SCHEMA}, seed=1)
    with engine() as llm:
        (whole,) = run(llm, "AB", given)
        stream = llm.stream("AB", given)
        for _ in range(5):
            next(stream)
        launch = llm.core.model_runner.launch

        def fail(*args):
            launch(*args)
            raise RuntimeError("out of luck")

        with monkeypatch.context() as patch:
            patch.setattr(llm.core.model_runner, "launch", fail)
            with pytest.raises(RuntimeError, match="out of luck"):
                run(llm, "C", given)
        *_, last = stream
        assert last.outputs[0].token_ids == whole.outputs[0].token_ids
        check_empty(llm)


@wants_xgrammar
def test_a_schema_is_compiled_once():
    with engine() as llm:
        sizes = []
        for structure in ({"json": SCHEMA}, {"json": json.dumps(SCHEMA)}, {"regex": "[ab]{4}"}):
            run(llm, "AB", params(structure))
            sizes.append(llm.core.processor.grammars.compiled_bytes)
    assert 0 < sizes[0] == sizes[1] < sizes[2]


@wants_xgrammar
def test_special_tokens_are_no_text():
    with engine() as llm:
        llm.tokenizer.add_special_tokens({"additional_special_tokens": ["a", "b"]})
        special = llm.tokenizer.convert_tokens_to_ids(["a", "b"])
        (output,) = run(llm, "AB", params({"regex": "[abc]{12}"}))
    assert output.outputs[0].text == "c" * 12
    assert not set(special) & set(output.outputs[0].token_ids)


@wants_xgrammar
def test_of_an_asyncllm():
    async def one(llm, structure):
        *_, last = [output async for output in llm.generate("AB", params(structure, seed=3))]
        return last.outputs[0]

    async def all_of_them():
        async with AsyncLLM(model(), tokenizer=tokenizer(), num_blocks=40, block_size=16) as llm:
            asked = [{"json": SCHEMA}, {"regex": "["}, {"choice": ["abc"]}]
            return await asyncio.gather(*(one(llm, structure) for structure in asked))

    good, bad, chosen = asyncio.run(all_of_them())
    assert_fits(good.text)
    assert bad.finish_reason == "error" and chosen.text == "abc"


@wants_xgrammar
def test_an_asyncllm_compiles_grammars_beside_its_steps(monkeypatch):
    """Other requests are answered while a grammar compiles in another thread."""
    compiling, release, threads = threading.Event(), threading.Event(), []
    matcher = Grammars.matcher

    def slow(self, wanted):
        threads.append(threading.current_thread().name)
        compiling.set()
        assert release.wait(30)
        return matcher(self, wanted)

    monkeypatch.setattr(Grammars, "matcher", slow)

    async def last(llm, prompt, given):
        *_, output = [output async for output in llm.generate(prompt, given)]
        return output.outputs[0]

    async def both():
        async with AsyncLLM(model(), tokenizer=tokenizer(), num_blocks=40, block_size=16) as llm:
            late = asyncio.create_task(last(llm, LONG[:5], params({"choice": ["abc"]})))
            await asyncio.to_thread(compiling.wait, 30)
            beside = await last(llm, LONG[:9], SamplingParams(max_tokens=9, ignore_eos=True))
            assert len(beside.token_ids) == 9 and not late.done()
            release.set()
            return await late

    assert asyncio.run(both()).text == "abc"
    assert threads and threads[0].startswith("llmfast input")


# -------------------------------------------------------------------------------------- faults


@wants_xgrammar
def test_what_does_not_compile_fails_its_request_alone(caplog):
    cases = [
        ({"json": "{"}, "Failed to parse JSON"),
        ({"json": {"type": "nope"}}, 'Unsupported type "nope"'),
        ({"regex": "["}, r"Unclosed '\['"),
        ({"grammar": "foo ::= bar"}, 'rule with name "root" is not found'),
    ]
    good = params({"choice": ["xyz"]})
    given = [params(structure) for structure, _ in cases]
    with engine() as llm:
        *bad, fine = run(llm, ["AB"] * (len(cases) + 1), [*given, good])
        check_empty(llm)
        # no token is left for the space in it, in a vocabulary without one
        (stuck,) = run(llm, "AB", params({"choice": ["a b"]}))
        check_books(llm.core.scheduler.blocks, [])
    for output, (_, words) in zip(bad, cases, strict=True):
        (answer,) = output.outputs
        assert (answer.finish_reason, answer.token_ids) == ("error", [])
        assert re.match(f"structured_outputs does not compile: .*{words}", answer.error)
        assert "\n" not in answer.error and ".cc:" not in answer.error
    assert fine.outputs[0].text == "xyz"
    assert "every token is barred" in stuck.outputs[0].error


@wants_xgrammar
def test_what_it_wants():
    from engines import engine as ids_engine

    with ids_engine(model=model()) as llm:
        (output,) = run(llm, [LONG[:5]], params({"regex": "a"}))
        assert output.outputs[0].error == "structured_outputs wants a tokenizer"
    with text_engine() as llm:
        (output,) = run(llm, "AB", params({"regex": "a"}))
        assert output.outputs[0].error == "structured_outputs wants a model with an end token"


def test_without_xgrammar(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    words = r"wants the package xgrammar: pip install 'llmfast\[structured\]'"
    with engine() as llm:
        with pytest.raises(UserError, match=words):
            run(llm, ["AB", "C"], [SamplingParams(max_tokens=2), params({"regex": "a"})])
        check_empty(llm)
        assert len(run(llm, "AB", SamplingParams(max_tokens=2))[0].outputs[0].token_ids) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "structured_outputs must be exactly one of json, regex, .*; got 'none'"),
        ({"regex": "a", "json_object": True}, ".* exactly one of .*; got 'regex and json_object'"),
        ({"json": 5}, "structured_outputs.json must be a dictionary or a text; got 5"),
        ({"json": {"a": {1}}}, "structured_outputs.json: .*set is not JSON serializable"),
        ({"regex": 5}, "structured_outputs.regex must be a text; got 5"),
        ({"choice": "ab"}, "structured_outputs.choice must be a list of at least one text"),
        ({"choice": ["a", ""]}, "structured_outputs.choice"),
        ({"choice": 5}, "structured_outputs.choice"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"json_object": 1}, "structured_outputs.json_object must be True or False; got 1"),
        ("json", "structured_outputs must be StructuredOutputsParams, or a dictionary"),
    ],
)
def test_bad_parameters(wrong, words):
    with pytest.raises(ValueError, match=f"SamplingParams: {words}"):
        SamplingParams(structured_outputs=wrong)


def test_unknown_parameters_raise():
    with pytest.raises(TypeError, match="schema"):
        SamplingParams(structured_outputs={"schema": "{}"})
