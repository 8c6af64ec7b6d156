"""The measurement of decoding, on the CPU with a tiny model: runs, counts and notes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import tiny_models
from llmfast.errors import UserError
from llmfast.measure import decode, shapes
from llmfast.measure.decode import Case, TokenClock, bytes_per_step, measure_decode
from llmfast.measure.figures import BenchResult
from llmfast.measure.results import parse_case
from llmfast.measure.shapes import SHAPES, Source
from llmfast.measure.stats import Estimate

TINY = (
    "llama",
    {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
)


@pytest.fixture
def shape(monkeypatch):
    """Return a shape that any machine can run."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    return Source(shape="tiny")


@pytest.fixture
def tiny(shape, monkeypatch):
    """Return the same shape, always on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return shape


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a tiny model with a tokenizer."""
    tiny_models.make("Llama").save_pretrained(tmp_path)
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    return tmp_path


# --- shapes


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-0.6b", 596_049_920),
        ("mistral-7b", 7_248_023_552),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_a_shape_has_the_parameters_of_its_model(shape, parameters):
    """Compare with the models' own cards and files, which count tied weights once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.config_of(shape))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.eos_token_id is None


def test_random_weights_keep_activations_small(tiny):
    model = tiny.make(torch.device("cpu"))
    assert isinstance(model, LlamaForCausalLM) and not model.training
    assert model.dtype == torch.float32
    assert 0.01 < float(model.lm_head.weight.data.std()) < 0.03
    logits = model(torch.arange(50)[None]).logits
    assert 0.01 < float(logits.detach().std()) < 10
    assert model.generation_config.eos_token_id is None


@pytest.mark.parametrize("dtype", shapes.DTYPE_NAMES, ids=str)
def test_a_source_s_dtype_is_its_model_s(shape, dtype):
    source = Source(shape="tiny", dtype=shapes.DTYPE_NAMES[dtype])
    source.check()
    assert source.make(torch.device("cpu")).dtype == dtype
    assert shape.make(torch.device("cpu")).dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "case"),
    [
        (Source(shape="llama-3.1-8b"), {"shape": "llama-3.1-8b"}),
        (Source(model="Qwen/Qwen3-8B"), {"model": "qwen3-8b"}),
        (Source(model="/tmp/my model=1/"), {"model": "my-model-1"}),
        (Source(), {"model": "smollm2-135m"}),
        (Source(model="embedded"), {"model": "smollm2-135m"}),
    ],
)
def test_a_source_names_its_case(source, case):
    source.check()
    assert source.case == case


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Source(shape="llama"), ["--shape must be one of", "llama-3.1-8b", "'llama'"]),
        (Source(shape="qwen3-8b", model="x"), ["--shape or --model, not both"]),
        (Source(dtype="int4"), ["--dtype must be one of bf16, fp16, fp32", "'int4'"]),
    ],
)
def test_an_unknown_source_is_refused(source, words):
    with pytest.raises(UserError) as caught:
        source.check()
    for word in words:
        assert word in str(caught.value)


# --- what is counted


def test_bytes_of_a_step_of_the_8b_shape():
    """Count 15.0 GB of weights without the input embedding, and 128 KiB of cache per token."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            shapes.config_of("llama-3.1-8b"), dtype=torch.bfloat16
        )
    weights = 2 * (8_030_261_248 - 128256 * 4096)
    assert bytes_per_step(model, Case(1, 512, 128)) == weights + 576 * 131072
    assert bytes_per_step(model, Case(128, 512, 64)) == weights + 128 * 544 * 131072


def test_a_tied_embedding_is_read_as_the_head():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.config_of("smollm2-135m"))
    # 30 layers of 3 heads of 64, keys and values, float32
    assert bytes_per_step(model, Case(2, 90, 20)) == 4 * (134_515_008 + 2 * 100 * 30 * 2 * 3 * 64)


@pytest.mark.parametrize(
    ("kind", "changes", "windows"),
    [
        ("Llama", {}, [100, 100]),
        ("Mistral", {"sliding_window": 8}, [8, 8]),
        ("Gemma2", {"sliding_window": 8}, [8, 100]),
    ],
)
def test_a_sliding_window_is_all_that_its_layer_reads(kind, changes, windows):
    model = tiny_models.make(kind, **changes)
    weights = sum(p.nbytes for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is not embedding:
        weights -= embedding.nbytes
    tokens = sum(windows)
    dim = model.config.head_dim
    assert bytes_per_step(model, Case(1, 90, 20)) == weights + tokens * 2 * 2 * dim * 4


def test_a_clock_leaves_the_prompt_out(monkeypatch):
    ticks = iter([10.0, 11.0, 11.5, 12.0])
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(ticks))
    clock = TokenClock(gets_prompt=True)
    for _ in range(4):
        clock.put(torch.zeros(1))
    assert clock.times(3) == decode.Times(first=1.0, step=0.5)
    with pytest.raises(RuntimeError, match="wanted 4 tokens a row, got 3"):
        clock.times(4)


