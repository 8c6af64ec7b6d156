"""The bookkeeping of measured figures.

python bench/tools docs [--check]                          fill the pages, or check them
python bench/tools combine DIR DIR DIR --into DIR          one run out of several processes
python bench/tools validate FILE...                        check results files
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from combine import combine_folders
from llmfast.errors import UserError
from llmfast.measure.results import read
from render import render

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 if a checked page is stale, or 2 after a caller's mistake."""
    parser = argparse.ArgumentParser(prog="python bench/tools", description="Measured figures.")
    commands = parser.add_subparsers(dest="command", required=True)

    docs = commands.add_parser("docs", help="fill the pages with the figures of the results")
    docs.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")
    docs.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)

    combine = commands.add_parser("combine", help="combine several processes into one run")
    combine.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="one per process")
    combine.add_argument("--into", required=True, type=Path, metavar="DIR", help="results folder")
    combine.add_argument(
        "--across-commits",
        action="store_true",
        help="for commits that change nothing that is measured; the run names them all",
    )

    validate = commands.add_parser("validate", help="check results files against the schema")
    validate.add_argument("files", nargs="+", type=Path, metavar="FILE", help="<suite>.json")

    given = parser.parse_args(arguments)
    try:
        if given.command == "docs":
            return fill_docs(given.root, check=given.check)
        if given.command == "combine":
            paths = combine_folders(given.folders, given.into, across_commits=given.across_commits)
            print(*paths, sep="\n")
        else:
            for path in given.files:
                runs = read(path)
                print(f"{path}: {len(runs)} runs, {sum(len(run.rows) for run in runs)} rows")
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


def fill_docs(root: Path, *, check: bool) -> int:
    """Write docs/benchmarks.md from bench/results; with ``check`` only compare. Return 0 or 1."""
    out = root / "docs/benchmarks.md"
    page = render(root / "bench/results")
    if not check:
        out.write_text(page, encoding="utf-8")
        print(out)
    elif not out.is_file() or out.read_text(encoding="utf-8") != page:
        print(f"error: {out} is stale: run `python bench/tools docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
