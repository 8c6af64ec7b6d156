"""The harness of `pytest bench`: entries of pytest-benchmark, results files, small sizes."""

import importlib.util
import json
from pathlib import Path

import pytest

from harness import ReplayClock, time_on_cpu
from llmfast.measure.results import parse_case, read
from llmfast.measure.suites import SUITES
from llmfast.measure.timing import Failure

pytest_plugins = "pytester"

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "bench").glob("bench_*.py"))
SETTINGS = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
SETTINGS += ["-o", f"pythonpath={ROOT / 'bench/tools'}", "-o", "markers=impls(names): of a case"]

# a clock in place of the GPU: 2 us for ours, 4 us for each peer, and one peer that fails
PRETEND = "import torch\ntorch.cuda.is_available = lambda: True\n"
FAKES = """
from llmfast.measure.results import Env

torch.cuda.get_device_name = lambda: "NVIDIA H200"


def capture_env(commit):
    return Env("NVIDIA H200", "1", "2", "3", "5", "0.1", commit or "abc", "2026-11-21T22:51:01Z")


def copy_bandwidth():
    return Timing((1000.0,) * 25, 20, 1)


def time_in_graph(impls, make_inputs, bytes_per_set, seconds):
    assert not torch.is_grad_enabled()
    print("measured", *impls)
    found = {}
    for name in impls:
        us = 2.0 if name == "llmfast" else 4.0
        found[name] = Timing((us / 2, us, us, us, us * 2), 500, 20)
        if name.startswith("broken") or not make_inputs():
            found[name] = Failure("ValueError: no")
    return found
"""

CASES = """
import pytest
from harness import sized


@pytest.mark.impls("llmfast", "eager", "broken")
@pytest.mark.parametrize("tokens", sized([1, 9], [2]))
def bench_norm(bench_op, tokens):
    impls = {"llmfast": len, "eager": len, "broken": len}
    case = f"tokens={tokens} op=rms_norm"
    bench_op("norm", case, impls, lambda: ("x",), bytes_moved=6000)


@pytest.mark.impls("llmfast", "cudnn")
def bench_prefill(bench_op):
    case = {"dim": 128, "seq": 2048}
    bench_op("prefill", case, {"llmfast": len, "cudnn": len}, lambda: ("x",), flops=4e9)


def bench_patch(bench_once):
    bench_once("patch", {"shape": "tiny", "start": "cold"}, 2.5)
"""

OURS_FAILS = """
import pytest


@pytest.mark.impls("llmfast", "eager")
def bench_fails(bench_op):
    bench_op("norm", "tokens=2", {"llmfast": abs, "eager": abs}, lambda: ())


@pytest.mark.impls("llmfast")
def bench_other_names(bench_op):
    bench_op("norm", "tokens=3", {"llmfast": abs, "eager": abs}, lambda: (1,))
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run bench files with the repository's conftest, on a pretended GPU or on the CPU."""
    pytest.importorskip("pytest_benchmark", reason="needs the extra: pip install 'llmfast[bench]'")

    # pytest-benchmark measures nothing in a worker of pytest-xdist; the inner process is none
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def run(cases, *options, gpu):
        conftest = (ROOT / "bench/conftest.py").read_text()
        hide = "\nimport torch\ntorch.cuda.is_available = lambda: False\n"
        pytester.makeconftest(PRETEND + conftest + FAKES if gpu else hide + conftest)
        (pytester.path / "bench_it.py").write_text(cases)
        return pytester.runpytest_subprocess(*SETTINGS, "bench_it.py", *options)

    return run


