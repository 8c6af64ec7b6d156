"""A model's own layers over the paged cache, by an attention function of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from llmfast_kernels import paged_attention, write_kv

from ..model import attention
from ..model.shadow import point_attention
from ..model.sizes import ModelSizes
from ..model.trace import NotTraced, trace_attention
from .cache import LayerCache, PagedCache
from .step import Step
from .step_model import ShadowForward
from .verify import verify_whole_model

NAME = "llmfast_paged"
PLACE = "_llmfast_paged"  # attribute of a module: its PagedAttention, layer and window


class PagedAttention:
    """The current step and cache, which a shadow's attention modules read."""

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
    """Compute attention over a step's flat tokens, with transformers' signature.

    Args:
        query: [1, Hq, T, D], rotated; key, value: [1, Hkv, T, D], of the step's tokens only.

    Returns:
        The output [1, T, Hq, D].
    """
    paged, layer, window = getattr(module, PLACE)
    step, cache = paged.step, paged.cache
    k, v = (x[0].transpose(0, 1) for x in (key, value))
    keys, values, group = cache.keys[layer], cache.values[layer], cache.group_of[layer]
    write_kv(k, v, keys, values, step.slots[group])
    out = step.attend(
        paged_attention,
        query[0].transpose(0, 1),
        keys,
        values,
        group=group,
        scale=scaling,
        window=window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Build no mask: the step's context lengths replace it."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)


class ForwardModel:
    """A model's own forward over a step, with our attention over the paged cache.

    It serves layers that no recipe describes, such as LayerNorms and mixtures of experts. A step
    that can be captured costs no Python.
    """

    packed_bytes = dense_bytes = 0

    def __init__(self, model: PreTrainedModel, reason: str = "requested") -> None:
        """
        Args:
            model: in evaluation mode; not changed.
            reason: why no recipe applies, for the report.

        Raises:
            NotTraced: our attention cannot replace the model's, or something other than attention
                carries state from token to token.
        """
        twin, calls = trace_attention(model)
        for module in twin.modules():
            kind = getattr(module, "rope_type", "default")
            for name in kind.values() if isinstance(kind, dict) else (kind,):
                if name == "longrope" or "dynamic" in str(name):
                    raise NotTraced("its rotary frequencies change with the sequence's length")
        point_attention(twin, dict.fromkeys(attention.NAMES.values(), NAME))
        self._paged = PagedAttention()
        for layer, call in enumerate(calls):
            place = (self._paged, layer, call.window)
            setattr(call.module, PLACE, place)
        self.layer_caches = [
            LayerCache(call.kv_heads, call.head_dim, call.head_dim, call.dtype, call.window)
            for call in calls
        ]
        self.vocabulary = ModelSizes.of(model).vocabulary
        self.dtype, self.device = model.dtype, model.device
        self.reason = reason
        self._forward = ShadowForward(twin)
        self.verification = verify_whole_model(model, self)

    @torch.no_grad()
    def __call__(self, step: Step, cache: PagedCache, rows: torch.Tensor) -> torch.Tensor:
        self._paged.step, self._paged.cache = step, cache
        return self._forward(step, rows)

    def admit(self, length: int) -> int:
        return 0

    def resize(self, max_length: int) -> None:
        pass

    def restore(self) -> None:
        pass

    def describe(self) -> str:
        return f"the model's own layers run with paged attention, since {self.reason}"
