"""The README's chart of decoding speed: what it draws, and that the file in docs is current."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from bench.tools.chart import draw, main
from llmfast.errors import UserError
from llmfast.measure.results import write

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


def test_a_drawn_file_passes_the_check_until_a_row_changes(runs, tmp_path, capsys):
    write(tmp_path / "h200/decode.json", runs)
    out = tmp_path / "chart.svg"
    given = ["--gpu", "h200", "--results", str(tmp_path), "--out", str(out)]
    assert main([*given, "--check"]) == 1
    assert main(given) == 0 and main([*given, "--check"]) == 0
    write(tmp_path / "h200/decode.json", runs[:1])
    assert main([*given, "--check"]) == 1
    assert "draw it" in capsys.readouterr().err


def test_a_missing_file_ends_with_code_2(tmp_path, capsys):
    assert main(["--gpu", "h100", "--results", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_chart_in_docs_is_what_the_results_give():
    assert main(["--check"]) == 0, "run python -m bench.tools.chart"
