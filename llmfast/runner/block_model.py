"""A model as blocks: its own embedding, head and scalings around our loop over the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.sizes import ModelSizes
from ..model.swap import Operations
from ..model.trace import Norm, NotTraced, Trace, trace
from ..weights.dense import DenseWeight
from ..weights.packed_linear import offload_dense, restore_dense
from ..weights.registry import FORMATS
from ..weights.weight import Linear, StoredWeight
from .blocks.build import Blocks, build_blocks
from .blocks.run import BlockOperations, Run
from .cache import PagedCache
from .step import Step
from .step_model import ShadowForward
from .verify import CHECKED_LENGTH, verify_whole_model


class BlockModel:
    """A model whose layers run as blocks, one step at a time.

    The model's own forward runs in a shadow whose first layer loops over all blocks. So everything
    before and after the layers (scaled embeddings, soft caps, divided logits) stays the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int = CHECKED_LENGTH,
        *,
        weights: Mapping[str, StoredWeight] | None = None,
        operations: BlockOperations | None = None,
        module_operations: Operations | None = None,
    ) -> None:
        """Trace ``model``, choose and verify a recipe for each layer, then verify the whole.

        Args:
            model: in evaluation mode. The weights of its merged projections become views.
            max_length: tokens of the longest sequence; :meth:`resize` changes it.
            weights: quantized weights by the names of linear layers; they are packed. Layers that
                share an input but differ in form stay dense. The model must hold the dequantized
                values while this runs: the verification compares with them.
            operations: the blocks' operations; None: the kernels, on the CPU their references.
            module_operations: the operations that norms and MLPs are recognised with.

        Raises:
            NotTraced: no recipe computes a layer, or the whole model differs.
        """
        self.operations = operations or BlockOperations()
        self._users, self._weights = model, weights or {}
        traced = trace(model, module_operations or Operations())
        self.built: Blocks = build_blocks(model, traced, max_length, self.operations, self._weights)
        self.packed_bytes = sum(w.nbytes for w in self.built.packed)
        self.dense_bytes = sum(w.n * w.k for w in self.built.packed) * model.dtype.itemsize
        self.layer_caches = [block.mixer.cache for block in self.built.blocks]
        self.vocabulary = ModelSizes.of(model).vocabulary
        self.dtype, self.device = model.dtype, model.device
        final = None if traced.final_norm is None else traced.final_norm[1]
        self._loop = _BlockLoop(self.built, final)
        self._forward = ShadowForward(_with_loop(traced, self._loop))
        self.verification = verify_whole_model(model, self)
        self.resize(max_length)

    @torch.no_grad()
    def __call__(self, step: Step, cache: PagedCache, rows: torch.Tensor) -> torch.Tensor:
        self._loop.run = Run(step, cache, self.built.tables, self.operations)
        return self._forward(step, rows)

    def admit(self, length: int) -> int:
        rows = {table.admit(length) for table in self.built.tables}
        if len(rows) > 1:
            raise NotTraced("rotary tables of which only some change with the sequence's length")
        return rows.pop() if rows else 0

    def resize(self, max_length: int) -> None:
        for table in self.built.tables:
            table.resize(max_length)

    def offload_dense(self) -> None:
        """Offload the user's dense weights that packed ones replace, until :meth:`restore`."""
        offload_dense(self._users, self.built.parts, self._weights)

    def restore(self) -> None:
        restore_dense(self._users)
        self.built.restore()

    def describe(self) -> str:
        recipes = ", ".join(self.built.recipes)
        text = f"{len(self.built.blocks)} blocks run the recipe {recipes}"
        linears = sum(len(block.linears) for block in self.built.blocks)
        for name, weight in FORMATS.items():
            if packed := sum(w.format == name for w in self.built.packed):
                text += f", {packed} of their {linears} linear layers in {weight.description}"
        return text


class _BlockLoop(nn.Module):
    """Replaces the first layer: runs all blocks and the final norm."""

    run: Run | None = None

    def __init__(self, built: Blocks, final: Norm | None) -> None:
        super().__init__()
        self.built = built
        self.final = final

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        assert self.run is not None
        x: torch.Tensor = hidden_states[0]
        residual: torch.Tensor | None = None
        for layer, block in enumerate(self.built.blocks):
            x, residual = block(x, residual, self.run, layer)
        if self.final is not None:
            x = self.run.add_norm(x, residual, self.final)[0]
        elif residual is not None:
            x = x + residual
        return x[None]


class _Head(nn.Module):
    """Replaces the output embedding: runs it through the linear kernels."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return Linear(DenseWeight(self._layer.weight), self._layer.bias)(hidden_states)


class _Identity(nn.Module):
    """Replaces the other layers and the final norm, which the loop has run already."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class _NoTables(nn.Module):
    """Replaces a rotary module: blocks have tables of their own."""

    def forward(self, *_: Any, **__: Any) -> tuple[None, None]:
        return None, None


def _with_loop(traced: Trace, loop: _BlockLoop) -> PreTrainedModel:
    replaced_by: dict[nn.Module, nn.Module] = {
        layer.module: loop if i == 0 else _Identity() for i, layer in enumerate(traced.layers)
    }
    replaced_by |= {rotary.module: _NoTables() for rotary in traced.rotaries}
    if traced.final_norm is not None:
        replaced_by[traced.final_norm[0]] = _Identity()
    head = traced.shadow.get_output_embeddings()
    if type(head) is nn.Linear:
        replaced_by[head] = _Head(head)
    for parent in list(traced.shadow.modules()):
        for name, child in parent._modules.items():
            if child in replaced_by:
                parent._modules[name] = replaced_by[child]
    return traced.shadow
