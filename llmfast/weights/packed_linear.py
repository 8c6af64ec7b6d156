"""Linear layers whose dense weights were given back: they multiply with the packed ones.

The model's own forward then runs without a 16-bit copy of its weights. A parameter keeps its shape,
dtype and device over a single number, NaN, so that whoever reads it instead of calling the layer
will notice; ``state_dict`` fills the values in.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .packed import PackedWeight
from .quantized import QuantizedWeight


@dataclass(frozen=True, eq=False)
class _Forward:
    """The forward of a layer whose weight was given back."""

    module: nn.Linear
    part: PackedWeight
    weights: Mapping[str, QuantizedWeight]  # what the parameters were made of, on the CPU
    name: str  # the layer's among them

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor | None = self.module.bias
        part = self.part
        if (
            x.dtype != part.dtype or x.device != part.scales.device or torch.compiler.is_compiling()
        ):  # a model that was moved since, or plain operations that a compiler can follow
            return functional.linear(x, part.dequantize().to(x), bias)
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, bias)
        ):  # of inputs and biases; the weights have no gradient
            y: torch.Tensor = _Multiply.apply(x, part)  # type: ignore[no-untyped-call]
            return y if bias is None else y + bias
        return part.linear(x.contiguous(), bias)

    def dense(self) -> torch.Tensor:
        """The weight as the parameter held it, in the parameter's dtype and on its device."""
        weight = self.module.weight
        return self.weights[self.name].to(weight.device).dequantize(weight.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        module, part = copy.deepcopy(self.module, memo), copy.deepcopy(self.part, memo)
        return replace(self, module=module, part=part)


class _Multiply(torch.autograd.Function):
    """The product, whose backward dequantizes anew: no dense weight waits for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, part: PackedWeight) -> torch.Tensor:
        ctx.part = part
        return part.linear(x.detach().contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.part.dequantize().to(gradient), None


@torch.no_grad()
def offload_dense(
    model: nn.Module, parts: Mapping[str, PackedWeight], weights: Mapping[str, QuantizedWeight]
) -> None:
    """Give back the dense weights of linear layers.

    A layer that shares its weight with another, or that something else has given a forward, keeps
    it.

    Args:
        model: whose parameters hold the dequantized values of ``weights``.
        parts: packed weights by the names of linear layers.
        weights: likewise, of those layers and perhaps others.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for name, part in parts.items():
        module = model.get_submodule(name)
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue
        if owners[id(module.weight)] > 1:
            continue
        shape = module.weight.shape
        vars(module)["forward"] = _Forward(module, part, weights, name)
        module.register_state_dict_post_hook(_fill_in)  # type: ignore[no-untyped-call]
        module.weight.data = module.weight.data.new_full((1, 1), float("nan")).expand(shape)


@torch.no_grad()
def restore_dense(model: nn.Module) -> None:
    """Give the layers of ``model`` that :func:`offload_dense` has changed dense weights again."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, _Forward):
            forward.module.weight.data = forward.dense()
            remove_override(module)


def remove_override(module: nn.Module) -> None:
    """Undo :func:`offload_dense` for one layer, but for its weight, which the caller has set."""
    if isinstance(vars(module).get("forward"), _Forward):
        del module.forward
        for key, hook in list(module._state_dict_hooks.items()):
            if hook is _fill_in:
                del module._state_dict_hooks[key]


def _fill_in(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    forward = vars(module).get("forward")
    if isinstance(forward, _Forward) and f"{prefix}weight" in state:
        state[f"{prefix}weight"] = forward.dense()
