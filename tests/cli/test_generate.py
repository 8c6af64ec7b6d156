"""`llmfast generate`, and the treatment of mistakes that all commands share."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from typer.testing import CliRunner

import llmfast
from llmfast import patching
from llmfast.cli import generate, ui
from llmfast.cli.main import app
from llmfast.cli.stream import TextStream
from llmfast.errors import UserError
from llmfast.loading.embedded import INSTALL, embedded_model_path

CONTEXT = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "Tell me a tale"
TEMPLATE = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)

needs_embedded = pytest.mark.skipif(
    embedded_model_path() is None, reason=f"needs the embedded model: {INSTALL}"
)


def make_tokenizer():
    """Make a tokenizer of one token per byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(["</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def make_model(context=CONTEXT):
    """Make a random Llama whose greedy answers vary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny():
    return make_model(), make_tokenizer()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    for part in tiny:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """Save a model that answers for minutes: its end token's logit is 0, never the largest."""
    path = tmp_path_factory.mktemp("endless")
    model = make_model(context=100_000)
    model.lm_head.weight.data[0] = 0
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def loaded(tiny, monkeypatch):
    """Make `generate` load the tiny model; restore the model's settings afterwards."""
    model, tokenizer = tiny
    before = model.generation_config.to_dict()
    monkeypatch.setattr(llmfast, "load", lambda *args, **kwargs: tiny)
    report = SimpleNamespace(swapped=0, kept=0)
    monkeypatch.setattr(llmfast, "patch", lambda model: report)
    yield SimpleNamespace(model=model, tokenizer=tokenizer)
    model.generation_config = type(model.generation_config).from_dict(before)
    tokenizer.chat_template = None


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def start():
    """Return a function that runs the program in a process, which the test's end kills."""
    processes = []

    def start(*args):
        process = subprocess.Popen(
            [sys.executable, "-m", "llmfast", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # background jobs of a shell ignore Ctrl-C, and their children inherit this
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def assert_refused(result, *words):
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("llmfast: error: ")
    for word in words:
        assert word in lines[0]


def own_answer(tiny, prompt, **settings):
    """Return the answer of transformers' own `generate`, as text."""
    ids = tiny.tokenizer(prompt, return_tensors="pt").input_ids.to(tiny.model.device)
    settings = {"do_sample": False, "max_new_tokens": 200, "pad_token_id": 0} | settings
    settings["max_new_tokens"] = min(settings["max_new_tokens"], CONTEXT - ids.shape[1])
    out = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return tiny.tokenizer.decode(
        out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


# --- answers


@needs_embedded
def test_the_embedded_model_answers_paris_and_nothing_else(start):
    process = start("generate", "What is the capital of France?")
    out, err = process.communicate(timeout=120)
    assert out.decode() == "The capital of France is Paris.\n"
    assert err.decode() == ""
    assert process.returncode == 0


def test_a_folder_answers_as_transformers_does(folder):
    expected = own_answer(llmfast.load(folder), PROMPT, max_new_tokens=40)
    result = run("generate", PROMPT, "--model", folder, "--max-tokens", 40)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")
    assert len(expected) > 5


def test_max_tokens_bounds_the_answer(loaded):
    assert run("generate", PROMPT, "--max-tokens", 3).stdout == (
        own_answer(loaded, PROMPT, max_new_tokens=3) + "\n"
    )


def test_the_chat_template_is_applied_and_raw_leaves_it_out(loaded, monkeypatch):
    asked = []
    own = loaded.model.generate

    def spy(input_ids, **kwargs):
        asked.append(loaded.tokenizer.decode(input_ids[0]))
        return own(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "generate", spy)
    loaded.tokenizer.chat_template = TEMPLATE
    assert run("generate", "hello", "--max-tokens", 1).exit_code == 0
    assert run("generate", "hello", "--max-tokens", 1, "--raw").exit_code == 0
    assert asked == ["[hello]>", "hello"]


def test_a_template_that_fails_says_how_to_go_without(loaded):
    loaded.tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    assert_refused(run("generate", PROMPT), "chat template", "no users here", "--raw")


@pytest.mark.parametrize("as_list", [False, True], ids=["one", "list"])
def test_the_models_own_end_token_stops_the_answer(loaded, as_list):
    whole = loaded.tokenizer(own_answer(loaded, PROMPT), add_special_tokens=False).input_ids
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    whole = loaded.model.generate(ids, max_new_tokens=20, pad_token_id=0)[0, ids.shape[1] :]
    end = int(whole[3])
    first = whole.tolist().index(end)
    loaded.model.generation_config.eos_token_id = [256, end] if as_list else end
    result = run("generate", PROMPT, "--stats")
    assert result.stdout == loaded.tokenizer.decode(whole[: first + 1]) + "\n"
    assert f"tokens out           {first + 1} " in result.stderr


# --- choosing tokens


def test_a_seed_repeats_the_draws_of_transformers(loaded):
    given = ["--temperature", 0.7, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01]
    answers = [run("generate", PROMPT, *given, "--seed", seed) for seed in (1, 1, 2)]
    assert all(a.exit_code == 0 for a in answers)
    torch.manual_seed(1)
    assert answers[0].stdout == answers[1].stdout
    assert answers[0].stdout == (
        own_answer(loaded, PROMPT, do_sample=True, temperature=0.7, top_p=0.9, top_k=50, min_p=0.01)
        + "\n"
    )
    assert answers[2].stdout != answers[0].stdout


def settings_for(loaded, **options):
    return generate._settings(
        loaded.model, loaded.tokenizer, generate.GenerateOptions("x", **options)
    )


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.5}])
def test_greedy_is_the_default(loaded, options):
    loaded.model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    assert settings_for(loaded, **options)["do_sample"] is False


@pytest.mark.parametrize(
    "option",
    [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"seed": 1}],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize(("own", "expected"), [(0.6, 0.6), (None, 1.0)])
def test_a_sampling_option_alone_samples_at_the_models_temperature(loaded, option, own, expected):
    loaded.model.generation_config.temperature = own
    chosen = settings_for(loaded, **option)
    assert chosen["do_sample"] is True
    assert chosen["temperature"] == expected


def test_greedy_says_which_options_change_nothing(loaded):
    result = run("generate", PROMPT, "--temperature", 0, "--top-k", 5, "--seed", 3)
    assert result.stdout == own_answer(loaded, PROMPT) + "\n"
    assert "--top-k, --seed" in result.stderr


def test_a_models_own_sampling_settings_leave_a_greedy_answer_quiet(loaded, capfd):
    loaded.model.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, max_length=30, num_beams=2
    )
    result = run("generate", PROMPT, "--max-tokens", 5)
    loaded.model.generation_config.update(num_beams=1, max_length=None)
    assert result.stdout == own_answer(loaded, PROMPT, max_new_tokens=5) + "\n"
    assert result.stderr + capfd.readouterr().err == ""


def test_only_the_seed_touches_the_global_generator(loaded):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert run("generate", PROMPT).exit_code == 0
    assert torch.equal(torch.get_rng_state(), state)


# --- streaming


class Recorder:
    """A stdout that notes at each write how many tokens were computed."""

    def __init__(self, computed):
        self.computed, self.writes = computed, []

    def write(self, text):
        self.writes.append((len(self.computed), text))

    def flush(self):
        pass

    @property
    def text(self):
        return "".join(text for _, text in self.writes)


def test_tokens_are_written_as_they_arrive(loaded, monkeypatch):
    computed = []
    hook = loaded.model.register_forward_hook(lambda *_: computed.append(1))
    out = Recorder(computed)
    monkeypatch.setattr(sys, "stdout", out)
    generate.answer(generate.GenerateOptions(PROMPT, max_tokens=30))
    hook.remove()
    monkeypatch.undo()
    assert len(computed) == 30
    assert out.writes[0][0] < 10, "the first piece must not wait for the answer's end"
    assert len(out.writes) > 10
    assert out.text.endswith("\n")


def stream(tokenizer, ids, sizes=None):
    out = Recorder([])
    streamer = TextStream(tokenizer, out)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt is not written
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert streamer.count == len(ids)
    return out


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text(text):
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert stream(tokenizer, ids).text == text + "\n"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_pieces_add_up_to_the_decoded_answer_whatever_the_tokens(ids):
    tokenizer = make_tokenizer()
    assert stream(tokenizer, ids).text == decode(tokenizer, ids) + "\n"


def test_a_character_of_several_tokens_is_written_whole():
    tokenizer = make_tokenizer()
    ids = tokenizer("aé🙂b", add_special_tokens=False).input_ids
    assert len(ids) == 8
    assert [text for _, text in stream(tokenizer, ids).writes] == ["a", "é", "🙂", "b", "\n"]


def test_spaces_between_words_survive_a_decoder_that_strips_the_first():
    vocab = {"</s>": 0, "▁the": 1, "▁a": 2, "s": 3, "▁": 4}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    for ids in ([1, 2, 3, 1], [1, 0, 2, 2], [4, 4, 3, 4, 1], [0, 1, 2]):
        assert stream(tokenizer, ids).text == decode(tokenizer, ids) + "\n"


def test_the_cost_of_a_token_does_not_grow_with_the_answer():
    tokenizer = make_tokenizer()
    lengths = []
    counting = SimpleNamespace(
        decode=lambda ids, **kw: lengths.append(len(ids)) or tokenizer.decode(ids, **kw)
    )
    ids = tokenizer("The quick brown fox. " * 50, add_special_tokens=False).input_ids
    stream(counting, ids)
    assert max(lengths) <= 2


def test_a_closed_pipe_ends_quietly(endless, start):
    process = start("generate", PROMPT, "--model", endless, "--max-tokens", 90_000)
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    process.wait(timeout=60)
    process.stderr.close()
    assert err == ""
    assert process.returncode == ui.CLOSED_PIPE


def test_ctrl_c_keeps_the_written_text(endless, start):
    process = start("generate", PROMPT, "--model", endless, "--max-tokens", 90_000)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == ui.INTERRUPTED
    assert (first + out).decode(errors="replace").strip()
    assert out.endswith(b"\n")
    assert err.decode() == ""


def test_ctrl_c_writes_the_pending_text(loaded, monkeypatch):
    def interrupted(streamer, **kwargs):
        streamer.put(torch.tensor([[1]]))
        for token in loaded.tokenizer("ab").input_ids:
            streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(loaded.model, "generate", interrupted)
    result = run("generate", PROMPT, "--max-tokens", 9)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "ab\n", "")


