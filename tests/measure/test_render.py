"""The page of figures: ratios and shares within one run; the same files give the same page."""

from dataclasses import replace

import pytest

from llmfast.errors import UserError
from llmfast.measure.results import write
from render import render


@pytest.fixture
def results(tmp_path, make_run, make_row, copy_row, env):
    def gb(value, impl="llmfast", case="op=rms_norm tokens=1"):
        return make_row(value, case=case, impl=impl, metric="gb_per_s", unit="GB/s")

    new = make_run(
        make_row(10.0),
        make_row(20.0, impl="eager"),
        make_row(12.5, impl="torch.compile"),
        gb(2700.0),
        gb(1500.0, impl="eager"),
        copy_row,
        id="20261121T225101Z-1f2e3d4c5b6a-x3",
    )
    old = make_run(make_row(7.0, case="op=rms_norm tokens=64"), id="old")
    write(tmp_path / "h100/norm.json", (old, new))
    rate = {"metric": "tok_per_s", "unit": "tok/s", "case": "shape=llama-3.1-8b batch=1"}
    write(
        tmp_path / "h100/decode.json",
        (make_run(make_row(50.0, **rate), make_row(25.0, impl="transformers", **rate)),),
    )
    write(tmp_path / "h100/ceilings.json", (make_run(copy_row),))
    quality = make_row(12345.678, metric="perplexity", unit="1", case="model=m text=t")
    write(tmp_path / "quality.json", (make_run(quality, env=replace(env, gpu="none")),))
    return tmp_path


def test_the_page_shows_figures_shares_and_ratios(results):
    page = render(results)
    assert "| case | llmfast | eager | torch.compile | time, llmfast / eager |" in page
    assert (
        "| `op=rms_norm tokens=1` | 10.00 [9.000, 11.00] | 20.00 [19.00, 21.00] "
        "| 12.50 [11.50, 13.50] | 0.50 | 0.80 |" in page
    )
    assert "| case | llmfast | eager | llmfast, of copy | eager, of copy |" in page
    assert "| 2700 [2699, 2701] | 1500 [1499, 1501] | 90.0% | 50.0% |" in page
    assert "Copy bandwidth in this run: 3000 [2999, 3001] GB/s." in page
    assert "median of 3 processes" in page and "one process" in page
    assert "`pytest bench/bench_norm.py`" in page
    # twice the rate is half the time
    assert "| 50.00 [49.00, 51.00] | 25.00 [24.00, 26.00] | 0.50 |" in page
    assert "| `op=copy` | 3000 [2999, 3001] |" in page
    assert "| `model=m text=t` | 12346 [12345, 12347] |" in page


def test_runs_are_never_mixed(results):
    page = render(results)
    section = page[page.index("### norm") : page.index("### decode")]
    lines = [line for line in section.splitlines() if "tokens=64" in line]
    assert lines == ["| `op=rms_norm tokens=64` | 7.000 [6.000, 8.000] |"]
    assert section.count("NVIDIA H100 80GB HBM3, driver 580.1") == 2


def test_the_page_is_the_same_every_time(results):
    assert render(results) == render(results)
    assert render(results).endswith("\n")


def test_no_figures_and_bad_files_say_so(tmp_path):
    assert "No figures yet." in render(tmp_path)
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100/nrom.json").write_text('{"schema": 1, "runs": []}')
    with pytest.raises(UserError, match=r"nrom.json: suite must be one of .*norm"):
        render(tmp_path)
