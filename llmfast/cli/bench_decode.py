"""``llmfast bench decode``: tokens a second, beside transformers and beside what memory allows."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import ui

if TYPE_CHECKING:
    from rich.table import Table

    from ..measure.decode import Case, Measured
    from ..measure.results import Env, Row

PEERS = ("transformers", "none")
_WEIGHTS = ("int4-g32", "int4-g64", "int4-g128", "int8", "int8-g32", "int8-g64", "int8-g128")
_COLUMNS = {  # of the table: a metric's title, and how its figure is written
    "tok_per_s": ("tok/s", ",.1f"),
    "ms_per_step": ("ms/step", ",.3f"),
    "roofline_share": ("roofline", ".1%"),
    "ttft_ms": ("ttft ms", ",.1f"),
    "peak_over_weights_cache_gib": ("+GiB", ".2f"),
}
_CAPTION = """\
roofline: the time to read weights and cache at the copy's speed, over the time of a step
+GiB: peak memory over weights and cache"""


@dataclass(frozen=True)
class Request:
    """What one call of ``llmfast bench decode`` asks for. None: not given."""

    shape: str | None = None
    model: str | None = None
    batch: str | None = None
    prompt: str = "512"
    tokens: int | None = None
    repeats: int = 3
    peers: str = "transformers"
    starts: int = 0
    json_path: str | None = None
    results: Path | None = None
    commit: str | None = None
    dtype: str | None = None
    weights: str | None = None

    def check(self) -> None:
        """Refuse what cannot be measured, before anything is imported or loaded.

        Raises:
            UserError: an option outside its range.
        """
        for name, text in (("--batch", self.batch), ("--prompt", self.prompt)):
            if text is not None:
                numbers(name, text)
        if self.tokens is not None and self.tokens < 2:
            raise UserError(f"--tokens must be at least 2, got {self.tokens}")
        if self.repeats < 1:
            raise UserError(f"--repeats must be at least 1, got {self.repeats}")
        if self.starts < 0:
            raise UserError(f"--starts must be 0 or more, got {self.starts}")
        if self.peers not in PEERS:
            raise UserError(f"--peers must be {' or '.join(PEERS)}, got {self.peers!r}")
        check_weights(self.weights)
        check_json(self.json_path)

    def cases(self, *, gpu: bool) -> list[Case]:
        """Every batch with every prompt. Without a GPU a batch of 1 takes long enough."""
        from ..measure.decode import Case, usual_tokens

        batches = numbers("--batch", self.batch or ("1,8,32,128" if gpu else "1"))
        return [
            Case(batch, prompt, self.tokens or usual_tokens(batch))
            for prompt in numbers("--prompt", self.prompt)
            for batch in batches
        ]


def decode_command(
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random weights in the shape of llama-3.1-8b, qwen3-8b, qwen3-0.6b, mistral-7b "
            "or smollm2-135m.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR-OR-HUB-ID",
            help="A folder, a GGUF file or a model of the Hugging Face Hub.",
            show_default="the embedded model",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Sequences at once.",
            show_default="1,8,32,128; 1 without a GPU",
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens of each prompt.")] = "512",
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens out, of each row.", show_default="128; 64 from batch 128 on"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of a case; the median counts.")] = 3,
    peers: Annotated[
        str, typer.Option(metavar="transformers|none", help="Whom to measure beside llmfast.")
    ] = "transformers",
    starts: Annotated[
        int,
        typer.Option(
            help="Time a new process to its first token, this many times with Triton's cache "
            "empty and as many with it filled."
        ),
    ] = 0,
    json_path: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="Merge the figures into a results file."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The same, into DIR/decode.json.")
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(help="Commit of the sources, where the checkout has no history to ask."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="bf16|fp16|fp32",
            help="Of the weights and the cache.",
            show_default="bf16 for a shape on a GPU, else the model's own",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="int4-gN|int8|int8-gN",
            help="Round the decoder's linear layers to four or eight bits first, in groups of N "
            "inputs: 32, 64 or 128; int8: one scale an output.",
        ),
    ] = None,
) -> None:
    """Measure decoding: tokens a second, share of the memory roofline, memory, first token.

    Three ways in one process, greedy, on the same random prompts:
    llmfast's runner itself, model.generate through llmfast.patch, and transformers' own.
    """
    bench_decode(
        Request(
            shape,
            model,
            batch,
            prompt,
            tokens,
            repeats,
            peers,
            starts,
            json_path,
            results,
            commit,
            dtype,
            weights,
        )
    )


def bench_decode(request: Request) -> Measured:
    """Measure what is asked for, print a table and write the figures.

    Raises:
        UserError: a request that cannot be met.
    """
    request.check()
    from ..measure.shapes import Source

    source = Source(request.shape, request.model, request.dtype)
    source.check()
    with ui.progress("Importing") as step, quiet_transformers():
        import torch

        from ..measure.decode import measure_decode
        from ..measure.environment import capture_env

        gpu = torch.cuda.is_available()
        cases = request.cases(gpu=gpu)
        found = measure_decode(
            source,
            cases,
            repeats=request.repeats,
            peers=request.peers != "none",
            starts=request.starts,
            weights=request.weights,
            progress=step,
        )
        env = capture_env(commit=request.commit)
    for note in found.notes:
        ui.note(f"not measured: {note}")
    if not gpu:
        ui.note(
            "there is no GPU here: these are figures of PyTorch's CPU operations, with no graphs, "
            "and say nothing about llmfast's speed"
        )
    from rich.console import Console

    console = Console(stderr=request.json_path == "-")
    console.print(_table(found, cases, env))
    for row in found.rows:
        if row.metric == "start_to_first_token_s":
            console.print(_start(row))
    write_figures(found, env, "decode", request.json_path, request.results)
    return found


def check_weights(weights: str | None) -> None:
    """
    Raises:
        UserError: ``--weights`` names no form.
    """
    if weights not in (None, *_WEIGHTS):
        raise UserError(f"--weights must be {', '.join(_WEIGHTS)}; got {weights!r}")


def check_json(path: str | None) -> None:
    """
    Raises:
        UserError: ``--json`` names a file in a folder that is not there.
    """
    if path not in (None, "-") and not Path(str(path)).parent.is_dir():
        raise UserError(f"--json: there is no folder {Path(str(path)).parent}")


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Its own bars would be drawn over ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def numbers(option: str, text: str) -> list[int]:
    """``"1,8,32"`` as numbers of at least 1, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} must be numbers of at least 1 with commas between, got {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))