def test_every_command_names_a_file_that_is_there():
    commands = [suite.command for suite in SUITES.values() if suite.command]
    for command in commands:
        for word in command.split():
            assert not word.startswith("bench/") or (ROOT / word).is_file(), command


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_benchmark_imports_and_says_how_it_is_run(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [name for name in vars(module) if name.startswith("bench_")]


def test_rows_and_entries_come_from_the_same_rounds(run, pytester):
    options = ["-s", "--results", "out", "--commit", "f00", "--benchmark-json=b.json"]
    result = run(CASES, *options, gpu=True)
    result.assert_outcomes(passed=7, skipped=2)
    # a case is measured once for all of its entries
    assert sum("measured llmfast eager broken" in line for line in result.outlines) == 2
    result.stdout.fnmatch_lines_random(
        [
            "norm: tokens=1 op=rms_norm: broken was not timed: ValueError: no",
            "written: out/norm.json",
        ]
    )
    out = pytester.path / "out"
    suites = ["ceilings", "norm", "patch", "prefill"]
    assert sorted(path.stem for path in out.iterdir()) == suites
    (measured,) = read(out / "norm.json")
    assert measured.env.commit == "f00"
    found = {(row.case, row.impl, row.metric): row.value for row in measured.rows}
    assert {key: value for key, value in found.items() if "tokens=9" not in key[0]} == {
        ("tokens=1 op=rms_norm", "llmfast", "us"): 2.0,
        ("tokens=1 op=rms_norm", "llmfast", "gb_per_s"): 3.0,
        ("tokens=1 op=rms_norm", "eager", "us"): 4.0,
        ("tokens=1 op=rms_norm", "eager", "gb_per_s"): 1.5,
        ("op=copy", "torch", "gb_per_s"): pytest.approx(2147.483648),
    }
    (measured,) = read(out / "prefill.json")
    rows = {row.impl: row for row in measured.rows if row.case != "op=copy"}
    assert parse_case(rows["cudnn"].case) == {"dim": "128", "seq": "2048"}
    assert (rows["llmfast"].metric, rows["llmfast"].value) == ("tflops", pytest.approx(2000.0))
    assert rows["cudnn"].value == pytest.approx(1000.0)
    (measured,) = read(out / "patch.json")
    assert [(row.case, row.value) for row in measured.rows if row.metric == "s"] == [
        ("shape=tiny start=cold", 2.5)
    ]

    saved = json.loads((pytester.path / "b.json").read_text())
    assert saved["machine_info"]["gpu"] == "NVIDIA H200"
    entries = {entry["name"]: entry for entry in saved["benchmarks"]}
    assert list(entries) == [
        "bench_norm[1-llmfast]",
        "bench_norm[1-eager]",
        "bench_norm[9-llmfast]",
        "bench_norm[9-eager]",
        "bench_prefill[llmfast]",
        "bench_prefill[cudnn]",
        "bench_patch",
    ]
    eager = entries["bench_norm[1-eager]"]
    assert eager["group"] == "norm: tokens=1 op=rms_norm"
    assert eager["stats"]["data"] == pytest.approx([2e-6, 4e-6, 4e-6, 4e-6, 8e-6])
    assert eager["extra_info"] == {"us": 4.0, "gb_per_s": 1.5}
    assert entries["bench_patch"]["stats"]["data"] == [2.5]


def test_ours_must_run_and_names_must_be_those_of_the_mark(run):
    result = run(OURS_FAILS, "--results", "out", gpu=True)
    result.assert_outcomes(failed=2, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*llmfast was not timed: ValueError: no*",
            "*norm: tokens=3: wanted llmfast; got llmfast, eager*",
        ]
    )


def test_saved_runs_are_compared(run):
    call = [CASES, "-k", "bench_prefill", "--results", "out"]
    run(*call, "--benchmark-save=first", gpu=True).assert_outcomes(passed=2)
    result = run(*call, "--benchmark-compare=0001", "--benchmark-compare-fail=min:1%", gpu=True)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*bench_prefill?llmfast? (0001_first)*"])


def test_without_a_gpu_small_sizes_run_and_nothing_is_written(run, pytester):
    result = run(CASES, "--benchmark-json=b.json", "--results", "out", gpu=False)
    result.assert_outcomes(passed=5)  # cudnn is left out
    assert not (pytester.path / "out").exists()
    entries = json.loads((pytester.path / "b.json").read_text())["benchmarks"]
    assert [entry["name"] for entry in entries][:2] == [
        "bench_norm[2-llmfast]",
        "bench_norm[2-eager]",
    ]
    assert all(entry["stats"]["min"] > 0 for entry in entries)


def test_the_clock_replays_its_samples():
    clock = ReplayClock()
    for samples in ((0.5, 0.25), (2.0,)):
        clock.load(samples)
        for seconds in samples:
            before = clock.read()
            clock.tick()
            assert clock.read() - before == seconds


def test_the_wall_clock_times_all_and_notes_failures():
    def fails(x):
        raise NotImplementedError("not here\nat all")

    found = time_on_cpu({"a": len, "b": fails}, lambda: ("x",))
    assert found["b"] == Failure("NotImplementedError: not here")
    assert found["a"].rounds == 3 and min(found["a"].samples) > 0
