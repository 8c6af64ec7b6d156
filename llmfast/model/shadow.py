"""A shadow: a second module tree over a model's tensors that can be hooked and rebuilt freely.

Changes to a shadow do not affect the user's model. Nothing has to be undone, and both can run at
the same time.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig

from ..errors import UserError
from . import attention

M = TypeVar("M", bound=nn.Module)


def make_shadow(model: M) -> M:
    """Return a copy of the module tree that shares every parameter, without llmfast's swaps.

    The copy shares the dictionaries of parameters and buffers, so later changes to the original
    show in it. Modules that hold only buffers are copied, because some change them when called.
    User hooks are kept, and so is an instance forward of another library; the caller decides
    whether it can run with that (:func:`has_foreign_forward`).
    """
    configs: dict[int, Any] = {}
    twins: dict[nn.Module, nn.Module] = {}
    swapped = set(_overridden(model))

    def twin_of(module: nn.Module) -> nn.Module:
        if module in twins:
            return twins[module]
        if module._buffers and not module._parameters and not module._modules:
            # a rotary embedding may replace its frequencies during a forward
            twins[module] = copy.deepcopy(module)
            return twins[module]
        twin = twins[module] = object.__new__(type(module))
        for name, value in vars(module).items():
            if name in _OURS or (name == "forward" and module in swapped):
                continue
            # new dictionaries of hooks, so that a hook on the shadow is not one on the original
            own = copy.copy(value) if isinstance(value, OrderedDict) else value
            twin.__dict__[name] = own
        twin.__dict__["_modules"] = {
            name: None if child is None else twin_of(child)
            for name, child in module._modules.items()
        }
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            twin.__dict__["config"] = copy.deepcopy(config, configs)
        return twin

    shadow = twin_of(model)
    assert isinstance(shadow, type(model))
    return shadow


def point_attention(shadow: nn.Module, names: dict[str, str]) -> None:
    """Set the attention implementation of a shadow's configs to ``names[current]``."""
    for module in shadow.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation in names:
            config._attn_implementation_internal = names[config._attn_implementation]


def has_foreign_forward(model: nn.Module) -> bool:
    """Return whether another library overrode a forward on an instance (offloading, say)."""
    swapped = set(_overridden(model))
    return any("forward" in vars(m) and m not in swapped for m in model.modules())


PATCH = "_llmfast_patch"  # name of the attribute that holds a model's patch
_OURS = {PATCH, attention.STATE, "generate"}


def _overridden(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose forward was set by our patch."""
    state = vars(model).get(PATCH)
    forwards = {} if state is None else state.forwards
    return [module for module, ours in forwards.items() if vars(module).get("forward") is ours]


def check_unpatched(what: str, model: nn.Module) -> None:
    """Raise UserError, beginning with ``what``, if ``llmfast.patch`` has changed the model."""
    if PATCH in vars(model):  # it may compute with merged copies of its weights
        raise UserError(f"{what}: the model is patched; call llmfast.unpatch(model) first")