def test_figures_follow_from_the_times():
    found = BenchResult({"shape": "x"}, bandwidth=Estimate(3000.0, 2990.0, 3010.0))
    times = [decode.Times(0.02, step) for step in (0.004, 0.005, 0.008)]
    case = Case(8, 512, 128)
    decode.add_times(found, "llmfast", {"batch": 8, "prompt": 512}, case, times, 12e9)
    got = {row.metric: (row.value, row.low, row.high, row.repeats) for row in found.rows}
    assert got == {
        "tok_per_s": (1600.0, 1000.0, 2000.0, 3),
        "ms_per_step": (5.0, 4.0, 8.0, 3),
        "ttft_ms": (20.0, 20.0, 20.0, 3),
        "roofline_share": (pytest.approx(0.8), 0.5, 1.0, 3),
    }
    assert {row.case for row in found.rows} == {"shape=x batch=8 prompt=512"}


def test_a_case_says_how_many_tokens_only_if_they_are_not_the_usual():
    assert Case(1, 512, 128).key == {"batch": 1, "prompt": 512}
    assert Case(128, 512, 64).key == {"batch": 128, "prompt": 512}
    assert Case(128, 512, 128).key == {"batch": 128, "prompt": 512, "new": 128}


# --- what is run


def test_every_way_is_measured_in_one_process(tiny, monkeypatch):
    from llmfast.runner.generate.batch import StaticBatch

    starts = []  # the runner and the lengths of the prompts
    own = StaticBatch.start

    def start(self, input_ids, lengths, *args, **kwargs):
        starts.append((self, list(lengths)))
        return own(self, input_ids, lengths, *args, **kwargs)

    monkeypatch.setattr(StaticBatch, "start", start)
    said = []
    found = measure_decode(
        tiny,
        [Case(1, 20, 5), Case(10, 70, 6)],
        progress=lambda what, done, total: said.append((done, total)),
    )
    assert found.notes == []
    # a warm-up, three runs of the runner, and two of generate on the same runner
    expected = [[20]] * 6 + [[70] * 8 + [1] * 2] + [[70] * 10] * 5
    assert [lengths for _, lengths in starts] == expected
    assert len({id(runner) for runner, _ in starts[:6]}) == 1
    assert len({id(runner) for runner, _ in starts[6:]}) == 1
    assert starts[0][0] is not starts[6][0]

    base = "shape=tiny weights=fp32 kv=fp32"
    cases = [f"{base} batch=1 prompt=20 new=5", f"{base} batch=10 prompt=70 new=6"]
    speed = {"tok_per_s", "ms_per_step", "ttft_ms"}
    got = {(row.case, row.impl, row.metric): row for row in found.rows}
    assert set(got) == {
        (case + extra, impl, metric)
        for case in cases
        for extra, impl in (("", "llmfast"), (" through=generate", "llmfast"), ("", "transformers"))
        for metric in speed
    }
    for (case, impl, metric), row in got.items():
        assert 0 < row.low <= row.value <= row.high
        assert row.repeats == (2 if "through" in case else 3), (impl, metric)
        if metric == "tok_per_s":
            step = got[case, impl, "ms_per_step"].value
            assert row.value == pytest.approx(int(parse_case(case)["batch"]) * 1e3 / step)
    assert said == [(i, 5) for i in range(5)]


