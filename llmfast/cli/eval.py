"""``llmfast eval``: the quality of a model beside a reference."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import options, ui
from .bench_common import Output
from .quantize import QuantizeOptions

if TYPE_CHECKING:
    from rich.table import Table

    from ..measure.quality import Quality
    from ..measure.results import Run
    from ..model.report import Report


@dataclass(frozen=True)
class EvalOptions:
    """The options of one call of ``llmfast eval``. None: not given."""

    model: str | None = None
    reference: str | None = None
    text: str = "persuasion"
    tokens: int = 4096
    window: int = 512
    stride: int | None = None
    ops: str | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    json_path: str | None = None
    choice: QuantizeOptions | None = None

    def check(self) -> None:
        """Refuse options that no model could meet, before one is loaded.

        Raises:
            UserError: an option outside its range.
        """
        if self.window < 2:
            raise UserError(f"--window must be at least 2 tokens, got {self.window}")
        if self.tokens <= self.window + 1:
            raise UserError(
                f"--tokens must be more than one window of {self.window} and a token, so that an "
                f"interval can be given; got {self.tokens}"
            )
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise UserError(
                f"--stride must be from 1 to the window of {self.window}, got {self.stride}"
            )
        if self.choice is not None:
            self.choice.check()
            if self.choice.method != "nearest" and self.choice.calibration == self.text:
                raise UserError(f"--calibration must be another text than --text; got {self.text}")
        Output(self.json_path).check()


def eval_command(
    model: options.Model = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="DIR-OR-HUB-ID",
            help="Model to compare with, as transformers runs it.",
            show_default="the same model, not patched",
        ),
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="persuasion|pride-and-prejudice|FILE", help="Text to read.")
    ] = "persuasion",
    tokens: Annotated[int, typer.Option(help="Tokens of the text to read, from its start.")] = 4096,
    window: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window to the next.", show_default="the window"),
    ] = None,
    ops: Annotated[
        str | None,
        typer.Option(
            metavar="norm,activation,attention|all",
            help="Operations to swap in the model.",
            show_default="all on a GPU, nothing on a CPU",
        ),
    ] = None,
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(help="For example bfloat16.")] = None,
    weights: options.OptionalQuantizedWeights = None,
    method: options.Method = QuantizeOptions.method,
    group_size: options.GroupSize = QuantizeOptions.group_size,
    zero_points: options.ZeroPoints = QuantizeOptions.zero_points,
    calibration: options.Calibration = QuantizeOptions.calibration,
    calibration_tokens: options.CalibrationTokens = QuantizeOptions.calibration_tokens,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap for the intervals.")] = 0,
    json_path: options.Json = None,
) -> None:
    """Measure perplexity, KL divergence to a reference and top-1 agreement, with 95% intervals.

    Compares the model as llmfast runs it with the reference, on the same windows of a text. With
    --weights its linear layers are quantized first; the reference keeps its own.
    """
    choice = None
    if weights is not None:
        choice = QuantizeOptions(
            weights, method, group_size, zero_points, calibration, calibration_tokens
        )
    evaluate(
        EvalOptions(
            model=model,
            reference=reference,
            text=text,
            tokens=tokens,
            window=window,
            stride=stride,
            ops=ops,
            device=device,
            dtype=dtype,
            seed=seed,
            json_path=json_path,
            choice=choice,
        )
    )


def evaluate(request: EvalOptions) -> Quality:
    """Measure and print the figures; progress and notes go to stderr.

    Raises:
        UserError: a bad option, or a model that cannot be measured.
    """
    from ..measure.texts import read_text

    request.check()
    text = read_text(request.text)
    where: dict[str, Any] = {"device": request.device, "dtype": request.dtype}
    model, tokenizer = ui.load(request.model, **where)  # imports torch, under its bar
    import torch

    import llmfast

    from ..measure.quality import compare
    from ..weights.model_weights import overwrite

    ids = _encode(tokenizer, text.text, request)
    if request.reference is None:
        reference: Any = _twin(model, apart=request.choice is not None)
    else:
        reference = ui.load(request.reference, **where).model
    if request.choice is not None:
        with ui.progress("Quantizing") as step:
            found = request.choice.find(model, tokenizer, step)
        overwrite("eval", model, found)
    with ui.progress("Compiling and verifying the kernels"):
        report = llmfast.patch(model, ops=_ops(request.ops))
    with ui.progress("Windows") as step:
        quality = compare(
            reference,
            model,
            torch.tensor(ids),
            window=request.window,
            stride=request.stride,
            seed=request.seed,
            progress=lambda done, total: step("Windows", done, total),
        )

    from rich.console import Console

    to_stdout = request.json_path == "-"
    console = Console(stderr=to_stdout)
    console.print(_table(quality, request, text.name))
    print(_swapped(report), file=sys.stderr if to_stdout else sys.stdout)
    if request.json_path is not None:
        weights = _weights(model) if request.choice is None else request.choice.label
        run = _run(quality, request, text.name, weights, _weights(reference))
        Output(request.json_path).write(run, "quality")
    return quality


def _encode(tokenizer: Any, text: str, request: EvalOptions) -> list[int]:
    # verbose=False: the text may be longer than the context
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < request.tokens:
        raise UserError(
            f"--tokens: {request.text} has {len(ids)} tokens for this model, got {request.tokens}"
        )
    return ids[: request.tokens]


def _twin(model: Any, apart: bool = False) -> Any:
    """Copy the modules but not the weights, so that the reference takes no memory.

    With ``apart``, the copy keeps its values when the model's parameters are replaced.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        own = type(parameter)(parameter.data, parameter.requires_grad) if apart else parameter
        shared[id(parameter)] = own
    return copy.deepcopy(model, shared)


