"""The benchmarks' own machinery, without a GPU: files import, figures are recorded."""

import importlib.util
from pathlib import Path

import pytest

from llmfast.measure.results import parse_case, read
from llmfast.measure.suites import SUITES

pytest_plugins = "pytester"

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "bench").glob("bench_*.py"))
SETTINGS = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
SETTINGS += ["-o", f"pythonpath={ROOT / 'bench/tools'}"]

# a clock in place of the GPU: 2 us for ours, 4 us for every peer, and one that fails
FAKES = """
from llmfast.measure.results import Env
from llmfast.measure.stats import Estimate

torch.cuda.is_available = lambda: True


def capture_env(commit):
    gpu = "NVIDIA H100 80GB HBM3"
    return Env(gpu, "1", "2", "3", "5", "0.1", commit or "abc", "2026-11-21T22:51:01Z")


def copy_bandwidth():
    return Timing(Estimate(1000.0, 990.0, 1010.0), 25, 20, 1)


def time_in_graph(impls, make_inputs, bytes_per_set, seconds):
    assert not torch.is_grad_enabled()
    found = {}
    for name in impls:
        us = 2.0 if name == "llmfast" else 4.0
        found[name] = Timing(Estimate(us, us / 2, us * 2), 50, 500, 20)
        if name.startswith("broken") or not make_inputs():
            found[name] = Failure("ValueError: no")
    return found
"""

CASES = """
def bench_norm(bench_op):
    impls = {"llmfast": abs, "eager": abs, "broken": abs}
    bench_op("norm", "tokens=1 op=rms_norm", impls, lambda: (1,), bytes_moved=6000)


def bench_prefill(bench_op):
    case = {"dim": 128, "seq": 2048}
    bench_op("prefill", case, {"llmfast": abs, "cudnn": abs}, lambda: (1,), flops=4e9)


def bench_ours_fails(bench_op):
    bench_op("norm", "tokens=2", {"llmfast": abs, "eager": abs}, lambda: ())
"""


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_benchmark_imports_without_a_gpu(path):
    assert [name for name in vars(load(path)) if name.startswith("bench_")]


def test_every_command_names_a_file_that_is_there():
    commands = [suite.command for suite in SUITES.values() if suite.command]
    for command in commands:
        for word in command.split():
            assert not word.startswith("bench/") or (ROOT / word).is_file(), command


def test_bench_op_records_each_metric_of_the_suite(pytester):
    pytester.makeconftest((ROOT / "bench/conftest.py").read_text() + FAKES)
    (pytester.path / "bench_it.py").write_text(CASES)
    options = [*SETTINGS]
    result = pytester.runpytest_subprocess(
        *options, "bench_it.py", "--results", "out", "--commit", "f00"
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*llmfast was not timed: ValueError: no*",
            "norm: tokens=1 op=rms_norm: broken was not timed: ValueError: no",
            "written: out/norm.json",
        ]
    )
    out = pytester.path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "ceilings.json",
        "norm.json",
        "prefill.json",
    ]
    (run,) = read(out / "norm.json")
    assert run.env.commit == "f00"
    found = {(row.case, row.impl, row.metric): row.value for row in run.rows}
    assert found == {
        ("tokens=1 op=rms_norm", "llmfast", "us"): 2.0,
        ("tokens=1 op=rms_norm", "llmfast", "gb_per_s"): 3.0,
        ("tokens=1 op=rms_norm", "eager", "us"): 4.0,
        ("tokens=1 op=rms_norm", "eager", "gb_per_s"): 1.5,
        ("op=copy", "torch", "gb_per_s"): pytest.approx(2147.483648),
    }
    (run,) = read(out / "prefill.json")
    rows = {row.impl: row for row in run.rows if row.case != "op=copy"}
    assert parse_case(rows["cudnn"].case) == {"dim": "128", "seq": "2048"}
    assert (rows["llmfast"].metric, rows["llmfast"].value) == ("tflops", pytest.approx(2000.0))
    assert rows["cudnn"].value == pytest.approx(1000.0)
    (run,) = read(out / "ceilings.json")
    assert [row.case for row in run.rows] == ["op=copy"]


def test_without_a_gpu_the_benchmarks_skip_with_the_reason(pytester):
    hide = "\ntorch.cuda.is_available = lambda: False\n"
    pytester.makeconftest((ROOT / "bench/conftest.py").read_text() + hide)
    (pytester.path / "bench_it.py").write_text(CASES)
    options = [*SETTINGS, "-rs"]
    result = pytester.runpytest_subprocess(*options, "bench_it.py")
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(["*times a GPU: needs a CUDA device*"])
