"""The interface between a block and its parts: a step's shared state, mixers and feed-forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

import llmfast_kernels
from llmfast_kernels.attention.reference import paged_attention_reference
from llmfast_kernels.norm import reference as norm
from llmfast_kernels.rope.reference import rope_write_kv_reference

from ...model.trace import Norm
from ...weights.weight import Linear
from ..cache import LayerCache, PagedCache
from ..step import Step
from .rope import RopeTable


@dataclass(frozen=True)
class BlockOperations:
    """The operations of a block. The defaults dispatch on the tensors' device."""

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


@dataclass
class Run:
    """The state that the blocks of one step share."""

    step: Step
    cache: PagedCache
    tables: list[RopeTable]
    operations: BlockOperations

    def norm(self, x: torch.Tensor, by: Norm) -> torch.Tensor:
        """Return ``x`` normalised."""
        return self.operations.rms_norm(x, by.weight, eps=by.eps, unit_offset=by.unit_offset)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, by: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``x + residual`` normalised, and the sum; None stands for a residual of zeros."""
        if residual is None:
            return self.norm(x, by), x
        return self.operations.add_rms_norm(
            x, residual, by.weight, eps=by.eps, unit_offset=by.unit_offset
        )


class Part(Protocol):
    """A part of a block, made of linear layers."""

    @property
    def linears(self) -> tuple[Linear, ...]: ...

    def map_linears(self, convert: Callable[[Linear], Linear]) -> Self:
        """Return the same part with every linear layer converted."""
        ...


class Mixer(Part, Protocol):
    """The part of a block that mixes tokens, and keeps state per token: attention."""

    @property
    def cache(self) -> LayerCache:
        """The layer's share of the paged cache."""
        ...

    def __call__(self, x: torch.Tensor, run: Run, layer: int) -> torch.Tensor:
        """Return the output ``[T, hidden]`` for the step's normalised tokens ``[T, hidden]``.

        Writes the tokens' state to ``run.cache``, where ``layer`` is the layer's index.
        """
        ...


class FeedForward(Part, Protocol):
    """The part of a block that treats every token alone: a gated MLP."""

    def __call__(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """Return the output ``[T, hidden]`` for the step's normalised tokens ``[T, hidden]``."""
        ...
