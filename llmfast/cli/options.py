"""The options and arguments that commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# ------------------------------------------------------------------------------- models

Model = Annotated[
    str | None,
    typer.Option(
        metavar="DIR-OR-HUB-ID",
        help="A folder, a GGUF file or a model of the Hugging Face Hub.",
        show_default="the embedded model",
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Random weights in the shape of llama-3.1-8b, qwen3-8b, qwen3-0.6b, mistral-7b or "
        "smollm2-135m.",
    ),
]
Device = Annotated[str | None, typer.Option(help="For example cuda:1 or cpu.")]

# ------------------------------------------------------------------------------- sampling

Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 is greedy. Above 0 samples: higher is more varied.", show_default="greedy"
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample among the likeliest tokens that make up this share: (0, 1]."),
]
TopK = Annotated[
    int | None, typer.Option(help="Sample among this many likeliest tokens; 0 is off.")
]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample among tokens at least this share as likely as the likeliest."),
]
SamplingSeed = Annotated[int | None, typer.Option(help="Repeat the same draws.")]

# ------------------------------------------------------------------------------- quantization

QuantizedWeights = Annotated[
    str, typer.Option("--weights", metavar="int4|int8", help="Type of the quantized linear layers.")
]
OptionalQuantizedWeights = Annotated[
    str | None,
    typer.Option("--weights", metavar="int4|int8", help="Type of the quantized linear layers."),
]
Method = Annotated[str, typer.Option(metavar="nearest|gptq|awq", help="Method of rounding.")]
GroupSize = Annotated[
    int, typer.Option(help="Inputs that share a scale: 32, 64, 128, or 0 for all of a layer.")
]
ZeroPoints = Annotated[
    bool, typer.Option("--zero-points", help="With zero points, not symmetric about 0.")
]
Calibration = Annotated[
    str,
    typer.Option(
        metavar="pride-and-prejudice|persuasion|FILE", help="Text that gptq and awq read."
    ),
]
CalibrationTokens = Annotated[
    int, typer.Option(help="Tokens of it to read at most, from its start.")
]

# ------------------------------------------------------------------------------- benchmarks

Requests = Annotated[int, typer.Option(help="Number of requests.")]
InputRange = Annotated[
    str, typer.Option("--input", metavar="N|LOW-HIGH", help="Tokens of a prompt, uniform.")
]
OutputRange = Annotated[
    str, typer.Option("--output", metavar="N|LOW-HIGH", help="Tokens of an answer, uniform.")
]
WorkloadTemperature = Annotated[float, typer.Option(help="0 is greedy.")]
WorkloadSeed = Annotated[int, typer.Option(help="Seed of prompts, lengths and arrivals.")]
Repeats = Annotated[
    int, typer.Option(help="Runs, each with prompts of its own; the median counts.")
]
MaxNumSeqs = Annotated[int | None, typer.Option(help="As for LLM.", show_default="256")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="As for LLM.", show_default="4096")]
RoundedWeights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="int4-gN|int8|int8-gN",
        help="Round the decoder's linear layers to four or eight bits first, in groups of N "
        "inputs: 32, 64 or 128; int8: one scale an output.",
    ),
]

# ------------------------------------------------------------------------------- results files

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="Merge the figures into a results file."),
]
Results = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The same, into DIR/<suite>.json.")
]
Commit = Annotated[
    str | None,
    typer.Option(help="Commit of the sources, where the checkout has no history to ask."),
]
