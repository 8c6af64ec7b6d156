"""The bytes that a step reads, and the arithmetic of a token."""

from __future__ import annotations

from typing import Any

import torch

from .sizes import ModelSizes


def weight_bytes(model: Any) -> int:
    """Return the bytes of the weights that a step reads: every parameter once.

    An input embedding that is not the head too is left out: a step reads a few of its rows.
    """
    total: int = sum(parameter.nbytes for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor) or getattr(head, "weight", None) is weight:
        return total
    return total - weight.nbytes


def kv_bytes(kv_heads: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> int:
    """Return the bytes of a token's keys and values in one layer."""
    return kv_heads * (k_dim + v_dim) * dtype.itemsize


def decode_step_bytes(model: Any, sequences: int, context: float) -> float:
    """Return the bytes that a decoding step reads: weights, and the keys and values of ``context``.

    Args:
        model: of transformers.
        sequences: tokens of the step, one for each sequence.
        context: tokens that each sequence attends to; a layer with a window reads that window.
    """
    sizes = ModelSizes.of(model)
    attended = sum(min(context, window) for window in sizes.windows)
    cached = kv_bytes(sizes.kv_heads, sizes.head_dim, sizes.head_dim, model.dtype)
    return float(weight_bytes(model) + sequences * attended * cached)


def linear_flops(model: Any) -> int:
    """Return the operations of a token in linear layers, the head left out: two for each weight."""
    head = model.get_output_embeddings()
    weights: int = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if module is not head and hasattr(module, "in_features")
    )
    return 2 * weights


def attention_flops(sizes: ModelSizes) -> int:
    """Return the operations of a token for each token of its context.

    Two for each element of a key and two for each of a value, in layers without a window.
    """
    return 4 * sizes.heads * sizes.head_dim * sizes.full_layers
