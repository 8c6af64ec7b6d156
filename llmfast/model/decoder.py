"""The decoder layers of a model: where they are, and how to capture and repeat their calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import UserError
from .verify import cast_floats


def layer_lists(
    model: nn.Module, holds: Callable[[nn.Module], bool]
) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of modules, with their names, all of whose entries satisfy ``holds``.

    The order is that of ``named_modules``: an outer list precedes the lists inside it.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(holds, module))
    ]


def decoder_layers(what: str, model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder layers: the first whose entries have linears.

    Raises:
        UserError: there is none; the message begins with ``what``.
    """
    found = layer_lists(model, lambda layer: bool(linears(layer)))
    if not found:
        raise UserError(f"{what}: {type(model).__name__} has no list of layers with linear layers")
    return found[0]


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers in ``layer`` by name, without subclasses: they may differ."""
    return {name: part for name, part in layer.named_modules() if type(part) is nn.Linear}


@dataclass
class LayerCall:
    """The arguments of a decoder layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> LayerCall:
        """Return the same call with floating-point tensors in ``dtype``."""
        return LayerCall(cast_floats(self.args, dtype), cast_floats(self.kwargs, dtype))

    def sharing(self, other: LayerCall) -> LayerCall:
        """Return the same call with the tensors of ``other`` where they are equal.

        Calls that share tensors hold them once.
        """
        if self is other or len(self.args) != len(other.args):
            return self
        args = tuple(_shared(*pair) for pair in zip(self.args, other.args, strict=True))
        kwargs = {
            name: _shared(value, other.kwargs.get(name)) for name, value in self.kwargs.items()
        }
        return LayerCall(args, kwargs)


@dataclass
class Captured:
    """The hidden states before the first layer, and each layer's call, for one batch of tokens."""

    hidden: torch.Tensor
    calls: list[LayerCall] = field(default_factory=list)


@torch.no_grad()
def capture(
    what: str, model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor
) -> Captured:
    """Run ``model`` without its head on ``ids [batch, tokens]`` and note how layers are called.

    Raises:
        UserError: a layer's input is not the output of the layer before it; the message begins with
            ``what``.
    """
    found: list[Captured] = []
    last: list[torch.Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = split_input(args, kwargs)
        if not found:
            found.append(Captured(hidden))
        elif hidden is not last[0]:
            raise UserError(
                f"{what}: the layers of {type(model).__name__} do not follow one another"
            )
        found[0].calls.append(call)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        last[:] = [layer_output(output)]

    with hooked(
        [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
        + [layer.register_forward_hook(after) for layer in layers]
    ):
        model.base_model(input_ids=ids, use_cache=False)
    if not found or len(found[0].calls) != len(layers):
        raise UserError(f"{what}: {type(model).__name__} does not run each of its layers once")
    return found[0]


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Return the hidden states after ``layer``."""
    output: torch.Tensor = layer_output(layer(hidden, *call.args, **call.kwargs))
    return output


def split_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, LayerCall]:
    """Split a layer's arguments into the hidden states and the others."""
    if args:
        return args[0], LayerCall(args[1:], dict(kwargs))
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], LayerCall((), others)


def layer_output(output: Any) -> Any:
    """Return the hidden states of a layer's output, which may be a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Generator[None]:
    """Remove hooks at the end of the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shared(value: Any, other: Any) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        same = value.dtype == other.dtype and value.device == other.device
        return other if same and torch.equal(value, other) else value
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return tuple(_shared(*pair) for pair in zip(value, other, strict=True))
    return value
