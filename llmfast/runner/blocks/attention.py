"""Attention over the paged cache: the mixer of a transformer's block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from ...model.trace import Norm
from ...weights.weight import Linear
from ..cache import LayerCache
from .run import Run


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over the paged cache, from the projections to the output."""

    qkv: Linear
    out: Linear
    heads: int
    cache: LayerCache
    q_norm: Norm | None  # over each head, or over all heads together
    k_norm: Norm | None
    rope: int | None  # index of the model's rotary table
    interleaved: bool  # RoPE rotates neighbouring pairs instead of halves
    scale: float | None
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.out)

    def map_linears(self, convert: Callable[[Linear], Linear]) -> Self:
        return replace(self, qkv=convert(self.qkv), out=convert(self.out))

    def __call__(self, x: torch.Tensor, run: Run, layer: int) -> torch.Tensor:
        step, tokens, dim, kv_heads = run.step, len(x), self.cache.k_dim, self.cache.kv_heads
        q_width, kv_width = self.heads * dim, kv_heads * dim
        q, k, v = torch.split(self.qkv(x), [q_width, kv_width, kv_width], dim=1)
        head_norms: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            if len(self.q_norm.weight) == dim:
                head_norms = {
                    "q_norm": self.q_norm.weight,
                    "k_norm": self.k_norm.weight,
                    "eps": self.q_norm.eps,
                    "unit_offset": self.q_norm.unit_offset,
                }
            else:
                q, k = run.norm(q, self.q_norm), run.norm(k, self.k_norm)
        cos = sin = None
        if self.rope is not None:
            cos, sin = run.tables[self.rope].cos, run.tables[self.rope].sin
        keys, values = run.cache.keys[layer], run.cache.values[layer]
        group = run.cache.group_of[layer]
        q = run.operations.rope_write_kv(
            q.view(tokens, self.heads, dim),
            k.view(tokens, kv_heads, dim),
            v.view(tokens, kv_heads, dim),
            cos,
            sin,
            step.positions,
            keys,
            values,
            step.slots[group],
            interleaved=self.interleaved,
            **head_norms,
        )
        attended = step.attend(
            run.operations.paged_attention,
            q,
            keys,
            values,
            group=group,
            scale=self.scale,
            window=self.cache.window,
            softcap=self.softcap,
            sinks=self.sinks,
        )
        return self.out(attended.view(tokens, q_width))
