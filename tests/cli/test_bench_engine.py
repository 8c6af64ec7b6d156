"""`llmfast bench throughput`, `latency` and `serve`: options, tables and files."""

import json

import pytest
import torch
from typer.testing import CliRunner

from llmfast.cli.main import app
from llmfast.measure import offline, scenarios, serve, shapes, workload
from llmfast.measure.results import read

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


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "100")


def run(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


SMALL = ["--shape", "tiny", "--requests", 4, "--input", "3-12", "--output", 5, "--max-num-seqs", 2]


def test_throughput(tmp_path):
    result = run("throughput", *SMALL, "--results", tmp_path, "--commit", "f00")
    assert result.exit_code == 0, result.output
    assert "tiny, fp32, on the CPU: requests 4, in 3-12, out 5" in " ".join(result.stdout.split())
    titles = [line.split(", ")[0].strip() for line in result.stdout.splitlines()]
    assert {"output", "prompts and output", "time"} <= set(titles)
    assert "say nothing about llmfast's speed" in result.stderr
    (measured,) = read(tmp_path / "throughput.json")
    assert measured.env.commit == "f00"
    assert [row.metric for row in measured.rows] == ["out_tok_per_s", "total_tok_per_s", "s"]


def test_rounded_weights(tmp_path):
    result = run("throughput", *SMALL, "--weights", "int4-g32", "--results", tmp_path)
    assert result.exit_code == 0, result.output
    assert "tiny, int4-g32, on the CPU" in result.stdout
    (measured,) = read(tmp_path / "throughput.json")
    assert all("weights=int4-g32 kv=fp32" in row.case for row in measured.rows)
    result = run("latency", "--shape", "tiny", "--weights", "int3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--weights must be int4-g32" in result.stderr


def test_busy_wants_a_gpu():
    result = run("throughput", *SMALL, "--busy")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "--busy needs a CUDA device" in line


def test_latency():
    call = ["--shape", "tiny", "--batch", 2, "--input", 6, "--output", 4, "--repeats", 2]
    result = run("latency", *call, "--json", "-")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["runs"][0]["rows"]
    assert row["case"] == "shape=tiny weights=fp32 kv=fp32 batch=2 in=6 out=4"
    assert row["repeats"] == 2 and "time, s" in result.stderr


def test_serve(tmp_path):
    path = tmp_path / "figures.json"
    result = run("serve", *SMALL, "--rates", "100,inf", "--json", path)
    assert result.exit_code == 0, result.output
    assert "rate 100" in result.stdout and "rate inf" in result.stdout
    (measured,) = read(path, suite="serve")
    assert len(measured.rows) == 2 * 11


def test_scenarios(tmp_path):
    sizes = ["--requests", 3, "--input", 4, "--output", 2, "--prefix", 20, "--repeats", 1]
    call = ["serve", "--shape", "tiny", "--scenario", "prefix", *sizes]
    result = run(*call, "--results", tmp_path)
    assert result.exit_code == 0, result.output
    assert "scenario prefix, requests 3" in " ".join(result.stdout.split())
    assert "ttft mean, ms" in result.stdout and "prefix_cache off" in result.stdout
    sizes = ["--requests", 1, "--input", 4, "--output", 1500, "--long", 40, "--running", 2]
    call = ["serve", "--shape", "tiny", "--scenario", "long-prompts", *sizes, "--every", 0]
    call += ["--max-num-batched-tokens", 30, "--max-num-seqs", 4]
    result = run(*call, "--results", tmp_path)
    assert result.exit_code == 0, result.output
    assert "policy chunked, budget 30" in result.stdout and "prefill-first" in result.stdout
    rows = [row for found in read(tmp_path / "serve.json") for row in found.rows]
    assert len(rows) == 2 + 2 * 4


def test_the_scenarios_of_the_issue_are_the_defaults(monkeypatch):
    asked = []

    def measure(source, scenario, **options):
        options.pop("progress")
        asked.append((scenario, options))
        raise SystemExit

    monkeypatch.setattr(scenarios, "measure_prefix", measure)
    monkeypatch.setattr(scenarios, "measure_long_prompts", measure)
    run("serve", "--scenario", "prefix", "--max-num-batched-tokens", 99)
    run("serve", "--scenario", "long-prompts", "--max-num-batched-tokens", 99)
    run("serve", "--scenario", "long-prompts", "--seed", 3, "--temperature", 0)
    assert asked == [
        (scenarios.SharedPrefix(), {"repeats": 3, "options": {"max_num_batched_tokens": 99}}),
        (scenarios.LongPrompts(), {"repeats": 1, "options": {}, "budget": 99}),
        (
            scenarios.LongPrompts(seed=3, temperature=0),
            {"repeats": 1, "options": {}, "budget": 2048},
        ),
    ]


def test_the_defaults_are_the_workload_that_is_compared(monkeypatch):
    asked = []

    def measure(source, drawn, **options):
        asked.append((source, drawn, options["repeats"], options["options"]))
        raise SystemExit

    monkeypatch.setattr(offline, "measure_throughput", measure)
    run("throughput", "--shape", "tiny")
    assert asked == [(shapes.Source("tiny"), workload.Workload(), 1, {})]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["throughput", "--requests", "0"], ["--requests", "at least 1", "0"]),
        (["throughput", "--input", "9-3"], ["--input", "'9-3'"]),
        (["throughput", "--input", "0"], ["--input", "'0'"]),
        (["throughput", "--output", "a-b"], ["--output", "'a-b'"]),
        (["throughput", "--output", "1-2-3"], ["--output", "'1-2-3'"]),
        (["throughput", "--temperature", "-1"], ["--temperature", "-1"]),
        (["throughput", "--temperature", "nan"], ["--temperature", "nan"]),
        (["throughput", "--repeats", "0"], ["--repeats", "0"]),
        (["throughput", "--max-num-seqs", "0"], ["--max-num-seqs", "0"]),
        (["throughput", "--shape", "gpt-5"], ["--shape", "'gpt-5'"]),
        (["throughput", "--json", "/no/where/x.json"], ["--json", "/no/where"]),
        (["latency", "--batch", "0"], ["--batch", "at least 1"]),
        (["latency", "--output", "0"], ["--output", "at least 1"]),
        (["serve", "--rates", "1,,2"], ["--rates", "'1,,2'"]),
        (["serve", "--rates", "0"], ["--rates", "'0'"]),
        (["serve", "--rates", "nan"], ["--rates", "'nan'"]),
        (["serve", "--requests", "0"], ["--requests", "at least 1"]),
        (["serve", "--scenario", "soak"], ["--scenario", "rates, prefix", "'soak'"]),
        (["serve", "--prefix", "9"], ["--prefix", "not an option of --scenario rates"]),
        (["serve", "--scenario", "prefix", "--rates", "1"], ["--rates", "scenario prefix"]),
        (["serve", "--scenario", "prefix", "--prefix", "0"], ["--prefix", "at least 1"]),
        (["serve", "--scenario", "prefix", "--input", "1-2"], ["--input", "one number", "1-2"]),
        (["serve", "--scenario", "long-prompts", "--running", "0"], ["--running", "at least 1"]),
        (["serve", "--scenario", "long-prompts", "--every", "-1"], ["--every", "0 or more"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_bad_call_is_refused_before_anything_is_measured(args, words, monkeypatch):
    for module, name in ((offline, "throughput"), (offline, "latency"), (serve, "serve")):
        monkeypatch.setattr(module, f"measure_{name}", None)
    for name in ("prefix", "long_prompts"):
        monkeypatch.setattr(scenarios, f"measure_{name}", None)
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line
