"""Decoder blocks over fused operations and the paged cache: the recipes.

A block takes the residual stream in two parts, ``x`` and ``residual``, whose sum is still to be
taken: the next norm adds them in the same launch. ``residual`` is None where there is one part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import llmfast_kernels
from llmfast_kernels.attention.reference import paged_attention_reference
from llmfast_kernels.linear import reference as linear
from llmfast_kernels.norm import reference as norm
from llmfast_kernels.rope.reference import rope_write_kv_reference

from ..model.trace import Norm
from ..weights.packed import PackedWeight
from .cache import PagedCache
from .rope import RopeTable
from .step import Step

_GATED = {
    "silu": llmfast_kernels.silu_mul,
    "gelu_tanh": llmfast_kernels.gelu_tanh_mul,
    "gelu": llmfast_kernels.gelu_mul,
}


def _activate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return _GATED[activation](gate_up)


def _activate_reference(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return linear.ACTIVATIONS[activation](gate_up)


@dataclass(frozen=True)
class BlockOperations:
    """The operations of a block. The default ones choose by the tensors' device."""

    dense_linear: Callable[..., torch.Tensor] = llmfast_kernels.dense_linear
    gated_linear: Callable[..., torch.Tensor] = llmfast_kernels.gated_linear
    rms_norm: Callable[..., torch.Tensor] = llmfast_kernels.rms_norm
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] = llmfast_kernels.add_rms_norm
    rope_write_kv: Callable[..., torch.Tensor] = llmfast_kernels.rope_write_kv
    paged_attention: Callable[..., Any] = llmfast_kernels.paged_attention
    int4_linear: Callable[..., torch.Tensor] = llmfast_kernels.int4_linear
    int8_linear: Callable[..., torch.Tensor] = llmfast_kernels.int8_linear
    activate: Callable[[torch.Tensor, str], torch.Tensor] = _activate

    @property
    def packed(self) -> dict[int, Callable[..., torch.Tensor]]:
        """What multiplies with quantized weights, by the bits of their codes."""
        return {4: self.int4_linear, 8: self.int8_linear}


REFERENCES = BlockOperations(
    dense_linear=linear.dense_linear_reference,
    gated_linear=linear.gated_linear_reference,
    rms_norm=norm.rms_norm_reference,
    add_rms_norm=norm.add_rms_norm_reference,
    rope_write_kv=rope_write_kv_reference,
    paged_attention=paged_attention_reference,
    int4_linear=linear.int4_linear_reference,
    int8_linear=linear.int8_linear_reference,
    activate=_activate_reference,
)


@dataclass(frozen=True)
class Linear:
    """What ``x @ weight.T + bias`` is computed of."""

    weight: torch.Tensor | PackedWeight  # [out_features, in_features]
    bias: torch.Tensor | None


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

    def linear(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        if isinstance(layer.weight, PackedWeight):
            return layer.weight.linear(x, layer.bias, self.operations.packed)
        return self.operations.dense_linear(x, layer.weight, layer.bias)

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
        q, k, v = torch.split(self.linear(x, part.qkv), [q_width, kv_width, kv_width], dim=1)
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
        return self.linear(attended.view(tokens, q_width), part.out)

    def mlp(self, x: torch.Tensor, part: GatedMLP) -> torch.Tensor:
        weight, bias = part.gate_up.weight, part.gate_up.bias
        if isinstance(weight, PackedWeight) and weight.bits == 4:
            h = weight.linear(x, bias, self.operations.packed, activation=part.activation)
        elif isinstance(weight, PackedWeight):
            h = self.operations.activate(self.linear(x, part.gate_up), part.activation)
        else:
            h = self.operations.gated_linear(x, weight, bias, activation=part.activation)
        return self.linear(h, part.down)


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
