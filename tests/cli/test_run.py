"""`llmfast run`: it answers each prompt of a file once, even after interruptions."""

import json
import sys

import pytest
from typer.testing import CliRunner

import llmfast
from generating import tokenizer as byte_tokenizer
from llmfast import SamplingParams
from llmfast.cli.main import app
from llmfast.engine.model_runner import ModelRunner
from tiny_models import make


@pytest.fixture
def loaded(monkeypatch):
    model, tokenizer = make("Llama"), byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
    loads = []
    monkeypatch.setattr(
        llmfast, "load", lambda *args, **kwargs: loads.append(1) or (model, tokenizer)
    )
    yield loads


@pytest.fixture
def files(tmp_path):
    return tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"


def put(path, *lines):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))


def run(files, *args):
    call = ["run", files[0], "--out", files[1], "--max-tokens", 8, *args]
    return CliRunner().invoke(app, list(map(str, call)))


def answers(files):
    return [json.loads(line) for line in files[1].read_text().splitlines()]


def by_key(files):
    found = {record.get("id", record["index"]): record for record in answers(files)}
    assert len(found) == len(answers(files))
    return found


def own_answer(prompt, **kwargs):
    with llmfast.LLM(make("Llama"), tokenizer=byte_tokenizer()) as llm:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 8, **kwargs})
        return [c.text for c in llm.generate(prompt, params, use_tqdm=False)[0].outputs]


def texts(record):
    return [output["text"] for output in record["outputs"]]


REQUESTS = [
    {"prompt": "AB"},
    {"messages": [{"role": "user", "content": "AB"}], "id": "chat"},
    {"prompt": "hey", "temperature": 1.1, "n": 2, "seed": 4, "max_tokens": 5},
    {"prompt": "AB", "logit_bias": {"40": 100}, "id": 7},
    {"prompt": "hey", "temperature": 1.1},
    {"prompt": "AB", "logprobs": 1, "prompt_logprobs": 0, "max_tokens": 2},
]


def test_each_line_is_answered_as_it_asks(loaded, files):
    put(files[0], *REQUESTS[:2], "", *REQUESTS[2:])
    result = run(files, "--max-num-seqs", 2, "--seed", 30)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "6 answered, 0 were there already" in result.stderr
    found = by_key(files)
    assert set(found) == {0, "chat", 3, 7, 5, 6}
    assert texts(found[0]) == own_answer("AB")
    assert texts(found["chat"]) == own_answer("uAB")
    assert texts(found[3]) == own_answer("hey", temperature=1.1, n=2, seed=4, max_tokens=5)
    assert texts(found[7]) == own_answer("AB", logit_bias={40: 100.0})
    assert texts(found[5]) == own_answer("hey", temperature=1.1, seed=35)
    (scored,) = found[6]["outputs"]
    assert (scored["finish_reason"], scored["tokens"]) == ("length", 2)
    pairs = zip(scored["token_ids"], scored["logprobs"], strict=True)
    assert all(str(token) in each for token, each in pairs)
    assert found[6]["prompt_logprobs"][0] is None and found[6]["prompt_tokens"] == 2
    assert len(found[6]["prompt_logprobs"]) == 2


def test_answered_prompts_are_not_asked_again(loaded, files):
    put(files[0], *REQUESTS)
    assert run(files).exit_code == 0
    whole, lines = by_key(files), files[1].read_text().splitlines(keepends=True)
    assert run(files).exit_code == 0 and len(loaded) == 1  # no model is loaded for nothing
    assert files[1].read_text() == "".join(lines)
    for cut in (0, 10, len(lines[3]) - 1):  # interrupted in the middle of a line, or right after it
        files[1].write_text("".join(lines[:3]) + lines[3][:cut])
        result = run(files)
        assert result.exit_code == 0 and by_key(files) == whole
        assert ("was torn" in result.stderr) == (cut == 10)


