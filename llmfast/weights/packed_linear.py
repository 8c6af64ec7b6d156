"""Linear layers of a model that multiply with packed weights, without a dense copy of their weight.

The parameter keeps its shape, dtype and device over a single NaN, so that code that reads it
instead of calling the layer will notice; ``state_dict`` fills the dequantized values in.
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

from .parameters import free_value, replace_value
from .weight import PackedWeight, StoredWeight


@dataclass(frozen=True, eq=False)
class _PackedForward:
    """The forward of a layer whose dense weight was freed."""

    module: nn.Linear
    packed: PackedWeight
    stored: Mapping[str, StoredWeight]  # the weights that the parameters came from, on the CPU
    name: str  # the layer's key in ``stored``

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor | None = self.module.bias
        packed = self.packed
        # a model that was moved since, or plain operations that a compiler can follow
        if x.dtype != packed.dtype or x.device != packed.device or torch.compiler.is_compiling():
            return functional.linear(x, packed.dequantize().to(x), bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias)):
            # gradients of inputs and biases; the weight has none
            y: torch.Tensor = _Multiply.apply(x, packed)  # type: ignore[no-untyped-call]
            return y if bias is None else y + bias
        return packed.linear(x.contiguous(), bias)

    def dense(self) -> torch.Tensor:
        """Return the weight as the parameter held it, in its dtype and on its device."""
        weight = self.module.weight
        return self.stored[self.name].to(weight.device).dequantize(weight.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> _PackedForward:
        module, packed = copy.deepcopy(self.module, memo), copy.deepcopy(self.packed, memo)
        return replace(self, module=module, packed=packed)


class _Multiply(torch.autograd.Function):
    """The product with a packed weight; its backward dequantizes again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
        ctx.packed = packed
        return packed.linear(x.detach().contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.packed.dequantize().to(gradient), None


@torch.no_grad()
def offload_dense(
    model: nn.Module, packed: Mapping[str, PackedWeight], stored: Mapping[str, StoredWeight]
) -> None:
    """Free the dense weights of linear layers, which multiply with packed ones from now on.

    A layer that shares its weight with another, or whose forward was replaced already, keeps it.

    Args:
        model: its parameters hold the dequantized values of ``stored``.
        packed: weights by the names of linear layers.
        stored: weights by the names of these layers and perhaps others.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for name, weight in packed.items():
        module = model.get_submodule(name)
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue
        if owners[id(module.weight)] > 1:
            continue
        vars(module)["forward"] = _PackedForward(module, weight, stored, name)
        module.register_state_dict_post_hook(_fill_in)  # type: ignore[no-untyped-call]
        free_value(module.weight)


@torch.no_grad()
def restore_dense(model: nn.Module) -> None:
    """Give the layers that :func:`offload_dense` has changed their dense weights again."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, _PackedForward):
            replace_value(forward.module.weight, forward.dense())
            remove_override(module)


def remove_override(module: nn.Module) -> None:
    """Undo :func:`offload_dense` for one layer, but for its weight, which the caller has set."""
    if isinstance(vars(module).get("forward"), _PackedForward):
        del module.forward
        for key, hook in list(module._state_dict_hooks.items()):
            if hook is _fill_in:
                del module._state_dict_hooks[key]


def _fill_in(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    forward = vars(module).get("forward")
    if isinstance(forward, _PackedForward) and f"{prefix}weight" in state:
        state[f"{prefix}weight"] = forward.dense()