def test_four_bit_weights_are_the_runner_s_and_the_peer_has_its_own(tiny, monkeypatch):
    reads, own = [], decode.add_times

    def add_times(result, impl, key, case, times, step_bytes=None):
        reads.append(step_bytes)
        own(result, impl, key, case, times, step_bytes)

    monkeypatch.setattr(decode, "add_times", add_times)
    case = Case(1, 20, 5)
    found = measure_decode(tiny, [case], repeats=1, weights="int4-g32")
    assert {(row.impl, parse_case(row.case)["weights"]) for row in found.rows} == {
        ("llmfast", "int4-g32"),
        ("transformers", "fp32"),
    }
    dense = bytes_per_step(tiny.make(torch.device("cpu")), case)
    layers = 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96)  # of weights, in two blocks
    packed = 2 * (128 + 64 + 192) * (128 // 2) + 2 * 64 * (128 // 2)  # whole chunks of 128 columns
    scales = layers // 32 * 4
    assert reads[0] == dense - 4 * layers + packed + scales


def test_eight_bit_weights_have_one_scale_an_output(tiny):
    found = measure_decode(tiny, [Case(1, 8, 2)], repeats=1, peers=False, weights="int8")
    assert {parse_case(row.case)["weights"] for row in found.rows} == {"int8-channel"}


def test_without_peers_transformers_is_left_alone(tiny):
    found = measure_decode(tiny, [Case(1, 8, 2)], repeats=1, peers=False)
    assert {row.impl for row in found.rows} == {"llmfast"}


def test_the_peer_runs_a_model_that_is_as_it_was(tiny, monkeypatch):
    seen = []
    own = decode._peer_times

    def peer(model, *args):
        seen.append([name for name in vars(model) if "llmfast" in name or name == "generate"])
        return own(model, *args)

    monkeypatch.setattr(decode, "_peer_times", peer)
    measure_decode(tiny, [Case(1, 8, 2)], repeats=1)
    assert seen == [[]]


def test_the_peer_s_time_is_capped(tiny, monkeypatch):
    monkeypatch.setattr(decode, "PEER_SECONDS", 0.0)
    found = measure_decode(tiny, [Case(1, 8, 2)])
    repeats = {row.impl: row.repeats for row in found.rows if "through" not in row.case}
    assert repeats == {"llmfast": 3, "transformers": 1}


def test_a_case_without_memory_is_noted_and_the_others_go_on(tiny, monkeypatch):
    own = decode._run

    def run(runner, ids, lengths, tokens):
        if len(lengths) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return own(runner, ids, lengths, tokens)

    monkeypatch.setattr(decode, "_run", run)
    found = measure_decode(tiny, [Case(2, 8, 2), Case(1, 8, 2)], repeats=1, peers=False)
    assert found.notes == ["llmfast, batch 2, prompt 8: CUDA out of memory."]
    assert {parse_case(row.case)["batch"] for row in found.rows} == {"1"}
    with pytest.raises(UserError, match="nothing could be measured: llmfast, batch 2"):
        measure_decode(tiny, [Case(2, 8, 2)], repeats=1, peers=False)


def test_more_tokens_than_the_context_holds_are_refused(tiny):
    with pytest.raises(UserError, match=r"batch 1, prompt 250: with 7 tokens .* 256 tokens"):
        measure_decode(tiny, [Case(1, 250, 7)])


@pytest.mark.gpu
def test_on_a_gpu_the_roofline_and_the_memory_are_measured_too(shape):
    found = measure_decode(shape, [Case(3, 100, 20)], peers=False)
    figures = {row.metric: row.value for row in found.rows if "through" not in row.case}
    assert {row.case.split(" kv")[0] for row in found.rows} == {
        "op=copy",
        "shape=tiny weights=bf16",
    }
    assert figures["gb_per_s"] == found.bandwidth.value > 100
    assert 0 < figures["roofline_share"] < 1
    assert 0 < figures["peak_over_weights_cache_gib"] < 1


def test_a_model_that_the_runner_does_not_run_is_refused(tiny, monkeypatch):
    sizes = {**TINY[1], "hidden_size": 32}  # heads of 8
    monkeypatch.setitem(SHAPES, "narrow", (TINY[0], sizes))
    with pytest.raises(UserError, match="the runner does not run this model") as caught:
        measure_decode(Source(shape="narrow"), [Case(1, 8, 2)])
    assert "head dimension 8" in str(caught.value)


# --- a process of its own


def test_a_start_is_timed_from_the_process_to_its_first_token(folder, tmp_path):
    seconds = decode.seconds_to_first_token(Source(model=str(folder)), 9, tmp_path / "cache")
    assert 0.5 < seconds < 300  # importing torch and transformers takes longer than that


def test_starts_come_first_with_a_cold_and_a_filled_cache(tiny, monkeypatch):
    caches = []

    def seconds(source, prompt, cache):
        assert source == tiny and prompt == 8
        cold = not list(cache.iterdir())
        (cache / "kernel").touch()
        caches.append((cache, cold))
        return 30.0 + len(caches) if cold else 10.0

    monkeypatch.setattr(decode, "seconds_to_first_token", seconds)
    found = measure_decode(tiny, [Case(2, 8, 2)], repeats=1, peers=False, starts=2)
    assert [cold for _, cold in caches] == [True, False] * 2
    assert caches[0][0] == caches[1][0] != caches[2][0]
    assert not any(cache.exists() for cache, _ in caches)
    rows = [row for row in found.rows if row.metric == "start_to_first_token_s"]
    base = "shape=tiny weights=fp32 kv=fp32 batch=1 prompt=8 start="
    assert [(r.case, r.value, r.low, r.high, r.repeats) for r in rows] == [
        (base + "cold", 32.0, 31.0, 33.0, 2),
        (base + "warm", 10.0, 10.0, 10.0, 2),
    ]


def test_the_child_finds_its_kernel_cache_where_it_is_told(monkeypatch):
    called = {}

    def run(command, env, **kwargs):
        called.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 0, stdout="noise\n1e12\n", stderr="")

    monkeypatch.setattr(decode.subprocess, "run", run)
    source = Source(shape="llama-3.1-8b")
    assert decode.seconds_to_first_token(source, 512, Path("/somewhere")) > 1e11
    assert called["env"]["TRITON_CACHE_DIR"] == "/somewhere"
    python, _, module, asked, prompt = called["command"]
    assert (python, module, prompt) == (sys.executable, "llmfast.measure.decode", "512")
    assert Source(**json.loads(asked)) == source


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"start is to be timed failed: .*no such file"):
        decode.seconds_to_first_token(Source(model="/no/where"), 9, tmp_path)
