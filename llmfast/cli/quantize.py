"""``llmfast quantize``: quantize a model to four or eight bits and save it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import options, ui

if TYPE_CHECKING:
    from ..quantization.driver import Progress
    from ..weights.quantized import Quantized


@dataclass(frozen=True)
class QuantizeOptions:
    """The quantization that a command is asked for."""

    weights: str = "int4"
    method: str = "nearest"
    group_size: int = 64  # 0: all inputs of a layer
    zero_points: bool = False
    calibration: str = "pride-and-prejudice"
    calibration_tokens: int = 16384

    @property
    def label(self) -> str:
        """The name in a case of the results: ``int4-g64-gptq``."""
        group = f"g{self.group_size}" if self.group_size else "channel"
        parts = [self.weights, group, *(["zeros"] if self.zero_points else []), self.method]
        return "-".join(parts)

    def check(self) -> None:
        """Refuse options that no model could meet, before one is loaded.

        Raises:
            UserError: an option outside its range.
        """
        for option, value, known in (
            ("--weights", self.weights, ("int4", "int8")),
            ("--method", self.method, ("nearest", "gptq", "awq")),
            ("--group-size", self.group_size, (32, 64, 128, 0)),
        ):
            if value not in known:
                choices = ", ".join(map(str, known))
                raise UserError(f"{option} must be one of {choices}; got {value}")
        if self.calibration_tokens < 1:
            raise UserError(
                f"--calibration-tokens must be at least 1; got {self.calibration_tokens}"
            )

    def forecast(self, model: Any) -> list[str]:
        """Return lines that say what the weights will take and save.

        Raises:
            UserError: a model without decoder layers.
        """
        from ..quantization.estimate import estimate_quantization

        return estimate_quantization(
            model,
            weights=self.weights,
            group_size=self.group_size or None,
            symmetric=not self.zero_points,
        ).lines()

    def find(
        self,
        model: Any,
        tokenizer: Any,
        on_progress: Progress | None = None,
        work: Path | None = None,
    ) -> Quantized:
        """Quantize ``model``; ``work`` is the folder for finished layers.

        Raises:
            UserError: as :func:`llmfast.quantize`, a text that cannot be read, or a model whose
                weights are quantized already.
        """
        import torch

        import llmfast

        from ..measure.texts import read_text
        from ..model.sizes import ModelSizes
        from ..weights.model_weights import is_requantizable

        if not is_requantizable(model):
            raise UserError("the model has quantized weights already; give the one they came from")
        ids = None
        if self.method != "nearest":
            text = read_text(self.calibration).text
            tokens = tokenizer(text, verbose=False)["input_ids"]
            ids = torch.tensor(tokens[: self.calibration_tokens])
        longest = ModelSizes.of(model).context_length or 512
        found: Quantized = llmfast.quantize(
            model,
            weights=self.weights,
            method=self.method,
            group_size=self.group_size or None,
            symmetric=not self.zero_points,
            calibration=ids,
            window=min(512, longest),
            work=work,
            on_progress=on_progress,
        )
        return found


def quantize_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR-OR-HUB-ID",
            help='A folder, a GGUF file, a model of the Hugging Face Hub, or "embedded".',
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The new folder; it must not exist, or be empty.")
    ],
    weights: options.QuantizedWeights = QuantizeOptions.weights,
    method: options.Method = QuantizeOptions.method,
    group_size: options.GroupSize = QuantizeOptions.group_size,
    zero_points: options.ZeroPoints = QuantizeOptions.zero_points,
    calibration: options.Calibration = QuantizeOptions.calibration,
    calibration_tokens: options.CalibrationTokens = QuantizeOptions.calibration_tokens,
    device: options.Device = None,
    dtype: Annotated[
        str, typer.Option(help="Type of all other weights; auto: as they are stored.")
    ] = "auto",
) -> None:
    """Round the linear layers of a model to 4 or 8 bits, and save it as safetensors.

    The folder is in the format pack-quantized of compressed-tensors, which llmfast.load and other
    engines read. Finished layers are kept beside it until all are done: the same command continues
    an interrupted run.
    """
    choice = QuantizeOptions(
        weights, method, group_size, zero_points, calibration, calibration_tokens
    )
    choice.check()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"--out: {out} is there already, and not empty")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out: there is no folder {out.absolute().parent}")
    if method != "nearest":
        from ..measure.texts import read_text

        read_text(calibration)  # refuse a bad file before minutes of loading
    loaded = ui.load(model, device=device, dtype=dtype)
    work = out.absolute().with_name(f".{out.name}.work")
    going_on = work.is_dir()
    with ui.progress("Quantizing") as step:

        def tell(what: str, done: int, total: int) -> None:
            if done == 0:  # all checks have passed
                if going_on:
                    ui.note(f"going on with the finished layers in {work}")
                for line in choice.forecast(loaded.model):
                    ui.note(line)
            step(what, done, total)

        found = choice.find(loaded.model, loaded.tokenizer, tell, work)
    for name, why in found.fallbacks.items():
        ui.note(f"{name}: {why}")
    with ui.progress(f"Writing {out}"):
        import llmfast

        llmfast.save_quantized(loaded.model, loaded.tokenizer, found, out)
    shutil.rmtree(work, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {len(found.weights)} linear layers in {choice.label}, {size / 2**20:.0f} MiB")
