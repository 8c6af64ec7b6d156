"""Quantized weights that a model carries, so that the runner multiplies in their own bits.

The model's parameters hold the dequantized values meanwhile: whatever does not run through the
runner computes with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .packed_linear import remove_override
from .quantized import Quantized, QuantizedWeight

_ATTRIBUTE = "_llmfast_weights"
GPU, EVERYWHERE, NOWHERE = "on a GPU", "everywhere", "nowhere"


@dataclass(frozen=True)
class _Attached:
    weights: Mapping[str, QuantizedWeight]  # by the names of linear layers, on the CPU
    originals: Mapping[str, torch.Tensor] | None = None  # the parameters' values, on the CPU
    requantizable: bool = False  # the dequantized values may be quantized again
    where: str = GPU  # the runner multiplies with them
    previous: _Attached | None = None  # what the model carried before

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attached:
        # the quantized weights are never changed; the others become the copy's parameters
        originals = self.originals
        if originals is not None:
            originals = {name: value.clone() for name, value in originals.items()}
        return replace(self, originals=originals)


def _attached(model: nn.Module) -> _Attached | None:
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, _Attached) else None


def quantized_weights_of(model: nn.Module) -> Mapping[str, QuantizedWeight] | None:
    """The quantized weights that ``model`` carries, by the names of its linear layers."""
    found = _attached(model)
    return None if found is None else found.weights


def weights_to_pack(model: nn.Module, device: torch.device) -> Mapping[str, QuantizedWeight]:
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


def is_requantizable(model: nn.Module) -> bool:
    """Return whether the weights of ``model`` may be quantized (again)."""
    found = _attached(model)
    return found is None or found.requantizable


def set_quantized(
    model: nn.Module, weights: Mapping[str, QuantizedWeight], *, requantizable: bool = False
) -> None:
    """Let ``model`` carry ``weights``, whose dequantized values its parameters hold already.

    Args:
        model: as it was loaded.
        weights: by names of its linear layers and of their shapes; they may be read when asked for.
        requantizable: the dequantized values may be quantized again, by :func:`attach`.
    """
    setattr(model, _ATTRIBUTE, _Attached(weights, requantizable=requantizable))


def use_checkpoint_weights(model: nn.Module, where: str) -> None:
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
    replaced = replacements("weights", model, quantized)
    originals: dict[str, torch.Tensor] = {}
    weights = {name: w.to("cpu") for name, w in quantized.weights.items()}
    previous = _attached(model)
    setattr(model, _ATTRIBUTE, _Attached(weights, originals, where=EVERYWHERE, previous=previous))
    try:
        for name, parameter, make in replaced:  # one after another: there is memory for one
            value = make()
            originals[name] = parameter.data.cpu()
            parameter.data = value
    except BaseException:
        detach(model)
        raise


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Undo :func:`attach` and :func:`use_checkpoint_weights`: put the original values back."""
    found = _attached(model)
    if found is None:
        return
    if found.originals is None:
        setattr(model, _ATTRIBUTE, replace(found, where=GPU))
        return
    parameters = dict(model.named_parameters())
    for name, value in found.originals.items():
        if name in parameters:
            parameters[name].data = value.to(parameters[name])
            remove_override(model.get_submodule(name.rpartition(".")[0]))
    if found.previous is None:
        delattr(model, _ATTRIBUTE)
    else:
        setattr(model, _ATTRIBUTE, found.previous)


def replacements(
    what: str, module: nn.Module, found: Quantized
) -> list[tuple[str, nn.Parameter, Callable[[], torch.Tensor]]]:
    """The parameters of ``module`` that ``found`` replaces: name, parameter, and a function that
    makes the new value, in the parameter's dtype and on its device.

    Raises:
        UserError: a name or a shape that is not the module's; it begins with ``what``.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    result: list[tuple[str, nn.Parameter, Callable[[], torch.Tensor]]] = []
    for layer, w in found.weights.items():
        parameter = _parameter(what, parameters, f"{layer}.weight", w.shape)
        result.append((f"{layer}.weight", parameter, partial(_dequantized, w, parameter)))
    for name, value in found.folded.items():
        parameter = _parameter(what, parameters, name, tuple(value.shape))
        result.append((name, parameter, partial(value.to, parameter, copy=True)))
    return result


def _dequantized(w: QuantizedWeight, parameter: nn.Parameter) -> torch.Tensor:
    return w.to(parameter.device).dequantize(parameter.dtype)


def _parameter(
    what: str, parameters: dict[str, nn.Parameter], name: str, shape: tuple[int, ...]
) -> nn.Parameter:
    parameter = parameters.get(name)
    if parameter is None:
        raise UserError(f"{what}: the model has no parameter {name!r}")
    if tuple(parameter.shape) != shape:
        raise UserError(
            f"{what}: {name!r} has shape {tuple(parameter.shape)} in the model; got {shape}"
        )
    return parameter
