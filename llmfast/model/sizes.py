"""The sizes of a model: the only place that reads them from a transformers configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a language model. A size that its configuration does not have is 0.

    Args:
        hidden: elements of the residual stream.
        heads, kv_heads, head_dim: of an attention layer.
        vocabulary: rows of the input embedding.
        context_length: tokens of the longest sequence; None if there is no limit.
        windows: tokens that each layer attends to: infinity for full attention, 0 for a layer
            without a cache of keys and values.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_length: int | None
    windows: tuple[float, ...]

    @classmethod
    def of(cls, model: Any) -> ModelSizes:
        """Read the sizes of a transformers model."""
        rows, width = model.get_input_embeddings().weight.shape
        sizes = cls.from_config(model.config)
        return replace(sizes, vocabulary=rows, hidden=sizes.hidden or width)

    @classmethod
    def from_config(cls, config: Any) -> ModelSizes:
        """Read the sizes of a transformers configuration; of its text part, if it has several."""
        config = config.get_text_config()
        hidden = getattr(config, "hidden_size", None) or 0
        heads = getattr(config, "num_attention_heads", None) or 0
        head_dim = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
        return cls(
            hidden=hidden,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            vocabulary=getattr(config, "vocab_size", None) or 0,
            context_length=getattr(config, "max_position_embeddings", None) or None,
            windows=_windows(config),
        )

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def full_layers(self) -> int:
        """Return the number of layers that attend to the whole context."""
        return sum(window == math.inf for window in self.windows)


def _windows(config: Any) -> tuple[float, ...]:
    sliding = getattr(config, "sliding_window", None) or math.inf
    chunk = getattr(config, "attention_chunk_size", None) or math.inf
    # every layer slides where the configuration has a window and names no kinds
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] * (getattr(config, "num_hidden_layers", None) or 0)
    by_kind = {
        "full_attention": math.inf,
        "sliding_attention": sliding,
        "chunked_attention": chunk,
    }
    return tuple(by_kind.get(kind, 0) for kind in kinds)
