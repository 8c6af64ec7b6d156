"""The results schema: it names every fault, files survive a round trip, merges are narrow."""

import json
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llmfast.errors import UserError
from llmfast.measure.results import (
    format_case,
    merge,
    parse_case,
    read,
    to_data,
    validate,
    write,
)
from llmfast.measure.suites import SUITES, UNITS

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "bench/results").rglob("*.json"))


def test_every_committed_file_is_valid():
    for path in COMMITTED:
        assert read(path), f"{path} holds no run"
        in_gpu_folder = path.parent.parent == ROOT / "bench/results"
        assert in_gpu_folder or path == ROOT / "bench/results/quality.json", path


def test_every_metric_of_a_suite_has_a_unit():
    used = {metric for suite in SUITES.values() for metric in suite.metrics}
    assert used == set(UNITS)


def test_valid_data_passes(make_run, make_row, copy_row):
    run = make_run(make_row(), make_row(impl="torch.compile"), copy_row)
    validate(
        to_data((run, replace(run, id="b", rows=(copy_row, make_row(metric="us", case="a=1"))))),
        suite="norm",
    )


def _change(*path_and_value):
    *path, key, value = path_and_value

    def change(data):
        for step in path:
            data = data[step]
        data[key] = value

    return change


def _drop(*path):
    def drop(data):
        for step in path[:-1]:
            data = data[step]
        del data[path[-1]]

    return drop


ROW = ("runs", 0, "rows", 0)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (_drop("schema"), "file.json lacks the field 'schema'"),
        (_change("schema", 2), "file.json: schema must be 1, got 2"),
        (_change("schema", True), "schema must be 1, got True"),
        (_change("runs", {}), "runs must be a list, got dict"),
        (_change("runs", 0, []), r"runs\[0\] must be an object, got list"),
        (_change("extra", 1), "unknown field 'extra'"),
        (_change("runs", 0, "id", ""), r"runs\[0\].id must be text that is not empty, got ''"),
        (_drop("runs", 0, "env", "gpu"), "run a: env lacks the field 'gpu'"),
        (_change("runs", 0, "env", "torch", 2.11), "run a: env.torch must be text"),
        (_change("runs", 0, "env", "date", "yesterday"), "env.date must be an ISO 8601 date"),
        (_change("runs", 0, "rows", []), "run a: rows must be a list of at least one row"),
        (_drop(*ROW, "repeats"), r"run a: rows\[0\] lacks the field 'repeats'"),
        (_change(*ROW, "p50", 1), r"rows\[0\] has the unknown field 'p50'"),
        (_change(*ROW, "case", "tokens 1"), r"rows\[0\].case: case: wanted key=value .* 'tokens'"),
        (_change(*ROW, "impl", "Torch Compile"), r"rows\[0\].impl .* got 'Torch Compile'"),
        (_change(*ROW, "metric", "tflops"), "metric must be one of us, gb_per_s in suite norm"),
        (_change(*ROW, "unit", "ms"), "unit must be 'us' for us, got 'ms'"),
        (_change(*ROW, "value", "10"), "value must be a number, got '10'"),
        (_change(*ROW, "value", True), "value must be a number, got True"),
        (_change(*ROW, "high", float("inf")), "high must be finite, got inf"),
        (_change(*ROW, "value", float("nan")), "value must be finite, got nan"),
        (_change(*ROW, "low", 10.5), "wanted low <= value <= high, got 10.5, 10.0, 11.0"),
        (_change(*ROW, "repeats", 0), "repeats must be an integer of at least 1, got 0"),
        (_change(*ROW, "repeats", 1.5), "repeats must be an integer of at least 1, got 1.5"),
    ],
)
def test_each_fault_is_named_with_its_place(make_run, fault, says):
    data = deepcopy(to_data((make_run(),)))
    validate(data, suite="norm", name="file.json")
    fault(data)
    with pytest.raises(UserError, match=says):
        validate(data, suite="norm", name="file.json")