# --- statistics


def test_stats_name_every_figure_on_stderr_alone(folder):
    result = run("generate", PROMPT, "--model", folder, "--max-tokens", 12, "--stats")
    assert result.exit_code == 0
    assert result.stdout == run("generate", PROMPT, "--model", folder, "--max-tokens", 12).stdout
    figures = dict(re.findall(r"^([a-z ]+?)  +(\S.*)$", result.stderr, re.MULTILINE))
    assert float(figures["time to first token"].split()[0]) > 0
    assert re.fullmatch(r"[\d.]+ tokens/s", figures["decode"])
    assert figures["tokens out"].split()[0] == "12"
    assert 50 < float(figures["peak memory"].split()[0].replace(",", "")) < 50_000
    assert float(figures["load"].split()[0]) > 0
    assert re.fullmatch(r"\d+ modules, \d+ kept", figures["swapped"])
    own = "transformers' own loop" if DEVICE == "cpu" else "llmfast's runner, CUDA graphs"
    assert figures["decoded by"] == own
    assert "kept" in result.stderr, "the report's table"


@pytest.fixture
def on_the_runner(loaded, monkeypatch):
    """Patch as on a GPU, where `generate` is taken over; return the runner's batches."""
    from llmfast.runner.generate.batch import StaticBatch

    started = []
    own, patch = StaticBatch.start, patching.patch

    def start(self, input_ids, *args, **kwargs):
        started.append(len(input_ids))
        return own(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(StaticBatch, "start", start)
    monkeypatch.setattr(llmfast, "patch", lambda model: patch(model, ops="generate"))
    yield started
    llmfast.unpatch(loaded.model)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_the_runner_streams_and_is_named_in_the_stats(loaded, on_the_runner, sampled):
    expected = own_answer(loaded, PROMPT, max_new_tokens=30)
    given = ["--temperature", 0.7, "--top-p", 0.9, "--seed", 1] if sampled else []
    result = run("generate", PROMPT, "--max-tokens", 30, "--stats", *given)
    assert result.exit_code == 0, result.stderr
    if not sampled:
        assert result.stdout == expected + "\n"
    assert on_the_runner == [len(PROMPT)]
    assert re.search(r"^decoded by +llmfast's runner", result.stderr, re.MULTILINE)
    assert re.search(r"^decode +[\d.]+ tokens/s", result.stderr, re.MULTILINE)
    assert re.search(r"generate: taken over", result.stderr)


def test_tokens_of_the_runner_are_written_as_they_arrive(loaded, on_the_runner, monkeypatch):
    from llmfast.runner.generate.batch import StaticBatch

    steps = []
    own = StaticBatch.step
    monkeypatch.setattr(StaticBatch, "step", lambda self: steps.append(1) or own(self))
    out = Recorder(steps)
    monkeypatch.setattr(sys, "stdout", out)
    generate.answer(generate.GenerateOptions(PROMPT, max_tokens=30))
    monkeypatch.undo()
    assert len(steps) == 29
    assert out.writes[0][0] < 10 and len(out.writes) > 10
    assert out.text.endswith("\n")


def test_ctrl_c_leaves_the_runner_free(loaded, on_the_runner, monkeypatch):
    from llmfast.runner.generate.override import override_of

    def write(self, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TextStream, "_write", write)
        assert run("generate", PROMPT).exit_code == 130
    cache = override_of(loaded.model).batch.executor.cache
    assert cache.num_free == cache.num_blocks
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    assert loaded.model.generate(ids, max_new_tokens=3, pad_token_id=0).shape[1] == len(PROMPT) + 3


def test_one_token_has_no_rate(loaded):
    result = run("generate", PROMPT, "--max-tokens", 1, "--stats")
    assert "not measured: one token" in result.stderr


# --- mistakes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([""], ["prompt is empty"]),
        ([" \n"], ["prompt is empty"]),
        (["\udcff"], ["prompt", "UTF-8"]),
        (["x", "--temperature", "-0.1"], ["--temperature", "0 (greedy)", "-0.1"]),
        (["x", "--temperature", "nan"], ["--temperature", "nan"]),
        (["x", "--temperature", "inf"], ["--temperature", "inf"]),
        (["x", "--temperature", "1e-30"], ["--temperature", "1e-30"]),
        (["x", "--temperature", "hot"], ["--temperature", "valid"]),
        (["x", "--top-p", "0"], ["--top-p", "more than 0 and at most 1", "0.0"]),
        (["x", "--top-p", "1.01"], ["--top-p", "1.01"]),
        (["x", "--top-p", "nan"], ["--top-p", "nan"]),
        (["x", "--top-k", "-1"], ["--top-k", "0 (off)", "-1"]),
        (["x", "--min-p", "-0.01"], ["--min-p", "from 0 to 1", "-0.01"]),
        (["x", "--min-p", "1.01"], ["--min-p", "1.01"]),
        (["x", "--max-tokens", "0"], ["--max-tokens", "at least 1", "0"]),
        (["x", "--max-tokens", "-5"], ["--max-tokens", "-5"]),
        (["x", "--max-tokens", "2.5"], ["--max-tokens", "valid", "integer"]),
        (["x", "--seed", "-1"], ["--seed", "-1"]),
        (["x", "--seed", str(2**63)], ["--seed", str(2**63)]),
        ([], ["Missing argument", "generate --help"]),
        (["two", "prompts"], ["unexpected extra argument", "prompts"]),
        (["x", "--topp", "1"], ["No such option", "--topp"]),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() or "nothing",
)
def test_a_bad_call_is_refused_before_anything_loads(args, words, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("loaded a model for a call that cannot be met")

    monkeypatch.setattr(llmfast, "load", load)
    assert_refused(run("generate", *args), *words)


def test_the_edges_of_each_range_are_allowed(loaded):
    generate.GenerateOptions(
        "x", top_p=1.0, top_k=0, min_p=0.0, temperature=1e-6, max_tokens=1
    ).check()
    result = run("generate", "x", "--temperature", 1e-6, "--top-k", 0, "--min-p", 1, "--top-p", 1)
    assert result.exit_code == 0
    assert result.stdout == own_answer(loaded, "x") + "\n", "so cold that it is greedy"


def test_a_prompt_longer_than_the_context_names_both_lengths(loaded):
    assert_refused(run("generate", "x" * 70), "70 tokens", f"holds {CONTEXT}", "shorten")
    assert_refused(run("generate", "x" * CONTEXT), f"{CONTEXT} tokens")
    assert run("generate", "x" * (CONTEXT - 1), "--max-tokens", 1).stderr == ""


def test_a_long_prompt_shortens_the_answer_and_a_note_says_so(loaded):
    result = run("generate", "x" * 60, "--max-tokens", 10)
    assert result.exit_code == 0
    assert result.stdout == own_answer(loaded, "x" * 60, max_new_tokens=4) + "\n"
    assert result.stderr.startswith("llmfast: note: ")
    for word in ("60", str(CONTEXT), "at most 4", "not 10"):
        assert word in result.stderr


def test_no_limit_where_the_model_has_none():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    assert generate._room(SimpleNamespace(config=config), 10**6, 7) == 7


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    assert_refused(run("generate", "x", "--model", tmp_path), str(tmp_path))


def test_a_mistake_of_many_lines_is_reported_in_one(monkeypatch):
    def load(*args, **kwargs):
        raise UserError("first\n  second")

    monkeypatch.setattr(llmfast, "load", load)
    assert_refused(run("generate", "x"), "first second")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(llmfast, "load", load)
    result = run("generate", "x")
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


# --- the program


def test_a_process_ends_with_code_2_and_one_line(start):
    process = start("generate", "x", "--max-tokens", 0)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert err.decode() == "llmfast: error: --max-tokens must be at least 1, got 0\n"


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys, json\n"
        "from typer.testing import CliRunner\n"
        "from llmfast.cli.main import app\n"
        "out = CliRunner().invoke(app, ['--help']).stdout\n"
        "heavy = [m for m in ('torch', 'transformers', 'triton', 'gguf') if m in sys.modules]\n"
        "print(json.dumps([out, heavy]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    out, heavy = json.loads(result.stdout)
    assert heavy == []
    for command in ("generate", "env", "demo", "eval", "bench"):
        assert command in out


def test_no_arguments_show_the_help():
    assert "generate" in run().stdout
    assert run().exit_code == 0
    assert run("--help").exit_code == 0
    group = run("bench")
    assert "serve" in group.stdout
    assert group.stderr == ""


def test_the_help_says_what_greedy_is():
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("generate", "--help").stdout).split())
    assert "greedy unless --temperature is above 0" in text
    for option in ("model", "max-tokens", "temperature", "top-p", "top-k", "min-p", "seed"):
        assert f"--{option}" in text
    assert "--no-raw" not in text


