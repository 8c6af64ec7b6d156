"""Quantized weights that a model carries, so that the runner multiplies in their own bits.

The model's parameters hold the dequantized values meanwhile: whatever does not run through the
runner computes with the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .driver import Quantized, replaced_by
from .weights import QuantizedWeight

_ATTRIBUTE = "_llmfast_weights"


@dataclass(frozen=True)
class _Attached:
    weights: Mapping[str, QuantizedWeight]  # by the names of linear layers, on the CPU
    before: Mapping[str, torch.Tensor] | None  # the parameters' values, on the CPU

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attached:
        # the quantized weights are never changed; the others become the copy's parameters
        before = self.before
        if before is not None:
            before = {name: value.clone() for name, value in before.items()}
        return _Attached(self.weights, before)


def weights_of(model: nn.Module) -> Mapping[str, QuantizedWeight] | None:
    """The quantized weights that ``model`` carries, by the names of its linear layers."""
    found = vars(model).get(_ATTRIBUTE)
    return found.weights if isinstance(found, _Attached) else None


def carry(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Let ``model`` carry ``weights``, whose dequantized values its parameters hold already.

    Raises:
        UserError: a name or shape that is not the model's.
    """
    replaced_by("weights", model, Quantized(dict(weights)))  # names and shapes are the model's
    setattr(model, _ATTRIBUTE, _Attached(weights, None))


@torch.no_grad()
def attach(model: nn.Module, quantized: Quantized) -> None:
    """Let ``model`` carry the weights, and put their dequantized values into its parameters.

    What they held is kept on the CPU, for :func:`detach`.

    Args:
        model: as transformers built it, without quantized weights.
        quantized: names of layers and other parameters of the model.

    Raises:
        UserError: a name or shape that is not the model's; nothing is changed then.
    """
    replaced = replaced_by("weights", model, quantized)
    before: dict[str, torch.Tensor] = {}
    weights = {name: w.to("cpu") for name, w in quantized.weights.items()}
    setattr(model, _ATTRIBUTE, _Attached(weights, before))
    for name, parameter, make in replaced:  # one after another: there is memory for one
        value = make()
        before[name] = parameter.data.cpu()
        parameter.data = value


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Put the values back that :func:`attach` was to keep; without such nothing happens."""
    found = vars(model).get(_ATTRIBUTE)
    if not isinstance(found, _Attached) or found.before is None:
        return
    parameters = dict(model.named_parameters())
    for name, value in found.before.items():
        if name in parameters:
            parameters[name].data = value.to(parameters[name])
    delattr(model, _ATTRIBUTE)
