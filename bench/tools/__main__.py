"""The bookkeeping of measured figures.

python bench/tools docs [--check]                          fill the pages, or check them
python bench/tools chart [--gpu GPU] [--check]             draw the README's chart, or check it
python bench/tools combine DIR DIR DIR --into DIR          one run out of several processes
python bench/tools validate FILE...                        check results files
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import chart
from citations import Results, fill, pages_of
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

    draw = commands.add_parser("chart", help="draw the README's chart of decoding speed")
    draw.add_argument("--gpu", default=chart.GPU, help="results folder (default: %(default)s)")
    draw.add_argument("--check", action="store_true", help="write nothing; fail if it is stale")
    draw.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)

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
        if given.command == "chart":
            return draw_chart(given.root, given.gpu, check=given.check)
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
    """Write docs/benchmarks.md and the figures that other pages cite; with ``check`` compare only.

    Returns:
        0, or 1 if ``check`` found a page that is stale.
    """
    results = Results(root / "bench/results")
    out = root / "docs/benchmarks.md"
    pages = {out: render(results.folder)}
    stale: list[str] = []
    for path in pages_of(root):
        if path != out:
            name = str(path.relative_to(root))
            pages[path], differing = fill(path.read_text(encoding="utf-8"), results, name)
            stale += differing
    changed = [
        path
        for path, page in pages.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != page
    ]
    if check:
        if out in changed:
            stale.append(f"{out.relative_to(root)} is not what bench/results gives")
        for line in stale:
            print(f"error: {line}", file=sys.stderr)
        if stale:
            print("run `python bench/tools docs`", file=sys.stderr)
        return 1 if stale else 0
    for path in changed:
        path.write_text(pages[path], encoding="utf-8")
        print(path.relative_to(root))
    return 0


def draw_chart(root: Path, gpu: str, *, check: bool) -> int:
    """Write docs/assets/decode.svg from the rows of ``gpu``; with ``check`` compare only.

    Returns:
        0, or 1 if ``check`` found that the file differs.
    """
    svg = chart.draw(read(root / "bench/results" / gpu / "decode.json"))
    path = root / chart.PATH
    if path.is_file() and path.read_text(encoding="utf-8") == svg:
        return 0
    if check:
        print(
            f"error: {chart.PATH} is not what bench/results/{gpu} gives\n"
            f"run `python bench/tools chart --gpu {gpu}`",
            file=sys.stderr,
        )
        return 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg, encoding="utf-8")
    print(chart.PATH)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
