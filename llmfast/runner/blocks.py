"""Decoder blocks over fused operations and the paged cache: the recipes.

A block takes the residual stream in two parts, ``x`` and ``residual``, whose sum is still to be
taken: the next norm adds them in the same launch. ``residual`` is None where there is one part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import llmfast_kernels
from llmfast_kernels.attention.reference import paged_attention_reference
from llmfast_kernels.norm import reference as norm
from llmfast_kernels.rope.reference import rope_write_kv_reference

from ..model.trace import Norm
from ..weights.dense import ReferenceWeight
from ..weights.weight import Linear
from .cache import PagedCache
from .rope import RopeTable
from .step import Step


@dataclass(frozen=True)
class BlockOperations:
    """The operations of a block. The default ones choose by the tensors' device."""

    rms_norm: Callable[..., torch.Tensor] = llmfast_kernels.rms_norm
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] = llmfast_kernels.add_rms_norm
    rope_write_kv: Callable[..., torch.Tensor] = llmfast_kernels.rope_write_kv
    paged_attention: Callable[..., Any] = llmfast_kernels.paged_attention


REFERENCES = BlockOperations(
    rms_norm=norm.rms_norm_reference,
    add_rms_norm=norm.add_rms_norm_reference,
    rope_write_kv=rope_write_kv_reference,
    paged_attention=paged_attention_reference,
)


@dataclass(frozen=True)
class Attention:
    qkv: Linear
    out: Linear
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Norm | None  # over each head, or over all heads together
    k_norm: Norm | None
    rope: int | None  # which of the model's rotary tables
    interleaved: bool
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


@dataclass(frozen=True)
class GatedMLP:
    gate_up: Linear
    down: Linear
    activation: str  # of the gate, as gated_linear names it


@dataclass(frozen=True)
class Block:
    recipe: str
    norms: tuple[Norm, ...]  # in the order in which the recipe uses them
    attention: Attention
    mlp: GatedMLP
    residual_scale: float = 1.0  # what attention and MLP are multiplied with before they are added

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.attention.qkv, self.attention.out, self.mlp.gate_up, self.mlp.down)

    def with_reference_weights(self) -> Block:
        """Return the same block, whose linear layers run in plain PyTorch."""

        def reference(layer: Linear) -> Linear:
            return replace(layer, weight=ReferenceWeight(layer.weight))

        attention, mlp = self.attention, self.mlp
        return replace(
            self,
            attention=replace(
                attention, qkv=reference(attention.qkv), out=reference(attention.out)
            ),
            mlp=replace(mlp, gate_up=reference(mlp.gate_up), down=reference(mlp.down)),
        )

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
    ) -> Stream:
        return RECIPES[self.recipe](self, x, residual, run, layer)


Stream = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class Run:
    """What the blocks of one step share."""

    step: Step
    cache: PagedCache
    tables: list[RopeTable]
    operations: BlockOperations

    def norm(self, x: torch.Tensor, by: Norm) -> torch.Tensor:
        return self.operations.rms_norm(x, by.weight, eps=by.eps, unit_offset=by.unit_offset)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, by: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, normalised; and the sum."""
        if residual is None:
            return self.norm(x, by), x
        return self.operations.add_rms_norm(
            x, residual, by.weight, eps=by.eps, unit_offset=by.unit_offset
        )

    def attention(self, x: torch.Tensor, part: Attention, layer: int) -> torch.Tensor:
        step, tokens, dim = self.step, len(x), part.head_dim
        q_width, kv_width = part.heads * dim, part.kv_heads * dim
        q, k, v = torch.split(part.qkv(x), [q_width, kv_width, kv_width], dim=1)
        head_norms: dict[str, Any] = {}
        if part.q_norm is not None and part.k_norm is not None:
            if len(part.q_norm.weight) == dim:
                head_norms = {
                    "q_norm": part.q_norm.weight,
                    "k_norm": part.k_norm.weight,
                    "eps": part.q_norm.eps,
                    "unit_offset": part.q_norm.unit_offset,
                }
            else:
                q, k = self.norm(q, part.q_norm), self.norm(k, part.k_norm)
        cos = sin = None
        if part.rope is not None:
            cos, sin = self.tables[part.rope].cos, self.tables[part.rope].sin
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        q = self.operations.rope_write_kv(
            q.view(tokens, part.heads, dim),
            k.view(tokens, part.kv_heads, dim),
            v.view(tokens, part.kv_heads, dim),
            cos,
            sin,
            step.positions,
            keys,
            values,
            step.slots,
            interleaved=part.interleaved,
            **head_norms,
        )
        attended = step.attend(
            self.operations.paged_attention,
            q,
            keys,
            values,
            scale=part.scale,
            window=part.window,
            softcap=part.softcap,
            sinks=part.sinks,
        )
        return part.out(attended.view(tokens, q_width))

    def mlp(self, x: torch.Tensor, part: GatedMLP) -> torch.Tensor:
        return part.down(part.gate_up.gated(x, part.activation))


# ------------------------------------------------------------------------------------ the recipes


def pre_norm(
    block: Block, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
) -> Stream:
    """Llama, Mistral, Qwen, Phi-3, SmolLM3: a norm before attention and one before the MLP."""
    h, residual = run.add_norm(x, residual, block.norms[0])
    h = run.attention(h, block.attention, layer)
    h, residual = run.add_norm(h, residual, block.norms[1])
    return run.mlp(h, block.mlp), residual


def scaled_pre_norm(
    block: Block, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
) -> Stream:
    """Granite: as pre-norm, and what is added to the stream is multiplied first."""
    h, residual = run.add_norm(x, residual, block.norms[0])
    h = run.attention(h, block.attention, layer).mul_(block.residual_scale)
    h, residual = run.add_norm(h, residual, block.norms[1])
    return run.mlp(h, block.mlp).mul_(block.residual_scale), residual


def post_norm(
    block: Block, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
) -> Stream:
    """OLMo2: a norm after attention and one after the MLP."""
    x = x if residual is None else x + residual
    h = run.norm(run.attention(x, block.attention, layer), block.norms[0])
    x = x + h
    return run.norm(run.mlp(x, block.mlp), block.norms[1]), x


def sandwich(
    block: Block, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
) -> Stream:
    """Gemma 2 and 3: a norm before and after attention, before and after the MLP."""
    h, residual = run.add_norm(x, residual, block.norms[0])
    h = run.norm(run.attention(h, block.attention, layer), block.norms[1])
    h, residual = run.add_norm(h, residual, block.norms[2])
    return run.norm(run.mlp(h, block.mlp), block.norms[3]), residual


RECIPES: dict[str, Callable[[Block, torch.Tensor, torch.Tensor | None, Run, int], Stream]] = {
    "pre-norm": pre_norm,
    "pre-norm, scaled": scaled_pre_norm,
    "post-norm": post_norm,
    "sandwich": sandwich,
}
# how many norms a layer has before attention, between it and the MLP, and after the MLP
BY_NORMS: dict[tuple[int, int, int], tuple[str, ...]] = {
    (1, 1, 0): ("pre-norm", "pre-norm, scaled"),
    (0, 1, 1): ("post-norm",),
    (1, 2, 1): ("sandwich",),
}