def _table(found: Measured, cases: list[Case], env: Env) -> Table:
    """A line for each way of running a case: medians, and half of the first one's interval."""
    from rich.table import Table

    from ..measure.decode import OURS, PEER, THROUGH

    where, caption = "the CPU", None
    if found.bandwidth is not None:
        where = f"{env.gpu}, whose copies reach {found.bandwidth.value:,.0f} GB/s"
        caption = _CAPTION
    name, weights, _ = found.model.values()
    table = Table(
        title=f"{name}, {found.packed or weights}, on {where}",
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    rows = {(row.case, row.impl, row.metric): row for row in found.rows}
    columns = {m: c for m, c in _COLUMNS.items() if any(m == key[2] for key in rows)}
    titles = [title for title, _ in columns.values()]
    table.add_column("batch x prompt", justify="right")
    table.add_column("")
    for title in (titles[0], "", *titles[1:]):
        table.add_column(title, justify="right", no_wrap=True)
    for case in cases:
        for who, key, impl in (
            ("runner", case.key, OURS),
            ("generate", {**case.key, **THROUGH}, OURS),
            (PEER if found.packed is None else f"{PEER}, {weights}", case.key, PEER),
        ):
            ran = found.case(impl, key)
            here = {m: row for m in columns if (row := rows.get((ran, impl, m))) is not None}
            if not here:
                continue
            cells = [
                f"{here[m].value:{form}}" if m in here else "" for m, (_, form) in columns.items()
            ]
            rate = here["tok_per_s"]
            cells.insert(1, f"±{(rate.high - rate.low) / 2 / rate.value:.1%}")
            table.add_row(f"{case.batch} x {case.prompt}", who, *cells)
    return table


def _start(row: Row) -> str:
    from ..measure.results import parse_case

    cache = {"cold": "empty", "warm": "filled"}[parse_case(row.case)["start"]]
    return (
        f"process start to first token, Triton's cache {cache}: {row.value:.1f} s "
        f"({row.low:.1f} to {row.high:.1f})"
    )


def write_figures(
    found: Measured, env: Env, suite: str, json_path: str | None, results: Path | None
) -> None:
    """Merge what was measured into a file (``-``: print it), and into ``results/<suite>.json``."""
    from ..measure.environment import run_id
    from ..measure.results import Run, merge, to_data, validate

    run = Run(run_id(env), env, tuple(found.rows))
    if json_path == "-":
        data: dict[str, Any] = to_data((run,))
        validate(data, suite=suite)
        print(json.dumps(data, indent=1))
    elif json_path is not None:
        merge(Path(json_path), run, suite=suite)
        print(json_path, file=sys.stderr)
    if results is not None:
        path = results / f"{suite}.json"
        merge(path, run)
        print(path, file=sys.stderr)
