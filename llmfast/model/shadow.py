"""A second tree of modules over a model's tensors: to be hooked, pointed elsewhere and rebuilt.

The user's model is not touched by what happens to its shadow, so nothing has to be undone, and the
two can run at the same time.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig

from . import attention

M = TypeVar("M", bound=nn.Module)


def make_shadow(model: M) -> M:
    """A copy of the module tree that shares every parameter and buffer, without llmfast's swaps.

    Parameters added, replaced or loaded in the original are those of the shadow too; modules that
    hold nothing but buffers are copied, since some change them when called. Hooks of the user are
    kept. A forward that another library put on an instance is kept; the caller must decide
    whether it can run with it (:func:`has_foreign_forward`).
    """
    configs: dict[int, Any] = {}
    twins: dict[nn.Module, nn.Module] = {}
    swapped = set(_overridden(model))

    def twin_of(module: nn.Module) -> nn.Module:
        if module in twins:
            return twins[module]
        if module._buffers and not module._parameters and not module._modules:
            # a rotary embedding may replace its frequencies in a forward
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
    """Give the configs of a shadow another implementation of attention: ``names[today's]``."""
    for module in shadow.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation in names:
            config._attn_implementation_internal = names[config._attn_implementation]


def has_foreign_forward(model: nn.Module) -> bool:
    """Whether another library overrode a forward on an instance (offloading, for one)."""
    swapped = set(_overridden(model))
    return any("forward" in vars(m) and m not in swapped for m in model.modules())


PATCH = "_llmfast_patch"  # the attribute under which a model carries its patch
_OURS = {PATCH, attention.STATE, "generate"}


def _overridden(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward is the one that a patch of ours gave them."""
    state = vars(model).get(PATCH)
    forwards = {} if state is None else state.forwards
    return [module for module, ours in forwards.items() if vars(module).get("forward") is ours]