def _ops(ops: str | None) -> str | list[str] | None:
    if ops is None or ops == "all":
        return ops
    return [op.strip() for op in ops.split(",")]


def _table(quality: Quality, request: EvalOptions, text: str) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{text}, {quality.tokens} tokens scored in {quality.windows} windows of "
        f"{request.window}",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    other = request.reference or "unpatched"
    for name, estimate, form in (
        ("perplexity", quality.perplexity, ".4f"),
        (f"perplexity, {other}", quality.reference_perplexity, ".4f"),
        ("ratio of the two", quality.perplexity_ratio, ".6f"),
        (f"KL from {other} (nats a token)", quality.kl, ".3g"),
        (f"top-1 agreement with {other}", quality.top1_agreement, ".2%"),
    ):
        interval = f"{estimate.low:{form}} to {estimate.high:{form}}"
        table.add_row(name, f"{estimate.value:{form}}", interval)
    return table


def _swapped(report: Report) -> str:
    lines = [f"{report.swapped} modules swapped, {report.kept} kept"]
    operations = sorted({entry.operation for entry in report.entries if entry.operation})
    lines += [f"  {operation}" for operation in operations]
    lines += [
        f"  fell back: {name}, {count} calls: {reason}"
        for (name, reason), count in sorted(report.fallbacks.items())
    ]
    return "\n".join([*lines, *report.notes])


def _run(quality: Quality, request: EvalOptions, text: str, weights: str, reference: str) -> Run:
    from ..measure.environment import capture_env, run_id
    from ..measure.figures import make_row
    from ..measure.results import Run, format_case
    from ..measure.shapes import case_value, model_name

    sizes = {"text": case_value(text), "tokens": request.tokens, "window": request.window}
    if request.stride is not None:
        sizes["stride"] = request.stride
    case = format_case({"model": model_name(request.model), "weights": weights, **sizes})
    other = format_case(
        {"model": model_name(request.reference or request.model), "weights": reference, **sizes}
    )
    # a figure over n windows is one estimate: its interval contains their variance
    rows = (
        make_row(case, "llmfast", "perplexity", quality.perplexity, 1),
        make_row(other, "transformers", "perplexity", quality.reference_perplexity, 1),
        make_row(case, "llmfast", "perplexity_ratio", quality.perplexity_ratio, 1),
        make_row(case, "llmfast", "kl_to_dense", quality.kl, 1),
        make_row(case, "llmfast", "top1_agreement", quality.top1_agreement, 1),
    )
    env = capture_env()
    return Run(run_id(env), env, rows)


def _weights(model: Any) -> str:
    from ..measure.shapes import dtype_name
    from ..weights.model_weights import is_requantizable, label_of, quantized_weights_of

    if not is_requantizable(model) and (carried := quantized_weights_of(model)):
        return label_of(carried)
    return dtype_name(next(model.parameters()).dtype)
