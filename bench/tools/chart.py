"""The README's chart of decoding speed, drawn from the rows of a results file.

There is one panel per batch size, with an axis of its own from zero. A bar is the median, its
whisker the interval. A row that the results lack leaves its place empty. The SVG uses no script and
no font of its own, and has colors for light and dark pages. The same rows give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmfast.errors import UserError
from llmfast.measure.results import Row, Run, parse_case

PATH = "docs/assets/decode.svg"  # in the checkout
GPU = "h100"  # folder in bench/results that the README's chart is drawn from
SHAPE, PROMPT, BATCHES = "llama-3.1-8b", "512", (1, 8, 32, 128)


@dataclass(frozen=True)
class Series:
    """One bar of each panel: its label, its CSS class, and the pairs of a case that select it."""

    label: str
    style: str
    impl: str
    case: dict[str, str]


# all three are model.generate, so that like is compared with like
SERIES = (
    Series("transformers, bf16", "peer", "transformers", {"weights": "bf16"}),
    Series("llmfast, bf16", "dense", "llmfast", {"weights": "bf16", "through": "generate"}),
    Series(
        "llmfast, int4 (groups of 128)",
        "int4",
        "llmfast",
        {"weights": "int4-g128", "through": "generate"},
    ),
)

# GitHub shows the image on white and on #0d1117. The card has a background of its own, so that its
# text is readable where the page's theme and the reader's preference differ.
STYLE = """\
text { font-family: -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif;
  font-size: 12px; fill: #1f2328; }
.title { font-size: 16px; font-weight: 600; }
.value { font-weight: 600; }
.note { font-size: 11px; fill: #59636e; }
.card { fill: #ffffff; stroke: #d1d9e0; }
.axis { stroke: #d1d9e0; }
.whisker { stroke: #1f2328; stroke-width: 1.2; fill: none; }
.peer { fill: #9198a1; } .dense { fill: #218bff; } .int4 { fill: #e16f24; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .note { fill: #9198a1; }
  .card { fill: #0d1117; stroke: #3d444d; }
  .axis { stroke: #3d444d; }
  .whisker { stroke: #f0f6fc; }
  .peer { fill: #656c76; } .dense { fill: #388bfd; } .int4 { fill: #db6d28; }
}"""

# pixels
MARGIN, PANEL, GAP, BAR, BETWEEN = 24, 170, 24, 44, 12
TOP, HEIGHT, FOOT = 104, 190, 66  # above the plot, of the plot, below it
WIDTH = 2 * MARGIN + len(BATCHES) * PANEL + (len(BATCHES) - 1) * GAP


def find(runs: Sequence[Run], series: Series, batch: int) -> tuple[Row, Run] | None:
    """Return the row of a bar and its run, or None if the results lack it."""
    wanted = {"shape": SHAPE, "kv": "bf16", "batch": str(batch), "prompt": PROMPT} | series.case
    for run in runs:
        for row in run.rows:
            if (row.impl, row.metric) == (series.impl, "tok_per_s"):
                if parse_case(row.case) == wanted:
                    return row, run
    return None


def draw(runs: Sequence[Run]) -> str:
    """Draw the chart as an SVG document.

    Raises:
        UserError: no row of the chart is there.
    """
    bars = {(b, s.label): found for b in BATCHES for s in SERIES if (found := find(runs, s, b))}
    if not bars:
        raise UserError(
            f"chart: wanted rows of tok_per_s for shape={SHAPE} and prompt={PROMPT}, got none"
        )
    gpus = list(dict.fromkeys(run.env.gpu for _, run in bars.values()))
    title = f"Decoding of the Llama-3.1-8B shape, {' and '.join(gpus)}"
    height = TOP + HEIGHT + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_escape(_summary(bars, title))}">',
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
        _text(MARGIN, 34, title, "title"),
        _text(
            MARGIN,
            54,
            f"tokens/s of model.generate, greedy, prompts of {PROMPT} tokens, random weights; "
            "every panel has its own scale",
            "note",
        ),
    ]
    left = MARGIN
    for series in SERIES:
        parts.append(_rect(left, 70, 12, 12, series.style))
        parts.append(_text(left + 18, 80, series.label))
        left += 160
    for i, batch in enumerate(BATCHES):
        rows = [bars.get((batch, series.label)) for series in SERIES]
        parts += _panel(MARGIN + i * (PANEL + GAP), batch, [r[0] if r else None for r in rows])
    parts.append(_text(MARGIN, height - 16, f"{_sources(bars)}; whiskers: intervals", "note"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: int, batch: int, rows: Sequence[Row | None]) -> list[str]:
    """Draw one batch size: an axis, and a bar, a whisker and a value for each row."""
    bottom = TOP + HEIGHT
    highest = max((row.high for row in rows if row), default=1.0)
    scale = (HEIGHT - 24) / highest  # room for the value above the tallest whisker
    inset = (PANEL - len(rows) * BAR - (len(rows) - 1) * BETWEEN) / 2
    parts = []
    for i, row in enumerate(rows):
        if row is None:
            continue
        x = left + inset + i * (BAR + BETWEEN)
        tall, low, high = row.value * scale, bottom - row.low * scale, bottom - row.high * scale
        middle = x + BAR / 2
        parts.append(_rect(x, bottom - tall, BAR, tall, SERIES[i].style))
        if low - high >= 3:  # a shorter one is no wider than its line
            d = f"M{middle:.1f} {low:.1f}V{high:.1f}M{middle - 4:.1f} {high:.1f}h8"
            parts.append(f'<path class="whisker" d="{d}m-8 {low - high:.1f}h8"/>')
        value = f"{row.value:,.0f}"
        parts.append(_text(middle, min(high, bottom - tall) - 6, value, "value", "middle"))
    parts.append(f'<path class="axis" d="M{left} {bottom + 0.5}h{PANEL}"/>')
    parts.append(_text(left + PANEL / 2, bottom + 20, f"batch {batch}", anchor="middle"))
    return parts


def _summary(bars: dict[tuple[int, str], tuple[Row, Run]], title: str) -> str:
    """Return the chart in words, for those who cannot see it."""
    figures = (f"batch {b}, {label}: {row.value:,.0f}" for (b, label), (row, _) in bars.items())
    return f"{title}, tokens/s. {'; '.join(figures)}"


def _sources(bars: dict[tuple[int, str], tuple[Row, Run]]) -> str:
    """Return the versions and the commits that the bars were measured with."""
    envs = [run.env for _, run in bars.values()]
    versions = dict.fromkeys(
        f"torch {env.torch}, Triton {env.triton}, transformers {env.transformers}" for env in envs
    )
    commits = dict.fromkeys(env.commit for env in envs)
    return f"{'; '.join(versions)}; llmfast at {', '.join(commits)}"


def _rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return (
        f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}" rx="2"/>'
    )


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "") -> str:
    extra = f' class="{style}"' if style else ""
    extra += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{_escape(text)}</text>'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