def test_ctrl_c_keeps_the_answers(loaded, files, monkeypatch):
    put(files[0], *[{"prompt": "AB", "max_tokens": n} for n in (2, 3, 30, 31)])
    real, steps = ModelRunner.launch, []

    def launch(self, *args):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "launch", launch)
        assert run(files).exit_code == 130
    assert set(by_key(files)) == {0, 1}
    assert run(files).exit_code == 0
    assert [by_key(files)[i]["outputs"][0]["tokens"] for i in range(4)] == [2, 3, 30, 31]


def test_bad_lines_are_named_and_the_others_answered(loaded, files):
    cases = [
        ('{"prompt": "AB"', "not JSON"),
        ('["AB"]', "wanted an object, got list"),
        ({"text": "AB"}, "wanted either prompt or messages"),
        ({"prompt": "AB", "messages": [{}]}, "wanted either prompt or messages"),
        ({"prompt": ["AB"]}, "prompt must be a text, got list"),
        ({"prompt": "\ud800"}, "surrogates not allowed"),
        ({"messages": []}, "messages must be a list of objects"),
        ({"messages": [{"role": 5}]}, "messages: "),
        ({"prompt": "AB", "best_of": 2}, "best_of"),
        ({"prompt": "AB", "top_p": 3}, "top_p must be a number"),
        ({"prompt": "AB", "id": [1]}, "id must be a text or an integer"),
        ({"prompt": "AB", "logit_bias": {"x": 1}}, "invalid literal"),
        ({"prompt": "A" * 300}, "max_model_len is 256"),
        ({"prompt": "AB", "stop_token_ids": [1000]}, "stop_token_ids has the token id 1000"),
        ({"prompt": "AB", "id": "twice"}, None),
        ({"prompt": "AB", "id": "twice"}, "the id 'twice' is on an earlier line"),
        ("[" * 100_000, ""),
    ]
    put(files[0], *[case for case, _ in cases], {"prompt": "AB"})
    result = run(files)
    assert result.exit_code == 2
    *named, summary, last = result.stderr.splitlines()
    assert "2 answered" in summary and f"{len(cases) - 1} of the lines" in last
    wrong = [(i, words) for i, (_, words) in enumerate(cases, start=1) if words is not None]
    for line, (number, words) in zip(named, wrong, strict=True):
        assert f"prompts.jsonl, line {number}: " in line and words in line
    assert set(by_key(files)) == {"twice", len(cases)}
    assert texts(by_key(files)["twice"]) == own_answer("AB")


def test_structured_output_without_xgrammar(loaded, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    put(files[0], {"prompt": "AB", "structured_outputs": {"regex": "[ab]{5}"}})
    result = run(files)
    assert result.exit_code == 2
    assert "xgrammar: pip install 'llmfast[structured]'" in " ".join(result.stderr.split())


def test_files_that_cannot_be(loaded, files, tmp_path):
    def refused(*args, words):
        result = run(files, *args)
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert words in line

    refused(words="there is no file")
    put(files[0], {"prompt": "AB"})
    refused("--out", tmp_path / "none/x", words="there is no folder")
    refused("--out", tmp_path, words="is a folder")
    refused("--out", files[0], words="--out is the file of prompts")
    refused("--max-tokens", 0, words="--max-tokens must be an integer, 1 or more")
    refused("--max-num-seqs", 0, words="--max-num-seqs must be at least 1")
    put(files[1], {"note": "my diary"})
    refused(words="line 1 of")
    assert files[1].read_text() == '{"note": "my diary"}\n' and not loaded


def test_requests_are_taken_as_others_finish(loaded):
    from llmfast.engine.offline import answer_all

    taken = []

    def asked():
        for n in range(20):
            taken.append(n)
            yield n, "AB", SamplingParams(temperature=0, max_tokens=3)

    with llmfast.LLM(make("Llama"), tokenizer=byte_tokenizer(), max_num_seqs=2) as llm:
        answering = answer_all(llm.core, asked(), ahead=4)
        key, output = next(answering)
        assert output.finished and len(taken) == 4
        assert sorted([key, *(key for key, _ in answering)]) == list(range(20))
        early = answer_all(llm.core, asked(), ahead=4)
        next(early)
        early.close()
        assert not llm.core.requests
