"""``llmfast bench decode``: decoding speed beside transformers and the memory roofline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from . import options
from .bench_common import Output, check_weights, parse_numbers, run_bench

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..measure.decode import Case
    from ..measure.figures import BenchResult, Progress
    from ..measure.results import Env, Row
    from ..measure.shapes import Source

PEERS = ("transformers", "none")
_COLUMNS = {  # of the table: a metric's title and its number format
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
class DecodeOptions:
    """The options of one call of ``llmfast bench decode``. None: not given."""

    shape: str | None = None
    model: str | None = None
    batch: str | None = None
    prompt: str = "512"
    tokens: int | None = None
    repeats: int = 3
    peers: str = "transformers"
    starts: int = 0
    dtype: str | None = None
    weights: str | None = None
    output: Output = field(default_factory=Output)

    def check(self) -> None:
        """Refuse options that cannot be measured, before anything is imported or loaded.

        Raises:
            UserError: an option outside its range.
        """
        for name, text in (("--batch", self.batch), ("--prompt", self.prompt)):
            if text is not None:
                parse_numbers(name, text)
        if self.tokens is not None and self.tokens < 2:
            raise UserError(f"--tokens must be at least 2, got {self.tokens}")
        if self.repeats < 1:
            raise UserError(f"--repeats must be at least 1, got {self.repeats}")
        if self.starts < 0:
            raise UserError(f"--starts must be 0 or more, got {self.starts}")
        if self.peers not in PEERS:
            raise UserError(f"--peers must be {' or '.join(PEERS)}, got {self.peers!r}")
        check_weights(self.weights)
        self.output.check()

    def cases(self, *, gpu: bool) -> list[Case]:
        """Return every batch with every prompt. Without a GPU the default is a batch of 1."""
        from ..measure.decode import Case, usual_tokens

        batches = parse_numbers("--batch", self.batch or ("1,8,32,128" if gpu else "1"))
        return [
            Case(batch, prompt, self.tokens or usual_tokens(batch))
            for prompt in parse_numbers("--prompt", self.prompt)
            for batch in batches
        ]


def decode_command(
    shape: options.Shape = None,
    model: options.Model = None,
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
        str, typer.Option(metavar="transformers|none", help="Peer to measure beside llmfast.")
    ] = "transformers",
    starts: Annotated[
        int,
        typer.Option(
            help="Time a new process to its first token, this many times with Triton's cache "
            "empty and as many with it filled."
        ),
    ] = 0,
    json_path: options.Json = None,
    results: options.Results = None,
    commit: options.Commit = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="bf16|fp16|fp32",
            help="Type of the weights and the cache.",
            show_default="bf16 for a shape on a GPU, else the model's own",
        ),
    ] = None,
    weights: options.RoundedWeights = None,
) -> None:
    """Measure decoding: tokens a second, share of the memory roofline, memory, first token.

    Three ways in one process, greedy, on the same random prompts:
    llmfast's runner itself, model.generate through llmfast.patch, and transformers' own.
    """
    output = Output(json_path, results, commit)
    bench_decode(
        DecodeOptions(
            shape, model, batch, prompt, tokens, repeats, peers, starts, dtype, weights, output
        )
    )


def bench_decode(options: DecodeOptions) -> BenchResult:
    """Measure, print a table and write the figures.

    Raises:
        UserError: an option outside its range, or a model that cannot be measured.
    """
    options.check()
    from ..measure.shapes import Source

    cases: list[Case] = []

    def measure(source: Source, progress: Progress) -> BenchResult:
        import torch

        from ..measure.decode import measure_decode

        cases.extend(options.cases(gpu=torch.cuda.is_available()))
        return measure_decode(
            source,
            cases,
            repeats=options.repeats,
            peers=options.peers != "none",
            starts=options.starts,
            weights=options.weights,
            progress=progress,
        )

    def show(console: Console, result: BenchResult, env: Env) -> None:
        console.print(_table(result, cases, env))
        for row in result.rows:
            if row.metric == "start_to_first_token_s":
                console.print(_start(row))

    source = Source(options.shape, options.model, options.dtype)
    return run_bench("decode", source, options.output, measure, show)


def _table(result: BenchResult, cases: list[Case], env: Env) -> Table:
    """Return a table of medians: one line for each implementation of a case.

    The ± column is half of the interval of the first metric.
    """
    from rich.table import Table

    from ..measure.decode import VIA_GENERATE
    from ..measure.figures import OURS, PEER

    where, caption = "the CPU", None
    if result.bandwidth is not None:
        where = f"{env.gpu}, whose copies reach {result.bandwidth.value:,.0f} GB/s"
        caption = _CAPTION
    name, weights, _ = result.model.values()
    table = Table(
        title=f"{name}, {result.packed or weights}, on {where}",
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    rows = {(row.case, row.impl, row.metric): row for row in result.rows}
    columns = {m: c for m, c in _COLUMNS.items() if any(m == key[2] for key in rows)}
    titles = [title for title, _ in columns.values()]
    table.add_column("batch x prompt", justify="right")
    table.add_column("")
    for title in (titles[0], "", *titles[1:]):
        table.add_column(title, justify="right", no_wrap=True)
    for case in cases:
        for who, key, impl in (
            ("runner", case.key, OURS),
            ("generate", {**case.key, **VIA_GENERATE}, OURS),
            (PEER if result.packed is None else f"{PEER}, {weights}", case.key, PEER),
        ):
            name = result.case(impl, key)
            here = {m: row for m in columns if (row := rows.get((name, impl, m))) is not None}
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