def test_doubles_and_unknown_suites_are_named(make_run, make_row, copy_row):
    with pytest.raises(UserError, match=r"rows\[1\]: op=rms_norm tokens=1 / llmfast / us is there"):
        validate(to_data((make_run(make_row(), make_row(11.0)),)), suite="norm")
    with pytest.raises(UserError, match="is there twice"):
        validate(to_data((make_run(), make_run(id="b"))), suite="norm")
    with pytest.raises(UserError, match="'a' is there twice"):
        validate(to_data((make_run(), make_run(make_row(case="x=1")))), suite="norm")
    with pytest.raises(UserError, match="is there twice"):
        validate(to_data((make_run(copy_row, copy_row),)), suite="norm")
    with pytest.raises(UserError, match=r"suite must be one of .*norm.* got 'noise'"):
        validate(to_data(()), suite="noise")


def test_cases_are_parsed_and_formatted():
    case = "shape=llama-3.1-8b weights=bf16 in=100-1024"
    pairs = {"shape": "llama-3.1-8b", "weights": "bf16", "in": "100-1024"}
    assert parse_case(case) == pairs
    assert format_case(pairs) == case
    assert format_case({"batch": 1}) == "batch=1"


@pytest.mark.parametrize(
    "case", ["", "a", "a=", "=1", "a=1  b=2", " a=1", "a=1 ", "A=1", "a=1=2", "a=1\tb=2", "a=1 a=1"]
)
def test_bad_cases_are_refused(case):
    with pytest.raises(UserError, match="case: "):
        parse_case(case)


def test_a_file_survives_a_round_trip(tmp_path, make_run, copy_row, make_row):
    path = tmp_path / "h100" / "norm.json"
    run = make_run(make_row(), copy_row)
    write(path, (run,))
    assert read(path) == (run,)
    assert json.loads(path.read_text())["runs"][0]["env"] == asdict(run.env)
    assert [p.name for p in path.parent.iterdir()] == ["norm.json"]


def test_a_bad_run_leaves_the_file_as_it_was(tmp_path, make_run, make_row):
    path = tmp_path / "norm.json"
    write(path, (make_run(),))
    before = path.read_text()
    with pytest.raises(UserError, match="tflops"):
        merge(path, make_run(make_row(metric="tflops", unit="TFLOP/s"), id="b"))
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "says"), [(None, "cannot be read"), ("{", "not JSON"), ("[]", "must be an object")]
)
def test_files_that_are_no_results_are_named(tmp_path, text, says):
    path = tmp_path / "norm.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"norm.json.*{says}"):
        read(path)


def test_a_merge_replaces_only_its_own_cases(tmp_path, make_run, make_row, copy_row):
    path = tmp_path / "norm.json"
    one, two, peer = make_row(1.0), make_row(2.0, case="tokens=64"), make_row(3.0, impl="eager")
    merge(path, make_run(one, two, peer, copy_row, id="old"))
    newer = (make_row(5.0), replace(copy_row, value=3001.0))
    merge(path, make_run(*newer, id="new"))

    old, new = read(path)
    assert (old.id, old.rows) == ("old", (two, peer, copy_row))  # its ceiling stays with it
    assert (new.id, new.rows) == ("new", newer)


def test_a_run_goes_with_its_last_row(tmp_path, make_run, make_row, copy_row):
    path = tmp_path / "norm.json"
    merge(path, make_run(make_row(1.0), copy_row, id="old"))
    merge(path, make_run(make_row(2.0), copy_row, id="new"))
    assert [run.id for run in read(path)] == ["new"]


def test_in_the_ceilings_suite_a_ceiling_is_replaced(tmp_path, make_run, copy_row):
    path = tmp_path / "ceilings.json"
    merge(path, make_run(copy_row, id="old"))
    merge(path, make_run(replace(copy_row, value=3000.5), id="new"))
    (run,) = read(path)
    assert (run.id, run.rows[0].value) == ("new", 3000.5)


def test_a_known_run_is_extended(tmp_path, make_run, make_row, env):
    path = tmp_path / "norm.json"
    other = make_row(2.0, case="tokens=64")
    merge(path, make_run(make_row(1.0), other))
    merge(path, make_run(make_row(3.0)))
    (run,) = read(path)
    assert set(run.rows) == {make_row(3.0), other}
    with pytest.raises(UserError, match="run a is there already, from another environment"):
        merge(path, make_run(make_row(3.0), env=replace(env, gpu="NVIDIA A100")))
