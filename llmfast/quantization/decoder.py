"""The decoder layers of a transformers model, run one at a time on captured inputs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from .methods import InputStatistics


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of ``model``'s decoder layers: the outermost list of modules that hold
    linear layers.

    Raises:
        UserError: there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(map(linears, module)):
            return name, module
    raise UserError(f"quantize: {type(model).__name__} has no list of layers with linear layers")


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers in ``layer`` by name. Subclasses, which may compute otherwise, are not."""
    return {name: part for name, part in layer.named_modules() if type(part) is nn.Linear}


@dataclass
class Call:
    """What a decoder layer was called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with floating tensors in ``dtype``."""
        kwargs = {name: _convert(value, dtype) for name, value in self.kwargs.items()}
        return Call(tuple(_convert(value, dtype) for value in self.args), kwargs)

    def sharing(self, other: Call) -> Call:
        """The same call with the tensors of ``other`` where they are equal, to hold them once."""
        if self is other or len(self.args) != len(other.args):
            return self
        args = tuple(_shared(*pair) for pair in zip(self.args, other.args, strict=True))
        kwargs = {
            name: _shared(value, other.kwargs.get(name)) for name, value in self.kwargs.items()
        }
        return Call(args, kwargs)


@dataclass
class Captured:
    """The hidden states before the first layer, and each layer's call, for one batch of tokens."""

    hidden: torch.Tensor
    calls: list[Call] = field(default_factory=list)


@torch.no_grad()
def capture(model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor) -> Captured:
    """Run ``model`` without its head on ``ids [batch, tokens]`` and note how layers are called.

    Raises:
        UserError: a layer's input is not the output of the layer before it.
    """
    found: list[Captured] = []
    last: list[torch.Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        if not found:
            found.append(Captured(hidden))
        elif hidden is not last[0]:
            raise UserError(
                f"quantize: the layers of {type(model).__name__} do not follow one another"
            )
        found[0].calls.append(Call(args, kwargs))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        last[:] = [_hidden(output)]

    with _hooked(
        [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
        + [layer.register_forward_hook(after) for layer in layers]
    ):
        model.base_model(input_ids=ids, use_cache=False)
    if not found or len(found[0].calls) != len(layers):
        raise UserError(f"quantize: {type(model).__name__} does not run each of its layers once")
    return found[0]


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """The hidden states after ``layer``."""
    return _hidden(layer(hidden, *call.args, **call.kwargs))


@contextmanager
def gathering(layer: nn.Module) -> Generator[dict[str, InputStatistics]]:
    """Within it, forwards of ``layer`` add to the statistics of its linear layers' inputs, by name.

    Linear layers that are given one and the same tensor share their statistics.
    """
    statistics: dict[str, InputStatistics] = {}
    leader: dict[str, str] = {}  # of each name, the one that adds for it
    inputs: dict[str, torch.Tensor] = {}  # of leaders in this forward; held so that ids stay unique

    def clear(*_: Any) -> None:
        inputs.clear()

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x: torch.Tensor = args[0]
            if name not in leader:
                leader[name] = next((other for other, seen in inputs.items() if seen is x), name)
                if leader[name] == name:
                    statistics[name] = InputStatistics(x.shape[-1], x.device)
                else:
                    statistics[name] = statistics[leader[name]]
            if leader[name] == name:
                inputs[name] = x
                statistics[name].add(x)

        return hook

    handles = [layer.register_forward_hook(clear)]
    handles += [
        part.register_forward_pre_hook(watch(name)) for name, part in linears(layer).items()
    ]
    with _hooked(handles):
        yield statistics


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _convert(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_convert(part, dtype) for part in value)
    return value


def _shared(value: Any, other: Any) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        same = value.dtype == other.dtype and value.device == other.device
        return other if same and torch.equal(value, other) else value
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return tuple(_shared(*pair) for pair in zip(value, other, strict=True))
    return value
