"""``llmfast tune``: measure launches on this GPU and keep the fastest in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from . import ui


def tune_command(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Layers of llama-3.1-8b, qwen3-8b, qwen3-0.6b, mistral-7b or smollm2-135m; may be "
            "given more than once.",
            show_default="all of them",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR-OR-HUB-ID", help="Layers of this model, in its place."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The table.", show_default="where llmfast looks for it"),
    ] = None,
) -> None:
    """Find the fastest launches of linear layers on this GPU, for 1 to 128 tokens.

    Takes about a minute for each shape. Layers that are in the table already, and are not measured
    now, stay in it.
    """
    from ..measure.shapes import SHAPES, config_of

    if shape and model:
        raise UserError("give --shape or --model, not both")
    unknown = [name for name in shape or () if name not in SHAPES]
    if unknown:
        raise UserError(f"--shape must be one of {', '.join(SHAPES)}; got {unknown[0]!r}")
    with ui.progress("Importing") as step:
        import torch

        if not torch.cuda.is_available():
            raise UserError("tune: needs a CUDA device, and there is none here")
        from llmfast_kernels.common.device import device_at
        from llmfast_kernels.linear import launch_tables as tables

        from ..measure.tune import layers_of, tune

        if model is not None:
            from transformers import AutoConfig

            try:
                configs = [AutoConfig.from_pretrained(model).get_text_config()]
            except (OSError, ValueError) as error:
                raise UserError(f"tune: {model}: {str(error).splitlines()[0]}") from None
        else:
            configs = [config_of(name) for name in shape or SHAPES]
        layers = list(dict.fromkeys(layer for config in configs for layer in layers_of(config)))
        gpu = device_at(torch.cuda.current_device())
        path = out or tables.OWN / tables.table_name(gpu)
        try:
            known = tables.read_table(path, gpu) if path.exists() else {}
        except tables.BadTable as error:
            raise UserError(f"tune: {error}") from None
        found = tune(layers, progress=step)
    tables.write_table(path, gpu, known | found)
    ours = sum(launch.tier in ("gemv", "tiles") for launch in found.values())
    print(f"{path}: {len(found)} launches measured, {ours} of them ours")