def test_version():
    assert run("--version").stdout == f"llmfast {llmfast.__version__}\n"


@pytest.mark.parametrize("args", [["generat"], ["--bogus"]])
def test_an_unknown_command_or_option_is_refused(args):
    assert_refused(run(*args), "No such", args[0])


# --- progress


class Terminal:
    def __init__(self, is_terminal):
        self.is_terminal, self.text = is_terminal, ""

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("is_terminal", "seconds", "shown"),
    [(True, 0.6, True), (True, 0.0, False), (False, 0.6, False)],
    ids=["slow", "quick", "no terminal"],
)
def test_a_bar_is_shown_for_slow_work_on_a_terminal(is_terminal, seconds, shown, monkeypatch):
    terminal = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(ui, "SHOW_AFTER_S", 0.2)
    with ui.progress("Loading it"):
        time.sleep(seconds)
    assert ("Loading it" in terminal.text) == shown
    assert bool(terminal.text) == shown
    assert ui.THREAD not in [thread.name for thread in threading.enumerate()]


def test_a_bar_follows_the_steps_it_is_told(monkeypatch):
    terminal = Terminal(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(ui, "SHOW_AFTER_S", 0.0)
    with ui.progress("Loading it") as step:
        time.sleep(0.3)
        step("Reading [tensors]", 3, 4)
        time.sleep(0.4)
    assert "Loading it" in terminal.text
    assert "Reading [tensors]" in terminal.text


@pytest.mark.parametrize(
    ("is_terminal", "on_hub", "theirs"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_transformers_draws_its_bars_only_for_the_hub_on_a_terminal(
    is_terminal, on_hub, theirs, folder, monkeypatch
):
    seen = []

    def load(*args, **kwargs):
        seen.append(logging.is_progress_bar_enabled())
        raise UserError("enough")

    monkeypatch.setattr(llmfast, "load", load)
    monkeypatch.setattr(sys, "stderr", Terminal(is_terminal))
    with pytest.raises(UserError, match="enough"):
        ui.load("someone/some-model" if on_hub else str(folder))
    assert seen == [theirs]
    assert logging.is_progress_bar_enabled(), "as before"


def test_a_bar_does_not_hide_a_failure(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal(True))
    with pytest.raises(UserError, match="no such thing"), ui.progress("Loading it"):
        raise UserError("no such thing")
