"""`llmfast bench throughput`, `latency` and `serve`: options, tables and files."""

import json

import pytest
import torch
from typer.testing import CliRunner

from llmfast.cli.main import app
from llmfast.measure import serving, shapes
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
        "max_position_embeddings": 128,
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


def test_the_defaults_are_the_workload_that_is_compared(monkeypatch):
    asked = []

    def measure(source, workload, **options):
        asked.append((source, workload, options["repeats"], options["options"]))
        raise SystemExit

    monkeypatch.setattr(serving, "measure_throughput", measure)
    run("throughput", "--shape", "tiny")
    assert asked == [(shapes.Source("tiny"), serving.Workload(), 1, {})]


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
    ],
    ids=lambda value: " ".join(value),
)
def test_a_bad_call_is_refused_before_anything_is_measured(args, words, monkeypatch):
    for name in ("throughput", "latency", "serve"):
        monkeypatch.setattr(serving, f"measure_{name}", None)
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line
