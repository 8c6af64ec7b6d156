"""Select the weights that a user names: find them, print what they save, and attach them."""

from __future__ import annotations

import sys
from functools import partial

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from ..model.patch import evaluating
from ..weights.model_weights import (
    EVERYWHERE,
    NOWHERE,
    attach,
    is_requantizable,
    quantized_weights_of,
    use_checkpoint_weights,
    weights_to_pack,
)
from ..weights.quantized import Quantized
from ..weights.registry import FORMATS
from .driver import WEIGHTS, quantize
from .estimate import QuantizationEstimate, estimate_quantization

# int8 loses little with one scale per output, which fits any number of inputs
GROUP_SIZE = {"int4": 64, "int8": None}
OWN = {"own": EVERYWHERE, "dequantized": NOWHERE}  # for a model that was loaded quantized


def select_weights(
    model: PreTrainedModel,
    weights: str | Quantized | None,
    group_size: int | str | None = "auto",
    method: str = "nearest",
    calibration: torch.Tensor | None = None,
    *,
    what: str = "patch",
) -> list[str]:
    """Let the model carry the weights that are asked for, until :func:`.model_weights.detach`.

    An estimate of what they save is printed to stderr before the work starts.

    Args:
        model: not patched.
        weights, group_size, method, calibration: as :func:`llmfast.patch` takes them.
        what: the operation that messages begin with.

    Returns:
        Notes for the report, in full sentences.

    Raises:
        UserError: weights that cannot be quantized this way, that belong to another model, or a
            model that is quantized already; nothing is changed then.
    """
    if isinstance(weights, str) and weights in OWN:
        use_checkpoint_weights(what, model, OWN[weights])
        weights = None
    if weights is None:
        own = quantized_weights_of(model)
        if own is None:
            return []
        text = f"weights: {len(own)} linear layers were loaded quantized"
        if not weights_to_pack(model, model.device):
            text += ", and run dequantized"
            if model.device.type == "cpu":
                text += ": on the CPU that is faster (weights='own' has them in their own bits)"
        return [f"{text}."]
    if not is_requantizable(model):
        raise UserError(f"{what}: weights: this model has quantized weights already")
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            raise UserError(
                f"{what}: weights must be 'int4', 'int8', 'own', 'dequantized' or what "
                f"llmfast.quantize gives; got {weights!r}"
            )
        if isinstance(group_size, str):
            if group_size != "auto":
                raise UserError(
                    f"{what}: group_size must be 32, 64, 128, None or 'auto'; got {group_size!r}"
                )
            group_size = GROUP_SIZE[weights]
        told = partial(estimate_quantization, model, weights=weights, group_size=group_size)
        dtype = model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.float16
        with evaluating(model):
            weights = quantize(
                model,
                weights=weights,
                method=method,
                group_size=group_size,
                calibration=calibration,
                scale_dtype=dtype,
                on_progress=lambda _, done, __: None if done else _say(told()),
            )
    elif weights.weights:
        w = next(iter(weights.weights.values()))
        group = w.group_size if w.groups > 1 else None
        _say(
            estimate_quantization(model, weights=w.format, group_size=group, symmetric=w.symmetric)
        )
    attach(model, weights)
    formats = {w.format for w in weights.weights.values()}
    bits = " and ".join(FORMATS[name].description for name in FORMATS if name in formats)
    return [f"weights: {len(weights.weights)} linear layers are rounded to {bits} until unpatch."]


def _say(told: QuantizationEstimate) -> None:
    """Print to stderr: a library's log is not shown by default."""
    for line in told.lines():
        print(f"llmfast: {line}", file=sys.stderr)
