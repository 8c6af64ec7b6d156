"""`llmfast chat`: turns, commands and Ctrl-C."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import llmfast
from generating import tokenizer as byte_tokenizer
from llmfast import SamplingParams
from llmfast.cli.main import app
from llmfast.engine.model_runner import ModelRunner
from tiny_models import make

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}({{ m.content }}){% endfor %}a("


def tokenizer():
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def loaded(monkeypatch):
    """Make `chat` load a tiny model, and record the prompts that it gets."""
    model, tokens = make("Llama"), tokenizer()
    monkeypatch.setattr(llmfast, "load", lambda *args, **kwargs: (model, tokens))
    asked = []
    own = llmfast.LLM.stream

    def spy(self, prompt, params, **kwargs):
        asked.append(prompt["prompt"])
        return own(self, prompt, params, **kwargs)

    monkeypatch.setattr(llmfast.LLM, "stream", spy)
    return SimpleNamespace(model=model, tokenizer=tokens, asked=asked)


def chat(text, *args):
    return CliRunner().invoke(app, ["chat", *map(str, args)], input=text)


def own_answer(loaded, prompt, **kwargs):
    with llmfast.LLM(loaded.model, tokenizer=loaded.tokenizer) as llm:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 12, **kwargs})
        return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


def test_each_turn_remembers_all_before_it(loaded):
    first = own_answer(loaded, "u(hey)a(")
    second = own_answer(loaded, f"u(hey)a({first})u(more)a(")
    result = chat("hey\n\nmore\n/reset\nhey\n", "--max-tokens", 12)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert loaded.asked == ["u(hey)a(", f"u(hey)a({first})u(more)a(", "u(hey)a("]


def test_the_system_message_stays_after_a_reset(loaded):
    chat("hey\n/reset\nhey\n", "--max-tokens", 3, "--system", "rhyme")
    assert loaded.asked == ["s(rhyme)u(hey)a("] * 2


def test_options_of_sampling(loaded):
    drawn = own_answer(loaded, "u(hey)a(", temperature=1.3, top_k=40, seed=9)
    result = chat("hey\n", "--max-tokens", 12, "--temperature", 1.3, "--top-k", 40, "--seed", 9)
    assert result.stdout == drawn + "\n"
    assert drawn != own_answer(loaded, "u(hey)a(")


def test_stats_and_quit_and_unknown_commands(loaded):
    result = chat("/stats\nhey\nhey\n/stats\n/nothing here\n/quit\nhey\n", "--max-tokens", 30)
    assert result.exit_code == 0 and len(loaded.asked) == 2
    assert "nothing was answered yet" in result.stderr
    assert "30 (an end token included)" in result.stderr
    assert "tokens/s" in result.stderr and "tokens, 0 of them in the cache" in result.stderr
    assert "there is no /nothing; there are /reset, /stats, /quit" in result.stderr


def test_a_conversation_too_long_for_the_model(loaded):
    result = chat(f"{'x' * 300}\nhey\n", "--max-tokens", 3)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert "max_model_len is 256" in line and "/reset begins a new conversation" in line
    assert loaded.asked[1] == "u(hey)a("  # it is not part of the conversation


def test_ctrl_c_ends_the_answer_and_its_text_is_remembered(loaded, monkeypatch):
    real, calls = ModelRunner.launch, []

    def launch(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(ModelRunner, "launch", launch)
    result = chat("hey\nmore\n", "--max-tokens", 12)
    first, second = result.stdout.split("\n")[:2]
    assert (result.exit_code, result.stderr) == (0, "")
    assert loaded.asked[1] == f"u(hey)a({first})u(more)a(" and second


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--max-tokens", "0"], "--max-tokens must be an integer, 1 or more"),
        (["--temperature", "-1"], "--temperature must be a number, 0 or more; got -1.0"),
        (["--top-p", "2"], "--top-p must be a number"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(args, words, monkeypatch):
    monkeypatch.setattr(llmfast, "load", None)
    result = chat("", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "wants a tokenizer with a chat template"),
        ("{{ raise_exception('no') }}", "failed: no"),
    ],
)
def test_a_model_that_cannot_chat(loaded, template, words):
    loaded.tokenizer.chat_template = template
    result = chat("hey\n")
    assert result.exit_code == 2 and words in result.stderr


def test_ctrl_c_does_not_end_the_program(tmp_path):
    model = make("Llama", max_position_embeddings=100_000)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmfast", "chat", "--model", tmp_path, "--max-tokens", "90000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # background jobs of a shell ignore Ctrl-C, and their children inherit this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        process.stdin.write(b"hey\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/stats\n/quit\n", timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert out.endswith(b"\n") and b"tokens out" in err
