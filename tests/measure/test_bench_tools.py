"""`python bench/tools`: writes and checks pages, combines processes, validates files."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmfast.measure.results import Env, Row, Run, read, write
from render import render

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path):
    """Make a checkout with one figure, and its docs."""
    env = Env("NVIDIA H100", "1", "2", "3", "5", "0.1", "abc", "2026-11-21T22:51:01Z")
    row = Row("op=rms_norm tokens=1", "llmfast", "us", "us", 2.0, 1.0, 3.0, 50)
    write(tmp_path / "bench/results/h100/norm.json", (Run("a", env, (row,)),))
    (tmp_path / "docs").mkdir()
    return tmp_path


def tools(*arguments):
    command = [sys.executable, ROOT / "bench/tools", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_docs_are_written_and_checked(root):
    out = root / "docs/benchmarks.md"
    stale = tools("docs", "--root", root, "--check")
    assert stale.returncode == 1 and not out.exists()
    assert tools("docs", "--root", root).returncode == 0
    assert out.read_text() == render(root / "bench/results")
    assert tools("docs", "--root", root, "--check").returncode == 0
    out.write_text("older")
    stale = tools("docs", "--root", root, "--check")
    assert stale.returncode == 1 and "run `python bench/tools docs`" in stale.stderr
    assert out.read_text() == "older"


def test_cited_figures_are_filled_and_checked(root):
    page = root / "README.md"
    cited = "<!-- row h100/norm op=rms_norm tokens=1 llmfast us -->{}<!-- /row --> us"
    page.write_text(f"An operation takes {cited.format('1.0')}.\n")
    assert tools("docs", "--root", root).returncode == 0
    assert page.read_text() == f"An operation takes {cited.format('2.000')}.\n"
    assert tools("docs", "--root", root, "--check").returncode == 0
    page.write_text(f"\n\nAn operation takes {cited.format('3.0')}.\n")
    stale = tools("docs", "--root", root, "--check")
    assert stale.returncode == 1
    assert "README.md:3: shows '3.0', the row has '2.000'" in stale.stderr
    page.write_text(cited.replace("tokens=1", "tokens=2"))
    refused = tools("docs", "--root", root)
    assert refused.returncode == 2
    assert "README.md:1: h100/norm has no row of llmfast, us" in refused.stderr
    assert "the nearest is `op=rms_norm tokens=1`" in refused.stderr


def test_the_committed_pages_are_current():
    done = tools("docs", "--check")
    assert done.returncode == 0, done.stderr


def test_validate_counts_or_refuses(root):
    path = root / "bench/results/h100/norm.json"
    assert "norm.json: 1 runs, 1 rows" in tools("validate", path).stdout
    path.write_text("{}")
    refused = tools("validate", path)
    assert refused.returncode == 2 and "norm.json lacks the field 'runs'" in refused.stderr


def test_combine_prints_the_files(root):
    folder = root / "bench/results/h100"
    done = tools("combine", folder, folder, "--into", root / "out")
    assert done.returncode == 0 and done.stdout.split() == [str(root / "out/norm.json")]
    (run,) = read(root / "out/norm.json")
    assert run.id == "a-x2"
    refused = tools("combine", root / "none", "--into", root / "out")
    assert refused.returncode == 2 and "is not a folder" in refused.stderr
