"""``llmfast bench``: measure, check results files and write the page of measured figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from . import ui
from .bench_decode import decode_command
from .bench_serve import serve_command
from .bench_serving import latency_command, throughput_command

bench_app = typer.Typer(no_args_is_help=True)
bench_app.command("decode")(decode_command)
bench_app.command("throughput")(throughput_command)
bench_app.command("latency")(latency_command)
bench_app.command("serve")(serve_command)


@bench_app.command("docs")
def docs_command(
    results: Annotated[Path, typer.Option(help="Folder of the results files.")] = Path(
        "bench/results"
    ),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/benchmarks.md"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the page is not up to date.")
    ] = False,
) -> None:
    """Write docs/benchmarks.md from the results files."""
    from ..measure.render import render

    if not results.is_dir():
        raise UserError(f"there is no folder {results}: run this from the checkout, or --results")
    page = render(results)
    if not check:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
        print(out)
    elif not out.is_file() or out.read_text(encoding="utf-8") != page:
        ui.error(f"{out} is not what {results} gives: run `llmfast bench docs`")
        raise typer.Exit(1)


@bench_app.command("validate")
def validate_command(
    files: Annotated[list[Path], typer.Argument(help="Results files, <suite>.json.")],
) -> None:
    """Check results files against the schema."""
    from ..measure.results import read

    for path in files:
        runs = read(path)
        print(f"{path}: {len(runs)} runs, {sum(len(run.rows) for run in runs)} rows")
