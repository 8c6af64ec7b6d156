"""`llmfast bench decode`: its options, its table and its results files."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from llmfast.cli import bench_decode
from llmfast.cli.bench_decode import DecodeOptions
from llmfast.cli.main import app
from llmfast.errors import UserError
from llmfast.measure import decode, shapes
from llmfast.measure.decode import Case
from llmfast.measure.figures import BenchResult
from llmfast.measure.results import read
from llmfast.measure.stats import Estimate

TINY = (
    "llama",
    {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return "tiny"


def run(*args):
    return CliRunner().invoke(app, ["bench", "decode", *map(str, args)])


def test_figures_are_shown_and_merged_into_the_files(tiny, tmp_path):
    call = ["--shape", tiny, "--batch", "1,2", "--prompt", "8", "--tokens", 4, "--repeats", 2]
    result = run(*call, "--json", tmp_path / "figures.json", "--commit", "f00")
    assert result.exit_code == 0, result.output
    assert "tiny, fp32, on the CPU" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    ways = [line[3] for line in lines if line[1:3] == ["x", "8"]]
    assert ways == ["runner", "generate", "transformers"] * 2
    assert "say nothing about llmfast's speed" in result.stderr
    assert str(tmp_path / "figures.json") in result.stderr

    (first,) = read(tmp_path / "figures.json", suite="decode")
    assert first.env.commit == "f00"
    assert len(first.rows) == 2 * 3 * 3  # batches, ways, metrics
    assert run(*call, "--peers", "none", "--results", tmp_path / "new").exit_code == 0
    (second,) = read(tmp_path / "new/decode.json")
    assert {row.impl for row in second.rows} == {"llmfast"}
    assert len(second.rows) == 2 * 2 * 3


def test_json_on_stdout_is_all_that_is_there(tiny):
    result = run("--shape", tiny, "--prompt", 8, "--tokens", 2, "--peers", "none", "--json", "-")
    data = json.loads(result.stdout)
    (measured,) = data["runs"]
    assert {row["case"].split(" through")[0] for row in measured["rows"]} == {
        "shape=tiny weights=fp32 kv=fp32 batch=1 prompt=8 new=2"
    }
    assert "on the CPU" in result.stderr


def test_a_gpu_s_table_has_the_roofline_and_names_what_failed(monkeypatch, capsys):
    def measure(source, cases, **options):
        found = BenchResult({"shape": "qwen3-8b", "weights": "bf16", "kv": "bf16"})
        found.bandwidth = Estimate(3019.0, 3000.0, 3020.0)
        times = [decode.Times(0.05, step) for step in (0.009, 0.01, 0.011)]
        case = cases[0]
        decode.add_times(found, "llmfast", case.key, case, times, 24e9)
        decode.add_times(found, "transformers", case.key, case, times)
        memory = Estimate(0.8, 0.8, 0.8)
        found.add("llmfast", case.key, "peak_over_weights_cache_gib", memory, 1)
        start = {"batch": 1, "prompt": 512, "start": "cold"}
        found.add("llmfast", start, "start_to_first_token_s", Estimate(40.0, 39.0, 41.0), 3)
        found.notes.append("llmfast, batch 128, prompt 512: out of memory")
        return found

    monkeypatch.setattr(decode, "measure_decode", measure)
    monkeypatch.setenv("COLUMNS", "80")
    bench_decode.bench_decode(DecodeOptions(shape="qwen3-8b", batch="32"))
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if " x 512 " in line]
    shares = ["3,200.0", "±10.1%", "10.000", "79.5%", "50.0", "0.80"]
    assert rows[0] == ["32", "x", "512", "runner", *shares]
    assert rows[1] == ["32", "x", "512", "transformers", "3,200.0", "±10.1%", "10.000", "50.0"]
    assert "copies reach 3,019 GB/s" in " ".join(out.split())
    assert "Triton's cache empty: 40.0 s (39.0 to 41.0)" in out
    assert "not measured: llmfast, batch 128, prompt 512: out of memory" in err


@pytest.mark.parametrize("peers", ["none", "transformers"])
def test_the_table_of_packed_weights(tiny, peers):
    given = ("--prompt", 8, "--tokens", 2, "--weights", "int4-g32", "--peers", peers)
    out = run("--shape", tiny, *given).stdout
    assert "tiny, int4-g32, on the CPU" in out
    rows = [line.split()[3] for line in out.splitlines() if " x 8 " in line]
    assert rows == ["runner", "generate", "transformers,"][: 2 + (peers != "none")]
    assert peers == "none" or "transformers, fp32" in out


def test_the_usual_cases_are_those_of_the_published_figures():
    assert DecodeOptions().cases(gpu=True) == [
        Case(1, 512, 128),
        Case(8, 512, 128),
        Case(32, 512, 128),
        Case(128, 512, 64),
    ]
    assert DecodeOptions().cases(gpu=False) == [Case(1, 512, 128)]
    assert DecodeOptions(batch="2, 2,4", prompt="16,32", tokens=9).cases(gpu=True) == [
        Case(2, 16, 9),
        Case(4, 16, 9),
        Case(2, 32, 9),
        Case(4, 32, 9),
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch", "0"], ["--batch", "at least 1", "'0'"]),
        (["--batch", "1,,2"], ["--batch", "'1,,2'"]),
        (["--prompt", "many"], ["--prompt", "'many'"]),
        (["--prompt", "-5"], ["--prompt", "'-5'"]),
        (["--tokens", "1"], ["--tokens", "at least 2", "1"]),
        (["--repeats", "0"], ["--repeats", "0"]),
        (["--starts", "-1"], ["--starts", "-1"]),
        (["--peers", "vllm"], ["--peers", "transformers or none", "'vllm'"]),
        (["--shape", "gpt-5"], ["--shape", "smollm2-135m", "'gpt-5'"]),
        (["--shape", "qwen3-8b", "--model", "x"], ["--shape or --model"]),
        (["--json", "/no/where/x.json"], ["--json", "/no/where"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_bad_call_is_refused_before_anything_is_measured(args, words, monkeypatch):
    def measure(*args, **kwargs):
        raise AssertionError("measured for a call that cannot be met")

    monkeypatch.setattr(decode, "measure_decode", measure)
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line


def test_the_help_names_every_shape_and_imports_no_torch():
    code = (
        "import sys, json\n"
        "from typer.testing import CliRunner\n"
        "from llmfast.cli.main import app\n"
        "out = CliRunner().invoke(app, ['bench', 'decode', '--help']).stdout\n"
        "print(json.dumps([out, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    out, heavy = json.loads(done.stdout)
    assert not heavy
    words = out.replace("│", " ").split()
    for shape in shapes.SHAPES:
        assert any(word.strip(",.") == shape for word in words), shape


def test_bars_of_transformers_are_off_only_while_it_measures(tiny, monkeypatch):
    from transformers.utils import logging

    seen = []

    def measure(*args, **kwargs):
        seen.append(logging.is_progress_bar_enabled())
        raise UserError("enough")

    monkeypatch.setattr(decode, "measure_decode", measure)
    with pytest.raises(UserError, match="enough"):
        bench_decode.bench_decode(DecodeOptions(shape=tiny))
    assert seen == [False]
    assert logging.is_progress_bar_enabled()
