"""Build a model's blocks from its trace: choose and verify a recipe for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...model.decoder import layer_output, split_input
from ...model.modules import attributes
from ...model.trace import Layer, NotTraced, Trace
from ...model.verify import (
    Verification,
    cast_floats,
    compare,
    oracle_dtype,
    precise_copy,
    relative_rms,
)
from ...weights.dense import DenseWeight
from ...weights.registry import pack
from ...weights.weight import Linear, PackedWeight, StoredWeight
from ..cache import BLOCK_SIZE, LayerCache, PagedCache
from ..step import Chunk, make_step
from .attention import Attention
from .merge import MergedLinears
from .mlp import GatedMLP
from .recipes import BY_NORMS, Block
from .rope import RopeTable
from .run import REFERENCES, BlockOperations, Run


@dataclass
class Blocks:
    """The decoder layers of a model as blocks, with their tables, weights and verifications."""

    blocks: list[Block]
    tables: list[RopeTable]
    merged: list[MergedLinears]
    packed: list[PackedWeight]  # weights of the blocks; layers side by side have one
    parts: dict[str, PackedWeight]  # their rows by the names of the model's linear layers
    verifications: list[Verification]  # of the layers that differ in more than their weights

    @property
    def recipes(self) -> list[str]:
        return sorted({block.recipe for block in self.blocks})

    def restore(self) -> None:
        for merged in self.merged:
            merged.restore()


@dataclass(frozen=True)
class _Linears:
    """The linear layers of a block: those that are packed, or all of them."""

    qkv: Linear | None
    out: Linear | None
    gate_up: Linear | None
    down: Linear | None

    @property
    def forms(self) -> tuple[Any, ...]:
        """The form of each weight; layers with different forms do not share a verification."""
        linears = (self.qkv, self.out, self.gate_up, self.down)
        return tuple(None if linear is None else linear.weight.form for linear in linears)


@dataclass
class _Guess:
    """One way to build a layer; verification picks among several."""

    recipe: str
    residual_scale: float
    rotation: str  # "halves", "pairs" or "none"
    softcap: float | None  # transformers' sdpa of some versions leaves it out


def build_blocks(
    model: PreTrainedModel,
    trace: Trace,
    max_length: int,
    operations: BlockOperations,
    weights: Mapping[str, StoredWeight],
) -> Blocks:
    """Choose and verify a recipe for every layer.

    The weights of a layer's projections are merged on the way; the model's own parameters become
    views of them, and are restored if anything fails. A layer whose name is in ``weights`` gets a
    packed weight instead, and its parameter stays as it is.

    Raises:
        NotTraced: no recipe computes what a layer does.
    """
    tables: dict[int, int] = {}
    result = Blocks([], [], [], [], {}, [])
    chosen: dict[Any, _Guess] = {}
    names = {module: name for name, module in trace.shadow.named_modules()}

    def pack_layers(layers: list[nn.Linear]) -> Linear | None:
        found = [weights.get(names[layer]) for layer in layers]
        packed = _pack(layers, [w for w in found if w is not None])
        if packed is None:
            return None
        result.packed.append(packed)
        start = 0
        for layer in layers:
            stop = start + layer.out_features
            result.parts[names[layer]] = packed.rows(start, stop)
            start = stop
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        return Linear(packed, torch.cat(biases) if biases else None)

    def merge(layers: list[nn.Linear]) -> Linear:
        merged = MergedLinears(layers)
        result.merged.append(merged)
        return merged.linear

    try:
        for layer in trace.layers:
            packed = _Linears(
                pack_layers(layer.qkv),
                pack_layers([layer.out]),
                pack_layers(layer.gate),
                pack_layers([layer.down]),
            )
            key = (*_key(layer, trace), packed.forms)
            if key not in chosen:
                chosen[key], verification = _choose(layer, packed, operations)
                result.verifications.append(verification)
            guess = chosen[key]
            rope = None
            if guess.rotation != "none" and layer.rotary is not None:
                number = next(i for i, r in enumerate(trace.rotaries) if r.same(layer.rotary))
                if number not in tables:
                    tables[number] = len(result.tables)
                    result.tables.append(
                        RopeTable(layer.rotary, max_length, model.dtype, model.device)
                    )
                rope = tables[number]
            result.blocks.append(_block(layer, guess, rope, packed, merge))
    except BaseException:
        result.restore()
        raise
    return result


def _key(layer: Layer, trace: Trace) -> tuple[Any, ...]:
    number = next(
        (i for i, r in enumerate(trace.rotaries) if layer.rotary and r.same(layer.rotary)), None
    )
    return (attributes(layer.module), layer.call.key, layer.call.window, number)


def _pack(layers: list[nn.Linear], weights: list[StoredWeight]) -> PackedWeight | None:
    """Pack the weights side by side; None if not all layers have one, all of one form."""
    like = layers[0].weight
    if len(weights) < len(layers) or len({layer.bias is None for layer in layers}) > 1:
        return None
    try:
        first, *others = (w.to(like.device) for w in weights)
        return pack(first.concatenate(others), like.dtype)
    except ValueError:  # of different forms, or a form that the kernel does not take
        return None


def _block(
    layer: Layer,
    guess: _Guess,
    rope: int | None,
    packed: _Linears,
    merge: Callable[[list[nn.Linear]], Linear],
) -> Block:
    call = layer.call
    q_norm, k_norm = layer.heads or (None, None)
    return Block(
        recipe=guess.recipe,
        norms=(*layer.before, *layer.between, *layer.after),
        mixer=Attention(
            qkv=packed.qkv or merge(layer.qkv),
            out=packed.out or _dense(layer.out),
            heads=call.query_heads,
            cache=LayerCache(call.kv_heads, call.head_dim, call.head_dim, call.dtype, call.window),
            q_norm=q_norm,
            k_norm=k_norm,
            rope=rope,
            interleaved=guess.rotation == "pairs",
            scale=call.kwargs.get("scaling"),
            softcap=guess.softcap,
            sinks=call.kwargs.get("s_aux"),
        ),
        feed_forward=GatedMLP(
            packed.gate_up or merge(layer.gate),
            packed.down or _dense(layer.down),
            layer.activation.removesuffix("_mul"),
        ),
        residual_scale=guess.residual_scale,
    )


def _dense(layer: nn.Linear) -> Linear:
    bias: nn.Parameter | None = layer.bias
    return Linear(DenseWeight(layer.weight.data), None if bias is None else bias.data)


# ---------------------------------------------------------------------- choice and verification


def _choose(
    layer: Layer, packed: _Linears, operations: BlockOperations
) -> tuple[_Guess, Verification]:
    """Return the guess closest to the layer by the references, verified with ``operations``."""
    name = type(layer.module).__name__
    if len(layer.heads) not in (0, 2):
        raise NotTraced(f"{name} has {len(layer.heads)} norms between projections and attention")
    if layer.heads and layer.heads[0].eps != layer.heads[1].eps:
        raise NotTraced(f"{name} has norms of q and k that differ in epsilon")
    oracle = _oracle(layer)
    best, distance = None, float("inf")
    for guess in _guesses(layer):
        error = relative_rms(_run(layer, guess, packed, REFERENCES), oracle)
        if error < distance:
            best, distance = guess, error
    if best is None:
        raise NotTraced(f"{name} is built as no recipe is")
    try:
        ours = _run(layer, best, packed, operations)
    except (TypeError, ValueError, NotImplementedError) as error:  # of an operation's contract
        raise NotTraced(str(error)) from error
    verification = compare(ours, layer.output[0], oracle)
    if not verification.holds:
        raise NotTraced(f"{name} is not what {best.recipe} computes: {verification}")
    return best, verification


def _guesses(layer: Layer) -> Iterator[_Guess]:
    recipes = BY_NORMS.get((len(layer.before), len(layer.between), len(layer.after)), ())
    floats = [v for v in vars(layer.module).values() if isinstance(v, float) and v != 1.0]
    rotations = ["halves", "pairs", "none"] if layer.rotary is not None else ["none"]
    softcap = layer.call.kwargs.get("softcap")
    caps = [None] if softcap is None else [softcap, None]
    for recipe, rotation, cap in product(recipes, rotations, caps):
        for scale in floats if recipe.endswith("scaled") else [1.0]:
            yield _Guess(recipe, scale, rotation, cap)


@torch.no_grad()
def _run(
    layer: Layer, guess: _Guess, packed: _Linears, operations: BlockOperations
) -> torch.Tensor:
    """Return the layer's output, computed by a block: two prefill chunks and a decoded token.

    The block table is reversed, and blocks have the runner's own size, so that a GPU compiles the
    kernels that steps run.
    """
    hidden = split_input(layer.args, layer.kwargs)[0][0]
    length, device = len(hidden), hidden.device
    tables, first_row = [], 0
    if guess.rotation != "none" and layer.rotary is not None:
        table = RopeTable(layer.rotary, length, hidden.dtype, device)
        first_row = table.admit(length)
        tables.append(table)
    block = _block(layer, guess, 0 if tables else None, packed, _side_by_side)
    if operations is REFERENCES:
        block = block.with_reference_weights()
    count = -(-length // BLOCK_SIZE)
    cache = PagedCache([block.mixer.cache], count, device)
    places = list(range(count))[::-1]
    parts = []
    for start, stop in pairwise((0, length // 2, length - 1, length)):
        chunk = Chunk([0] * (stop - start), start, places, first_row)
        step = make_step([chunk], BLOCK_SIZE, count, device)
        run = Run(step, cache, tables, operations)
        x, residual = block(hidden[start:stop], None, run, 0)
        parts.append(x if residual is None else x + residual)
    return torch.cat(parts)


def _side_by_side(layers: list[nn.Linear]) -> Linear:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return Linear(
        DenseWeight(torch.cat([layer.weight.data for layer in layers])),
        torch.cat([b.data for b in biases]) if len(biases) == len(layers) else None,
    )


@torch.no_grad()
def _oracle(layer: Layer) -> torch.Tensor:
    """Return the layer's output one precision up, for the input that it was traced with."""
    higher = oracle_dtype(layer.output.dtype)
    precise = precise_copy(layer.module, higher)
    output = precise(*cast_floats(layer.args, higher), **cast_floats(layer.kwargs, higher))
    result: torch.Tensor = layer_output(output)[0]
    return result
