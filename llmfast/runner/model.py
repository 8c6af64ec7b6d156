"""A model's forward over a step: its own embedding, head and scalings, our blocks in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model import attention
from ..model.shadow import point_attention
from ..model.sizes import ModelSizes
from ..model.swap import Operations
from ..model.trace import Norm, NotTraced, Trace, trace, trace_attention
from ..model.verify import Verification
from ..weights.dense import DenseWeight
from ..weights.model_weights import weights_to_pack
from ..weights.packed_linear import offload_dense, restore_dense
from ..weights.registry import FORMATS
from ..weights.weight import Linear, StoredWeight
from .blocks import BlockOperations, Run
from .build import Blocks, build_blocks
from .cache import PagedCache
from .check import CHECKED_LENGTH, verify_whole_model
from .paged import NAME, PLACE, PagedAttention
from .step import Step

RELEASED = ("cuda",)  # where packed weights take the place of the model's own; the CPU is slower so


class StepModel(Protocol):
    """What the runner steps: a model over a paged cache."""

    cache_shapes: list[tuple[int, int]]  # KV heads and head dimension of each layer
    vocabulary: int
    dtype: torch.dtype
    device: torch.device
    verification: Verification  # of the logits of the whole model
    packed_bytes: int  # of weights that the user's model does not have
    dense_bytes: int  # of those of the user's model that they stand for

    def __call__(self, step: Step, cache: PagedCache, rows: torch.Tensor) -> torch.Tensor:
        """Write the step's keys and values to the cache, and compute logits.

        Args:
            step: T tokens.
            cache: of :attr:`cache_shapes`.
            rows: int64 [n], the tokens whose logits are wanted.

        Returns:
            Logits ``[n, vocabulary]`` in the model's dtype, as the model's forward gives them.
        """
        ...

    def admit(self, length: int) -> int:
        """What to add to the positions of a sequence that may reach ``length`` tokens."""
        ...

    def resize(self, max_length: int) -> None:
        """Make room for sequences of another length; graphs captured before must not be used."""
        ...

    def restore(self) -> None:
        """Undo what was changed of the user's model."""
        ...

    def describe(self) -> str:
        """How it runs, for the report."""
        ...


def make_step_model(model: PreTrainedModel) -> StepModel:
    """Blocks where every layer has a recipe, else the model's own layers with our attention.

    Quantized weights that the model carries run in their own bits in blocks, on the CPU only if
    they were asked for. On a GPU the dense weights that they stand for are given back.

    Raises:
        NotTraced: neither computes what the model does.
    """
    restore_dense(model)
    try:
        blocks = BlockModel(model, weights=weights_to_pack(model, model.device))
        if model.device.type in RELEASED:
            blocks.release()
        return blocks
    except NotTraced as error:
        reason = str(error)
    try:
        return ForwardModel(model, reason)
    except NotTraced as error:
        other = str(error)
    raise NotTraced(reason if other == reason else f"{reason}; and {other}")


class BlockModel:
    """A model whose layers are recipes, run one step at a time.

    The model's own forward does what comes before and after its layers (scaled embeddings, soft
    caps, logits divided by a constant), in a shadow of it where the first layer stands for all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int = CHECKED_LENGTH,
        *,
        weights: Mapping[str, StoredWeight] | None = None,
        operations: BlockOperations | None = None,
        proving: Operations | None = None,
    ) -> None:
        """Trace ``model``, choose and verify a recipe for each layer, and check the whole.

        Args:
            model: in evaluation mode. The weights of its merged projections become views.
            max_length: the longest sequence there will be; :meth:`resize` changes it.
            weights: of linear layers, by their names in the model; they are packed. Where layers
                of one input differ in form, what the model has is used. The model must hold
                their dequantized values while this runs: the verification compares with them.
            operations: of the blocks; None: the kernels, on the CPU their references.
            proving: the operations that norms and MLPs are recognised with.

        Raises:
            NotTraced: a layer is built as no recipe is, or the whole does not compute the same.
        """
        self.operations = operations or BlockOperations()
        self._users, self._weights = model, weights or {}
        traced = trace(model, proving or Operations())
        self.built: Blocks = build_blocks(model, traced, max_length, self.operations, self._weights)
        self.packed_bytes = sum(w.nbytes for w in self.built.packed)
        self.dense_bytes = sum(w.n * w.k for w in self.built.packed) * model.dtype.itemsize
        self.cache_shapes = [
            (b.attention.kv_heads, b.attention.head_dim) for b in self.built.blocks
        ]
        self.vocabulary = ModelSizes.of(model).vocabulary
        self.dtype, self.device = model.dtype, model.device
        final = None if traced.final_norm is None else traced.final_norm[1]
        self._loop = _BlockLoop(self.built, final)
        self._forward = _Forward(_with_loop(traced, self._loop))
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

    def release(self) -> None:
        """Give back the user's dense weights that packed ones stand for, until :meth:`restore`."""
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


class ForwardModel:
    """A model's own forward over a step, with our attention over the paged cache in it.

    For layers that no recipe describes (LayerNorms, mixtures of experts). Their Python is gone
    where the step can be captured.
    """

    packed_bytes = dense_bytes = 0

    def __init__(self, model: PreTrainedModel, reason: str = "asked for") -> None:
        """
        Args:
            model: in evaluation mode; not changed.
            reason: why no recipe is used, for the report.

        Raises:
            NotTraced: its attention is not one that ours can stand for, or something else than
                attention carries state from token to token.
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
        self.cache_shapes = [(call.kv_heads, call.head_dim) for call in calls]
        self.vocabulary = ModelSizes.of(model).vocabulary
        self.dtype, self.device = model.dtype, model.device
        self.reason = reason
        self._forward = _Forward(twin)
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


class _Forward:
    """A shadow's forward over the flat tokens of a step."""

    def __init__(self, shadow: PreTrainedModel) -> None:
        self._shadow = shadow
        # finished masks of four dimensions are passed on as they are, so that none is made
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=shadow.device)

    def __call__(self, step: Step, rows: torch.Tensor) -> torch.Tensor:
        output = self._shadow(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            attention_mask=self._mask,
            use_cache=False,
            logits_to_keep=rows,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


class _BlockLoop(nn.Module):
    """Stands where the first layer stood, and runs all blocks and the final norm."""

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
    """Stands where the output embedding stood."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return Linear(DenseWeight(self._layer.weight), self._layer.bias)(hidden_states)


class _Same(nn.Module):
    """Stands where a layer or the final norm stood that the loop has done already."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class _NoTables(nn.Module):
    """Stands where a rotary module stood: the blocks have their own tables."""

    def forward(self, *_: Any, **__: Any) -> tuple[None, None]:
        return None, None


def _with_loop(traced: Trace, loop: _BlockLoop) -> PreTrainedModel:
    instead: dict[nn.Module, nn.Module] = {
        layer.module: loop if i == 0 else _Same() for i, layer in enumerate(traced.layers)
    }
    instead |= {rotary.module: _NoTables() for rotary in traced.rotaries}
    if traced.final_norm is not None:
        instead[traced.final_norm[0]] = _Same()
    head = traced.shadow.get_output_embeddings()
    if type(head) is nn.Linear:
        instead[head] = _Head(head)
    for parent in list(traced.shadow.modules()):
        for name, child in parent._modules.items():
            if child in instead:
                parent._modules[name] = instead[child]
    return traced.shadow
