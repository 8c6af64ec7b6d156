"""The README's chart of decoding speed, and the check of its file."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from chart import PATH, draw
from llmfast.errors import UserError
from llmfast.measure.results import write

TOOLS = Path(__file__).parents[2] / "bench/tools"
RATE = {"metric": "tok_per_s", "unit": "tok/s"}
SHAPE = "shape=llama-3.1-8b weights={} kv=bf16 batch={} prompt=512{}"


@pytest.fixture
def runs(make_run, make_row, env):
    def rate(value, weights, batch, impl="llmfast", through=" through=generate"):
        return make_row(value, case=SHAPE.format(weights, batch, through), impl=impl, **RATE)

    old = make_run(rate(1234.6, "int4-g128", 8), id="old")
    new = make_run(
        rate(190.7, "bf16", 1),
        rate(199.0, "bf16", 1, through=""),  # the runner itself, which the chart leaves out
        rate(20.4, "bf16", 1, impl="transformers", through=""),
        id="new",
        env=replace(env, commit="abcdef0", date="2026-11-22T00:00:00Z"),
    )
    return old, new


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]


def test_bars_show_the_rows_of_generate(runs):
    found = texts(draw(runs))
    assert {"191", "20", "1,235"} <= {*found} and "199" not in found
    assert [text for text in found if text.startswith("batch")] == [
        "batch 1",
        "batch 8",
        "batch 32",
        "batch 128",
    ]
    assert found[0].endswith("NVIDIA H100 80GB HBM3")
    assert any("llmfast at abcdef0, 1f2e3d4c5b6a;" in text for text in found)


def test_heights_are_proportional_within_a_panel(runs):
    svg = draw(runs)
    height = {
        style: float(re.search(rf'class="{style}" x="\S+" y="(?!70)\S+" .*height="(\S+)"', svg)[1])
        for style in ("peer", "dense")
    }
    assert height["peer"] / height["dense"] == pytest.approx(20.4 / 190.7, abs=0.01)


def test_no_row_is_an_error(make_run):
    with pytest.raises(UserError, match="wanted rows of tok_per_s"):
        draw((make_run(),))


def command(*arguments):
    run = [sys.executable, TOOLS, "chart", *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True)


def test_a_drawn_file_passes_the_check_until_a_row_changes(runs, tmp_path):
    results = tmp_path / "bench/results/h200/decode.json"
    write(results, runs)
    given = ["--gpu", "h200", "--root", tmp_path]
    assert command(*given, "--check").returncode == 1 and not (tmp_path / PATH).exists()
    assert command(*given).returncode == 0 and command(*given, "--check").returncode == 0
    write(results, runs[:1])
    stale = command(*given, "--check")
    assert stale.returncode == 1
    assert "run `python bench/tools chart --gpu h200`" in stale.stderr


def test_a_missing_results_file_is_the_callers_mistake(tmp_path):
    refused = command("--root", tmp_path)
    assert refused.returncode == 2 and "cannot be read" in refused.stderr


def test_the_committed_chart_is_current():
    done = command("--check")
    assert done.returncode == 0, done.stderr
