"""Paged attention behind transformers' registry, for layers that run their own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from llmfast_kernels import paged_attention, write_kv

from .cache import PagedCache
from .step import Step

NAME = "llmfast_paged"
PLACE = "_llmfast_paged"  # a shadow's module: its PagedAttention, its layer and its window


class PagedAttention:
    """The step that a shadow's modules attend in."""

    step: Step
    cache: PagedCache


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *_: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function over a step's flat tokens.

    Args:
        query: [1, Hq, T, D], rotated; key, value: [1, Hkv, T, D], of the step's tokens alone.

    Returns:
        The output [1, T, Hq, D].
    """
    paged, layer, window = getattr(module, PLACE)
    step, cache = paged.step, paged.cache
    k, v = (x[0].transpose(0, 1) for x in (key, value))
    keys, values = cache.keys[layer], cache.values[layer]
    write_kv(k, v, keys, values, step.slots)
    out = step.attend(
        paged_attention,
        query[0].transpose(0, 1),
        keys,
        values,
        scale=scaling,
        window=window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """The cache's lengths say what a mask would."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
