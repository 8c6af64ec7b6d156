"""Quantized weights that a model carries, so that the runner multiplies in their own bits.

The model's parameters hold the dequantized values meanwhile: whatever does not run through the
runner computes with the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .driver import Quantized, replaced_by
from .released import forget
from .weights import QuantizedWeight

_ATTRIBUTE = "_llmfast_weights"
GPU, EVERYWHERE, NOWHERE = "on a GPU", "everywhere", "nowhere"


@dataclass(frozen=True)
class _Attached:
    weights: Mapping[str, QuantizedWeight]  # by the names of linear layers, on the CPU
    before: Mapping[str, torch.Tensor] | None = None  # the parameters' values, on the CPU
    again: bool = False  # the dequantized values may be quantized anew
    where: str = GPU  # the runner multiplies with them
    under: _Attached | None = None  # what the model carried before

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attached:
        # the quantized weights are never changed; the others become the copy's parameters
        before = self.before
        if before is not None:
            before = {name: value.clone() for name, value in before.items()}
        return replace(self, before=before)


def _attached(model: nn.Module) -> _Attached | None:
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, _Attached) else None


def weights_of(model: nn.Module) -> Mapping[str, QuantizedWeight] | None:
    """The quantized weights that ``model`` carries, by the names of its linear layers."""
    found = _attached(model)
    return None if found is None else found.weights


def packed_weights_of(model: nn.Module, device: torch.device) -> Mapping[str, QuantizedWeight]:
    """Those that the runner is to multiply with on ``device``: on the CPU those asked for alone.

    There the operations are references, which unpack all codes in every call: the dequantized
    weights are several times as fast.
    """
    found = _attached(model)
    if found is None or found.where == NOWHERE or (found.where == GPU and device.type == "cpu"):
        return {}
    return found.weights


def label_of(weights: Mapping[str, QuantizedWeight]) -> str:
    """As a case of the results names weights, by their first layer: ``int4-g32``."""
    w = next(iter(weights.values()))
    return f"int{w.bits}-{'channel' if w.groups == 1 else f'g{w.group_size}'}"


def is_rounded(model: nn.Module) -> bool:
    """Whether ``model`` carries weights that should not be rounded once more."""
    found = _attached(model)
    return found is not None and not found.again


def carry(model: nn.Module, weights: Mapping[str, QuantizedWeight], *, again: bool = False) -> None:
    """Let ``model`` carry ``weights``, whose dequantized values its parameters hold already.

    Args:
        model: as it was loaded.
        weights: by names of its linear layers and of their shapes; they may be read when asked for.
        again: the dequantized values may be quantized anew, by :func:`attach`.
    """
    setattr(model, _ATTRIBUTE, _Attached(weights, again=again))


def use_own(model: nn.Module, where: str) -> None:
    """Let the runner multiply with the weights that ``model`` was loaded with ``where`` it says.

    Raises:
        UserError: it has none.
    """
    found = _attached(model)
    if found is None:
        raise UserError("patch: weights: this model was not loaded with quantized weights")
    setattr(model, _ATTRIBUTE, replace(found, where=where))


@torch.no_grad()
def attach(model: nn.Module, quantized: Quantized) -> None:
    """Let ``model`` carry the weights, and put their dequantized values into its parameters.

    What they held is kept on the CPU, for :func:`detach`.

    Args:
        model: as transformers built it.
        quantized: names of layers and other parameters of the model.

    Raises:
        UserError: a name or shape that is not the model's.

    Whatever is raised, nothing is changed then.
    """
    replaced = replaced_by("weights", model, quantized)
    before: dict[str, torch.Tensor] = {}
    weights = {name: w.to("cpu") for name, w in quantized.weights.items()}
    under = _attached(model)
    setattr(model, _ATTRIBUTE, _Attached(weights, before, where=EVERYWHERE, under=under))
    try:
        for name, parameter, make in replaced:  # one after another: there is memory for one
            value = make()
            before[name] = parameter.data.cpu()
            parameter.data = value
    except BaseException:
        detach(model)
        raise


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Undo :func:`attach` and :func:`use_own`: put back the values that were to be kept."""
    found = _attached(model)
    if found is None:
        return
    if found.before is None:
        setattr(model, _ATTRIBUTE, replace(found, where=GPU))
        return
    parameters = dict(model.named_parameters())
    for name, value in found.before.items():
        if name in parameters:
            parameters[name].data = value.to(parameters[name])
            forget(model.get_submodule(name.rpartition(".")[0]))
    if found.under is None:
        delattr(model, _ATTRIBUTE)
    else:
        setattr(model, _ATTRIBUTE, found.under)
