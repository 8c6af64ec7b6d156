"""The quantized weights that a model carries beside its parameters.

The parameters hold the dequantized values: everything that does not run through the runner computes
with the same weights. The runner asks :func:`weights_to_pack` for the weights that it multiplies
with in their own bits, and frees the dense values (:mod:`.packed_linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .packed_linear import remove_override
from .parameters import replace_value, replaced
from .quantized import Quantized
from .weight import StoredWeight

_ATTRIBUTE = "_llmfast_weights"
GPU, EVERYWHERE, NOWHERE = "on a GPU", "everywhere", "nowhere"


@dataclass(frozen=True)
class _Carried:
    """The quantized weights of a model, and the state that undoes them."""

    weights: Mapping[str, StoredWeight]  # by the names of linear layers, on the CPU
    originals: Mapping[str, torch.Tensor] | None = None  # values of parameters, on the CPU
    requantizable: bool = False  # the dequantized values may be quantized again
    where: str = GPU  # where the runner multiplies with them
    previous: _Carried | None = None  # what the model carried before

    def __deepcopy__(self, memo: dict[int, Any]) -> _Carried:
        # quantized weights are never changed; originals become the parameters of the copy
        originals = self.originals
        if originals is not None:
            originals = {name: value.clone() for name, value in originals.items()}
        return replace(self, originals=originals)


def _carried(model: nn.Module) -> _Carried | None:
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, _Carried) else None


def quantized_weights_of(model: nn.Module) -> Mapping[str, StoredWeight] | None:
    """Return the quantized weights that ``model`` carries, by the names of its linear layers."""
    found = _carried(model)
    return None if found is None else found.weights


def weights_to_pack(model: nn.Module, device: torch.device) -> Mapping[str, StoredWeight]:
    """Return the weights that the runner multiplies with in their own bits on ``device``.

    On the CPU these are only weights that were asked for: the operations there are references,
    which unpack all codes in every call, and the dequantized weights are several times as fast.
    """
    found = _carried(model)
    if found is None or found.where == NOWHERE or (found.where == GPU and device.type == "cpu"):
        return {}
    return found.weights


def label_of(weights: Mapping[str, StoredWeight]) -> str:
    """Return the name of the weights in results, by their first layer: ``int4-g32``."""
    return next(iter(weights.values())).label


def is_requantizable(model: nn.Module) -> bool:
    """Return whether the weights of ``model`` may be quantized (again)."""
    found = _carried(model)
    return found is None or found.requantizable


def set_quantized(
    model: nn.Module, weights: Mapping[str, StoredWeight], *, requantizable: bool = False
) -> None:
    """Let ``model`` carry ``weights``, whose dequantized values its parameters hold already.

    Args:
        model: as it was loaded.
        weights: by names of its linear layers and of their shapes; the mapping may read them
            lazily.
        requantizable: the dequantized values may be quantized again, by :func:`attach`.
    """
    setattr(model, _ATTRIBUTE, _Carried(weights, requantizable=requantizable))


def use_checkpoint_weights(what: str, model: nn.Module, where: str) -> None:
    """Set where the runner multiplies with the weights that ``model`` was loaded with.

    Args:
        what: the operation that a message begins with.
        model: as it was loaded.
        where: ``GPU``, ``EVERYWHERE`` or ``NOWHERE``.

    Raises:
        UserError: it was not loaded with quantized weights.
    """
    found = _carried(model)
    if found is None:
        raise UserError(f"{what}: weights: this model was not loaded with quantized weights")
    setattr(model, _ATTRIBUTE, replace(found, where=where))


@torch.no_grad()
def attach(model: nn.Module, quantized: Quantized) -> None:
    """Let ``model`` carry the weights, and put their dequantized values into its parameters.

    The values of these parameters are kept on the CPU, for :func:`detach`. Nothing is changed if
    an exception is raised.

    Args:
        model: as transformers built it.
        quantized: names of layers and other parameters of the model.

    Raises:
        UserError: a name or shape that is not the model's.
    """
    found = replacements("weights", model, quantized)
    originals: dict[str, torch.Tensor] = {}
    weights = {name: w.to("cpu") for name, w in quantized.weights.items()}
    previous = _carried(model)
    setattr(model, _ATTRIBUTE, _Carried(weights, originals, where=EVERYWHERE, previous=previous))
    try:
        for name, parameter, make in found:  # one after another: there is memory for one
            value = make()
            originals[name] = parameter.data.cpu()
            replace_value(parameter, value)
    except BaseException:
        detach(model)
        raise


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Undo :func:`attach` and :func:`use_checkpoint_weights`: put the original values back."""
    found = _carried(model)
    if found is None:
        return
    if found.originals is None:
        setattr(model, _ATTRIBUTE, replace(found, where=GPU))
        return
    parameters = dict(model.named_parameters())
    for name, value in found.originals.items():
        if name in parameters:
            replace_value(parameters[name], value.to(parameters[name]))
            remove_override(model.get_submodule(name.rpartition(".")[0]))
    if found.previous is None:
        delattr(model, _ATTRIBUTE)
    else:
        setattr(model, _ATTRIBUTE, found.previous)


def overwrite(what: str, model: nn.Module, quantized: Quantized) -> None:
    """Give the parameters of ``model`` the dequantized values for good; it carries no codes.

    Raises:
        UserError: as :func:`replacements`.
    """
    for _, parameter, make in replacements(what, model, quantized):
        replace_value(parameter, make())


def dequantized(what: str, module: nn.Module, quantized: Quantized) -> AbstractContextManager[None]:
    """Return a context within which ``module`` computes with the dequantized weights.

    Raises:
        UserError: as :func:`replacements`; nothing is changed then.
    """
    return replaced(
        {parameter: make() for _, parameter, make in replacements(what, module, quantized)}
    )


Replacement = tuple[str, nn.Parameter, Callable[[], torch.Tensor]]


def replacements(what: str, module: nn.Module, quantized: Quantized) -> list[Replacement]:
    """Return the parameters of ``module`` that ``quantized`` replaces, without changing them.

    Returns:
        Name, parameter, and a function that makes the new value in the parameter's dtype and on its
        device.

    Raises:
        UserError: a name or a shape that is not the module's; the message begins with ``what``.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    result: list[Replacement] = []
    for layer, w in quantized.weights.items():
        parameter = _parameter(what, parameters, f"{layer}.weight", w.shape)
        result.append((f"{layer}.weight", parameter, partial(_dequantize, w, parameter)))
    for name, value in quantized.folded.items():
        parameter = _parameter(what, parameters, name, tuple(value.shape))
        result.append((name, parameter, partial(value.to, parameter, copy=True)))
    return result


def _dequantize(w: StoredWeight, parameter: nn.Parameter) -> torch.Tensor:
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
