"""`llmfast bench`: the page is written, checked for being current, and results files are judged."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from llmfast.cli import bench
from llmfast.errors import UserError
from llmfast.measure.render import render
from llmfast.measure.results import Env, Row, Run, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path):
    env = Env("NVIDIA H100", "1", "2", "3", "5", "0.1", "abc", "2026-11-21T22:51:01Z")
    row = Row("op=rms_norm tokens=1", "llmfast", "us", "us", 2.0, 1.0, 3.0, 50)
    write(tmp_path / "results/h100/norm.json", (Run("a", env, (row,)),))
    return tmp_path / "results"


def test_docs_are_written_and_checked(results, tmp_path):
    out = tmp_path / "docs/benchmarks.md"
    call = ["docs", "--results", str(results), "--out", str(out)]
    stale = CliRunner().invoke(bench.bench_app, [*call, "--check"])
    assert stale.exit_code == 1 and not out.exists()
    assert CliRunner().invoke(bench.bench_app, call).exit_code == 0
    assert out.read_text() == render(results)
    assert CliRunner().invoke(bench.bench_app, [*call, "--check"]).exit_code == 0
    out.write_text("older")
    stale = CliRunner().invoke(bench.bench_app, [*call, "--check"])
    assert stale.exit_code == 1 and "llmfast bench docs" in stale.stderr
    assert out.read_text() == "older"


def test_the_committed_page_is_current():
    page, results = ROOT / "docs/benchmarks.md", ROOT / "bench/results"
    if not page.exists():
        pytest.skip("no page of figures yet: `make bench-docs` writes it")
    assert page.read_text() == render(results)


def test_validate_counts_or_refuses(results, capsys):
    bench.validate_command([results / "h100/norm.json"])
    assert "norm.json: 1 runs, 1 rows" in capsys.readouterr().out
    (results / "h100/norm.json").write_text("{}")
    with pytest.raises(UserError, match=r"norm\.json lacks the field 'runs'"):
        bench.validate_command([results / "h100/norm.json"])


def test_no_results_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        bench.docs_command(tmp_path / "none", tmp_path / "page.md")
    with pytest.raises(typer.Exit):
        bench.docs_command(results=tmp_path, out=tmp_path / "page.md", check=True)
